"""The ground floor: values, rules and asyncio, with the standard library and numpy only.

Nothing here knows HTTP, Ray, torch or Jupyter. Inside, imports point one way:
``types, errors <- engine, state <- journal, lanes, access, feed <- service``.
"""
