"""Faults on purpose: what is broken, at random, and what must hold afterwards. ``make fault`` prints a table."""
