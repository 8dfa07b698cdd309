"""Programs with which anybody can try a running server: they use the unmodified SDK and nothing of the server's own."""
