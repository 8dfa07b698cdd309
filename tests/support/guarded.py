"""A Jupyter authorizer under which everybody may do everything but fine-tune, as a shared server may have one."""

from __future__ import annotations

from typing import Any

from jupyter_server.auth import Authorizer


class NoTuft(Authorizer):
    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        return resource != "tuft"
