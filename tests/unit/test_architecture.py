"""The rules that a test can hold: who imports whom, how long files are, what the route table promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tuft_jupyter.wire.api import Api
from tuft_jupyter.wire.routes import ROUTES, Access

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
SOURCES = [ROOT / "tuft_jupyter", ROOT / "server_ext" / "tuft_jupyter_server"]
GENERATED = ("_pb2.py", "_pb2.pyi")
LINES = 400

FORBIDDEN_IN_CORE = {
    "tornado",
    "ray",
    "torch",
    "jupyter_server",
    "transformers",
    "peft",
    "vllm",
    "msgspec",
    "google",
}
MAY_IMPORT = {
    # package: the packages of ours that it stands on
    "tuft_jupyter.core": {"tuft_jupyter.core"},
    "tuft_jupyter.wire": {"tuft_jupyter.core", "tuft_jupyter.wire", "tuft_jupyter._version"},
    # training and sampling over HTTP: without torch and ray, so that the notebook server's process can run it
    "tuft_jupyter.engine.remote": {
        "tuft_jupyter.core",
        "tuft_jupyter.wire",
        "tuft_jupyter.config",
        "tuft_jupyter.engine",
        "tuft_jupyter._version",
    },
    "tuft_jupyter.engine": {"tuft_jupyter.core", "tuft_jupyter.engine", "tuft_jupyter._version"},
    "tuft_jupyter.kernel": {
        "tuft_jupyter.kernel",
        "tuft_jupyter.config",
        "tuft_jupyter.home",
        "tuft_jupyter.machine",
        "tuft_jupyter._version",
    },
}
ALSO_IMPORT = {
    "tuft_jupyter.engine.worker": {"tuft_jupyter.wire"},
    "tuft_jupyter.engine.sampling_worker": {"tuft_jupyter.wire"},
    "tuft_jupyter.engine.text_worker": {"tuft_jupyter.wire"},
    "tuft_jupyter.engine.ray_engines": {"tuft_jupyter.config", "tuft_jupyter.tracing"},
    "tuft_jupyter.engine.demands": {"tuft_jupyter.config"},
    "tuft_jupyter.engine.ray_actors": {"tuft_jupyter.tracing", "tuft_jupyter.machine"},
    "tuft_jupyter.engine.ray_place": {"tuft_jupyter.home", "tuft_jupyter.machine"},
    "tuft_jupyter.engine.ray_local": {"tuft_jupyter.home"},
}


def sources() -> Iterator[tuple[str, Path]]:
    for root in SOURCES:
        for path in sorted(root.rglob("*.py")):
            if "labextension" in path.parts or path.name.endswith(GENERATED):
                continue
            name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = list(sources())


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_point_one_way(name: str, path: Path) -> None:
    package = next((known for known in MAY_IMPORT if name == known or name.startswith(known + ".")), None)
    if package is None:
        return
    allowed = MAY_IMPORT[package] | ALSO_IMPORT.get(name, set())
    for module in imported(path):
        if module.split(".")[0] in ("tuft_jupyter", "tuft_jupyter_server"):
            fits = any(module == known or module.startswith(known + ".") for known in allowed)
            parent = any(known.startswith(module + ".") for known in allowed)
            assert fits or parent, f"{name} imports {module}"
        elif package == "tuft_jupyter.core":
            assert module.split(".")[0] not in FORBIDDEN_IN_CORE, f"{name} imports {module}"


def test_architecture_names_every_module() -> None:
    listing = ARCHITECTURE.split("```")[1]
    modules = {path.stem for _, path in MODULES if not path.stem.startswith("_")}
    assert not modules - set(re.findall(r"[a-z_]+", listing)) - {"base", "rest"}  # of wire/endpoints


def test_the_core_is_layered_as_architecture_says() -> None:
    """Modules of a layer import from the layers before theirs only, and no module imports itself by way of others."""
    core = {name.rpartition(".")[2]: set(imported(path)) for name, path in MODULES if ".core." in name}
    uses = {
        name: {other for other in core if f"tuft_jupyter.core.{other}" in imports}
        for name, imports in core.items()
    }
    found = re.search(r"^core:(.*?)^core ", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    assert found is not None
    layers = [re.findall(r"[a-z_]+", layer) for layer in found[1].split("<-")]
    level = {name: number for number, layer in enumerate(layers) for name in layer}
    assert set(level) <= set(core)
    wrong = [
        (name, other) for name in level for other in uses[name] & set(level) if level[other] >= level[name]
    ]
    assert wrong == []
    tuple(TopologicalSorter(uses).static_order())  # CycleError names the cycle


def test_only_the_server_package_imports_tornado_and_jupyter_server() -> None:
    for name, path in MODULES:
        if not name.startswith("tuft_jupyter_server"):
            assert not {m.split(".")[0] for m in imported(path)} & {"tornado", "jupyterhub"}, name


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_a_file_can_be_read_in_one_go(name: str, path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LINES, f"{path.name} has {lines} lines: split it by idea"


def test_so_can_a_file_of_tests() -> None:
    sizes = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: lines for name, lines in sizes.items() if lines > LINES} == {}


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_every_module_says_what_it_is(name: str, path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no docstring"


def test_importing_what_a_notebook_server_needs_loads_no_heavy_package() -> None:
    """S1-65, S3-01: the notebook's process never imports torch, transformers, vllm or ray by itself."""
    script = (
        "import sys, tuft_jupyter, tuft_jupyter_server.app, tuft_jupyter_server.daemon, "
        "tuft_jupyter.engine.remote.engines; "
        "print(sorted({'torch', 'transformers', 'peft', 'vllm', 'ray'} & set(sys.modules)))"
    )
    path = f"{ROOT}:{ROOT / 'server_ext'}"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_route_has_an_endpoint_a_line_of_doc_and_is_listed_once() -> None:
    seen = [(route.method, route.path) for route in ROUTES]
    assert len(seen) == len(set(seen))
    for route in ROUTES:
        assert callable(getattr(Api, route.endpoint)), route
        assert route.doc.endswith("."), route


def test_only_liveness_and_the_table_itself_are_open() -> None:
    open_routes = [route.path for route in ROUTES if route.access is Access.OPEN]
    assert open_routes == ["/healthz", "/readyz", "/openapi.json"]


def test_only_downloads_need_no_key_but_a_signed_address() -> None:
    assert [route.path for route in ROUTES if route.access is Access.SIGNED] == ["/tuft/files/{ticket}"]


def test_nothing_of_ours_unpickles_or_runs_foreign_code() -> None:
    """H7: safetensors and JSON only."""
    called = {"torch.load", "pickle.loads", "pickle.load", "eval", "exec"}
    for _, path in MODULES:
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        keywords = {
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
        }
        assert not calls & called, path
        assert not {name for name in calls if name.endswith(".extractall")}, path
        assert not keywords - {"trust_remote_code=False"}, path
    for path in (ROOT / "labextension" / "src").rglob("*.ts*"):
        assert "innerHTML" not in path.read_text(), path
