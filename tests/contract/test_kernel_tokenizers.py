"""``get_tokenizer()`` of the unmodified SDK, for models that no hub has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.support.http_server import Server, on_server
from tests.support.live import TO_THE_END
from tests.support.stub_hub import StubHub
from tests.support.tiny_models import make_tokenizer
from tuft_jupyter.kernel.tokenizers import repository

UNREACHABLE = "http://127.0.0.1:9"
NAMES = [
    "tuft/demo",
    "tiny",
    "acme/tiny",
    "acme/tiny/variant",
    "acme/tiny:1",
    "meta-llama/Llama-3.2-1B",
    "Qwen/Qwen3-0.6B",
]


@pytest.fixture
def fake_hub() -> Iterator[StubHub]:
    with StubHub() as running:
        yield running


@pytest.mark.parametrize("name", NAMES)
def test_the_repository_is_the_one_the_sdk_asks_for(name: str) -> None:
    """S1-35: held against the SDK's own function, for names with 0, 1 and 2 slashes."""
    from tinker.lib.public_interfaces import sampling_client
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    with patch.object(AutoTokenizer, "from_pretrained", return_value="t") as asked:
        sampling_client._load_tokenizer_from_model_info.__wrapped__(name)
    assert asked.call_args.args[0] == repository(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_client_asks_for_the_same_one(name: str, tmp_path: Path) -> None:
    """S1-35: by what get_info says of the run; the name alone would do for few of them."""
    from tinker.lib.public_interfaces import sampling_client
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    async def body(server: Server) -> None:
        session = (await server.post("/create_session", {}))["session_id"]
        asked = {"session_id": session, "model_seq_id": 0, "base_model": name, "lora_config": {"rank": 4}}
        await server.post("/create_model", asked)
        told = (await server.post("/get_info", {"model_id": f"{session}:train:0"}))["model_data"]
        with patch.object(AutoTokenizer, "from_pretrained", return_value="t") as loading:
            sampling_client._load_tokenizer_from_model_info.__wrapped__(
                told["model_name"], told.get("tokenizer_id")
            )
        assert loading.call_args.args[0] == repository(name)

    on_server(tmp_path, body, supported_models=[{"model_name": name, "model_path": "tuft/demo"}])


SCRIPT = """
import json, sys, time
from pathlib import Path
from tuft_jupyter.kernel import hub, tokenizers

source, names = Path(sys.argv[1]), sys.argv[2:]
files = {p.name: p.read_text() for p in source.iterdir()}
for name in names:
    assert tokenizers.lay(tokenizers.repository(name), files, tokenizers.cache_dir())
note = hub.keep_local([tokenizers.repository(name) for name in names])
from tinker.lib.public_interfaces.sampling_client import _load_tokenizer_from_model_info as load
import transformers.models.auto.tokenization_auto
began = time.monotonic()
decoded = [load(name).decode(load(name).encode("a cat")) for name in names]
print(json.dumps({"decoded": decoded, "seconds": time.monotonic() - began, "note": note}))
"""


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config

    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(directory)
    Qwen3Config(vocab_size=320, hidden_size=64).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("reach", ["offline", "unreachable", "online"])
def test_the_sdk_finds_them_with_and_without_a_hub(
    reach: str, tokenizer_files: Path, tmp_path: Path, fake_hub: StubHub
) -> None:
    """S1-35: ``get_tokenizer()`` of the real SDK for names with 0, 1 and 2 slashes, quickly, whatever the network.

    Without the gate an unreachable hub costs the hub client minutes, and a reachable one says that the model
    does not exist.
    """
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    env["HF_ENDPOINT"] = fake_hub.address if reach == "online" else UNREACHABLE
    if reach == "offline":
        env["HF_HUB_OFFLINE"] = "1"
    names = ["tiny", "tuft/demo", "acme/tiny/variant"]
    done = subprocess.run(
        [*TO_THE_END, "-c", SCRIPT, str(tokenizer_files), *names],
        env=env, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["decoded"] == ["a cat"] * 3
    assert answer["note"] is None
    assert answer["seconds"] < 30
    assert "Could not reach" not in done.stderr
    models = {path for path in fake_hub.paths if "agent-harnesses" not in path}
    assert models <= {"/api/models/acme/tiny"}, "only a name of the form org/name may be asked about, once"
