"""What the fast tests import stays for good: it is not searched for garbage while it grows, nor ever after.

Also: no property has a deadline; and the fixture of those that read configuration files.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml

from tests.support.server_configs import Load
from tuft_jupyter.config import Settings, load_settings

gc.disable()
hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(document: Any, **env: str) -> Settings:
        path = tmp_path / "server_config.yaml"
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
        return load_settings(path, {"TUFT_HOME": str(tmp_path / "home"), **env})

    return load
