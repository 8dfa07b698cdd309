"""jupyterhub_config.py, or the part of it that matters: one fine-tuning service that owns the GPU for everybody.

JupyterHub starts `tuft hub-service`; users' kernels connect to it by `%tuft init` (or plain `tinker.ServiceClient()`)
with no key typed. Users' servers need `tuft-jupyter` alone, the service also `tuft-jupyter[hub,backend]`.
"""

import os
import shutil

c = get_config()  # noqa: F821 - JupyterHub provides it

# Where users' servers reach the Hub's proxy. With containers: the proxy's name in their network.
PROXY = os.environ.get("TUFT_EXAMPLE_PROXY", "http://127.0.0.1:8000")

c.JupyterHub.custom_scopes = {
    "custom:tuft:admin": {"description": "See and stop everybody's fine-tuning runs"},
}
c.JupyterHub.services = [
    {
        "name": "tuft",
        "url": "http://127.0.0.1:10611",
        "command": [shutil.which("tuft") or "tuft", "hub-service"],
        "environment": {
            "TUFT_HOME": os.environ.get("TUFT_EXAMPLE_HOME", "/srv/tuft"),
            # "TUFT_CONFIG": "/srv/tuft/tuft_config.yaml",   # models, limits: docs/settings.md
        },
        # A service on another machine: leave `command` out, give `api_token`, and start it there with the variables
        # that docs/jupyterhub.md lists.
        "oauth_client_allowed_scopes": ["custom:tuft:admin"],
    }
]
c.JupyterHub.load_roles = [
    # Whom a token speaks for, and which groups (limits) and admins there are.
    {"name": "tuft-service", "services": ["tuft"], "scopes": ["read:users"]},
    # Everybody may fine-tune. Give the scope to a group's role instead to let only its members in.
    {"name": "user", "scopes": ["self", "access:services!service=tuft"]},
    # Who may see and stop everybody's runs, beside the Hub's admins.
    {"name": "tuft-admins", "groups": ["tuft-admins"], "scopes": ["custom:tuft:admin"]},
]
c.JupyterHub.load_groups = {"tuft-admins": {"users": []}}

# What a kernel needs: where the service is, and a token that may use it.
c.Spawner.environment = {"TUFT_HUB_SERVICE": f"{PROXY}/services/tuft"}
c.Spawner.server_token_scopes = [
    "users:activity!user",
    "access:servers!server",
    "access:services!service=tuft",
]
