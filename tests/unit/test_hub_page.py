"""The page about JupyterHub says what the examples say, which tests/contract/test_jupyterhub.py runs on a real Hub."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from traitlets.config import Config

from tests.support.hubs import EXAMPLES
from tuft_jupyter import demo
from tuft_jupyter.config import BackendsConfig, Settings, load_settings
from tuft_jupyter.config.reader import Reader

PAGE = EXAMPLES.parents[1] / "docs" / "jupyterhub.md"


def configured(text: str) -> dict[str, Any]:
    """What a jupyterhub_config.py sets, as JupyterHub reads it."""
    c = Config()
    exec(compile(text, "jupyterhub_config.py", "exec"), {"get_config": lambda: c, "c": c})
    return json.loads(json.dumps(c))  # type: ignore[no-any-return]


def test_the_page_s_configuration_is_the_example_that_a_real_hub_runs() -> None:
    """S0-10: run as JupyterHub would; only where `tuft` lies and which files it reads is the reader's."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    shown, tested = configured(snippet), configured((EXAMPLES / "shared_service.py").read_text())
    for page in (shown, tested):
        (service,) = page["JupyterHub"]["services"]
        del service["environment"]
        service["command"][0] = service["command"][0].rpartition("/")[2]
    assert shown == tested


def part_of(small: Any, large: Any, where: str = "") -> None:
    if isinstance(small, dict):
        for key, value in small.items():
            assert key in large, f"{where}.{key}"
            part_of(value, large[key], f"{where}.{key}")
    else:
        assert small == large, where


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_documentation_shows_the_examples_as_they_are_tested(example: str) -> None:
    page = PAGE.read_text()
    assert f"examples/jupyterhub/{example}" in page


def test_the_snippets_for_kubernetes_are_yaml_and_say_what_the_example_says() -> None:
    """S0-10: what a page shows can be pasted, and is part of the files beside it."""
    snippets = [
        yaml.safe_load(textwrap.dedent(found))
        for found in re.findall(r"^ *```yaml\n(.*?)^ *```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    ]
    limits, shared, own = snippets
    settings = {"supported_models": [{"model_name": "tuft/demo"}], **limits}
    Reader("docs/jupyterhub.md", Path.cwd()).read(Settings, settings)
    values = yaml.safe_load((EXAMPLES / "values_shared_service.yaml").read_text())
    part_of(shared, values)
    chart = yaml.safe_load((EXAMPLES / "values_shared_service.yaml").read_text())["hub"]
    tested = configured((EXAMPLES / "shared_service.py").read_text())
    assert configured(chart["extraConfig"]["tuft"])["JupyterHub"].items() <= tested["JupyterHub"].items()
    roles = [{"name": name, **role} for name, role in chart["loadRoles"].items()]
    assert roles == tested["JupyterHub"]["load_roles"]
    assert chart["config"]["Spawner"]["server_token_scopes"] == tested["Spawner"]["server_token_scopes"]
    assert own["cull"] == values["cull"]
    kinds = [each["kind"] for each in yaml.safe_load_all((EXAMPLES / "deployment.yaml").read_text())]
    assert kinds == ["Service", "NetworkPolicy", "Deployment"]


def test_a_profile_starts_with_both_backends_elsewhere_by_its_variables_alone(tmp_path: Path) -> None:
    """S4-41: every variable of the profile and of the page has its effect; what vLLM reads is on the shared volume."""
    chart = yaml.safe_load((EXAMPLES / "values_backends_elsewhere.yaml").read_text())["singleuser"]
    (profile,) = chart["profileList"]
    given = profile["kubespawner_override"]["environment"]
    assert given["MEGATRON_SERVER_KEY"]["valueFrom"]["secretKeyRef"]
    (block,) = re.findall(
        r"```bash\n(export USE_MEGATRON.*?)```", (PAGE.parent / "backends.md").read_text(), re.DOTALL
    )
    shown = dict(re.findall(r"(\w+)=(\S+)", block))
    assert {**shown, "MEGATRON_SERVER_KEY": 0, "TUFT_HOME": 0} == {
        **given,
        "MEGATRON_SERVER_KEY": 0,
        "TUFT_HOME": 0,
    }
    model = Path(demo.__file__).parent
    for block in (given, shown):
        env = {
            **block,
            "TUFT_HOME": str(tmp_path),
            "TUFT_MODEL_PATH": str(model),
            "MEGATRON_SERVER_KEY": "tml-there",
        }
        settings = load_settings(None, env)
        assert settings.backends == BackendsConfig(
            training="external",
            training_url="http://trainer:5000",
            training_key="tml-there",
            sampling="external",
            vllm_url="http://vllm:8000",
            enable_lora=True,
            max_workers=4,
        )
        assert [each.model_path for each in settings.supported_models] == [str(model)]
    mounts = {each["name"]: each["mountPath"] for each in chart["storage"]["extraVolumeMounts"]}
    assert mounts["adapters"] == given["TUFT_HOME"]
    assert given["TUFT_MODEL_PATH"].startswith(mounts["models"] + "/")
