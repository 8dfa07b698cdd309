"""What the fast tests import stays for good: it is not searched for garbage while it grows, nor ever after."""

from __future__ import annotations

import gc

gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
