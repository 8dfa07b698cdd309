"""The core: values, rules and asyncio, with the standard library and numpy only (one journal also uses redis).

Nothing here knows HTTP, Ray, torch or Jupyter. Imports point one way; ARCHITECTURE.md has the order.
"""
