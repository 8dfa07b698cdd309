"""jupyterhub_config.py, or the part of it that matters: each user fine-tunes on the GPU of their own server.

Install `tuft-jupyter[backend]` where users' servers run (in their image, or in the environment they share): the
extension enables itself, and `%tuft init` finds it behind `/user/NAME/`. Runs and checkpoints are kept in the user's
`~/.tuft`: put home directories on volumes. Nothing else is needed; the rest of this file stops servers that are idle,
and a server that trains is not.
"""

import sys

c = get_config()  # noqa: F821 - JupyterHub provides it

c.JupyterHub.load_roles = [
    {
        "name": "idle-culler",
        "services": ["idle-culler"],
        "scopes": ["list:users", "read:users:activity", "read:servers", "delete:servers"],
    }
]
c.JupyterHub.services = [
    {
        # pip install jupyterhub-idle-culler. A server counts as active while ops are running or queued in it.
        "name": "idle-culler",
        "command": [sys.executable, "-m", "jupyterhub_idle_culler", "--timeout=3600"],
    }
]
