"""The Tinker protocol: bytes to core values and back, and the table of routes."""
