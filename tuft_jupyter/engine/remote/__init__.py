"""Training and sampling elsewhere, over HTTP: a third implementation of ``core.engine``, beside plain torch and Ray.

Nothing below imports torch or ray: it runs in the server's own process, on its event loop.
"""
