"""Engines as real Ray actors. A package, because its fixtures are: one Ray serves all of its tests."""
