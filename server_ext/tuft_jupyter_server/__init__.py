"""The HTTP side: a Jupyter server extension, and a daemon of its own with the same handlers.

The only importer of tornado, jupyter_server and jupyterhub. It stands on ``wire`` and ``core``; :mod:`.host` alone also
knows ``engine/ray_engines``, and imports it when the first worker is needed.
"""
