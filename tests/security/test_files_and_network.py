"""Names and addresses in requests reach nothing outside of the server: no other file, no other machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fuzz import wrong_with
from tests.support.fuzz_cases import Case
from tests.support.scene import OnScene, Scene
from tuft_jupyter.core.types import JSON

pytestmark = pytest.mark.timeout(240)

NAMES = [
    "../x", "..", "%2e%2e", "..%2f..%2fetc", "\x00", "a" * 4096, "/etc/passwd", "ａ／ｂ", "..\\x", "tinker://../..",
    "~", "$HOME", "CON", "-rf", "x\ny", "\u202e", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd",
]  # fmt: skip


class Watch:
    """What this process opens and connects to, while it is on (audit hooks cannot be taken away)."""

    on = False
    opened: list[str] = []
    connected: list[Any] = []

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if not cls.on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            cls.opened.append(str(arguments[0]))
        elif event in ("socket.connect", "socket.getaddrinfo"):
            cls.connected.append(arguments[1] if event == "socket.connect" else arguments[0])


def test_names_and_addresses_of_clients_open_no_file_and_no_connection(
    on_scene: OnScene,
) -> None:
    """H6, H8: a thousand hostile names in every place where one is read; files only below our own directories."""
    sys.addaudithook(Watch.hook)
    ours = (str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix, "/proc", "/dev")

    async def body(scene: Scene) -> None:
        Watch.on = True
        asked = 0
        try:
            while asked < 1000:
                for name in NAMES:
                    asked += await _named(scene, name)
        finally:
            Watch.on = False
        home = str(scene.target.host.settings.home)
        outside = {path for path in Watch.opened if not path.startswith((home, *ours))}
        assert not outside
        elsewhere = {str(a) for a in Watch.connected} - {str(("127.0.0.1", scene.target.port)), "127.0.0.1"}
        assert not elsewhere

    on_scene(body)


async def _named(scene: Scene, name: str) -> int:
    """Send a name wherever a request can hold one; returns how many requests that were."""
    ids = scene.world.ids
    scene.world.seq += 1
    run = {"model_id": ids["run"], "seq_id": scene.world.seq}
    image = {"type": "image_asset_pointer", "location": name, "format": "png"}
    bodies: list[tuple[str, Any]] = [
        ("save_weights", {**run, "path": name}),
        ("load_weights", {**run, "path": name}),
        ("load_weights", {**run, "path": f"tinker://{ids['run']}/weights/{name}"}),
        ("weights_info", {"tinker_path": name}),
        ("copy_weights", {"source_path": name}),
        ("tuft/models", {"model": name}),
        ("create_sampling_session", {"session_id": ids["session"], "sampling_session_seq_id": scene.world.seq,
                                     "base_model": name}),
        ("create_model", {"session_id": ids["session"], "model_seq_id": scene.world.seq, "base_model": name,
                          "lora_config": {"rank": 4}}),
        ("asample", scene.sample(prompt={"chunks": [image]})),
        ("../../oai/api/v1/completions", {"model": name, "prompt": "a"}),
    ]  # fmt: skip
    for verb, body in bodies:
        path = "/oai/api/v1/completions" if "oai" in verb else f"/api/v1/{verb}"
        case = Case("POST", path, json.dumps(body).encode(), {"Content-Type": JSON})
        answer = await scene.target.ask(case)
        assert not wrong_with(case, answer), (verb, name, answer.body)
        assert answer.code >= 400 or verb in ("save_weights", "asample"), (verb, name)
    return len(bodies)
