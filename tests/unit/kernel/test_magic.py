"""%tuft in a cell: what it shows, and how it fails."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

import tuft_jupyter
from tests.support.stub_server import KEY, StubServer
from tuft_jupyter.kernel import magic, report
from tuft_jupyter.kernel.report import Progress, Table


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    made = InteractiveShell()
    made.run_line_magic("load_ext", "tuft_jupyter")
    yield made
    InteractiveShell.clear_instance()


@pytest.fixture
def hosted(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> StubServer:
    monkeypatch.setenv("TUFT_ADDRESS", server.address)
    monkeypatch.setenv("TUFT_API_KEY", KEY)
    return server


def cell(shell: InteractiveShell, code: str) -> tuple[Any, str, str]:
    """The result, stdout and stderr of a cell."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        result = shell.run_cell(code)
    return result, out.getvalue(), err.getvalue()


def test_init_names_its_phases(shell: InteractiveShell, hosted: StubServer) -> None:
    """S0-03, S0-07: `%tuft init` alone connects; the cell's output names the phases."""
    result, out, _ = cell(shell, "%tuft init")
    assert result.success
    assert f"discovered: {hosted.address} (TUFT_ADDRESS)" in out
    assert "connected:" in out


@pytest.mark.parametrize(
    "line", ["init tuft/demo", "init --model tuft/demo", "init model=tuft/demo", "init -m tuft/demo"]
)
def test_a_model_can_be_named_in_every_spelling(
    line: str, shell: InteractiveShell, hosted: StubServer
) -> None:
    result, out, _ = cell(shell, f"%tuft {line}")
    assert result.success
    assert "base model tuft/demo" in out


def test_python_values_can_stand_in_the_line(shell: InteractiveShell, hosted: StubServer) -> None:
    result, out, _ = cell(shell, "name = 'tuft/demo'\n%tuft init {name}")
    assert result.success
    assert "base model tuft/demo" in out


def test_status_and_shutdown(shell: InteractiveShell, hosted: StubServer) -> None:
    assert "not connected" in cell(shell, "%tuft status")[1]
    cell(shell, "%tuft init")
    shown = cell(shell, "%tuft status")[1]
    for part in (
        hosted.address,
        "TUFT_ADDRESS",
        "tuft/demo: ready",
        "torch is installed",
        "in a file",
        "ada",
    ):
        assert part in shown
    assert cell(shell, "%tuft shutdown")[1] == "TuFT: disconnected.\n"
    assert cell(shell, "%tuft shutdown")[1] == "TuFT: was not connected.\n"
    assert not tuft_jupyter.is_initialized()


def test_every_line_of_a_cell_shows_what_it_found(shell: InteractiveShell) -> None:
    """Not the last one alone, as with expressions: `%tuft attach` stands above `training = %tuft resume`."""
    _, shown, _ = cell(shell, "%tuft status\n%tuft shutdown\nx = 1")
    assert "TuFT: not connected" in shown
    assert "TuFT: was not connected." in shown


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("init     # finds or starts a server, sets up the SDK", ["init"]),
        ("init # it's mine", ["init"]),
        ("# all of it", []),
        ("sample 'What is # for?' -m a#1  # 'quoted'", ["sample", "What is # for?", "-m", "a#1"]),
    ],
)
def test_a_comment_behind_a_command_is_none_of_its_words(line: str, read: list[str]) -> None:
    assert magic.split("%tuft", line) == read


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("init --address http://127.0.0.1:9", "Cannot connect to TuFT at http://127.0.0.1:9"),
        ("init", "No TuFT server was found"),
        ("init --config /no/such.yaml", "Config file not found: /no/such.yaml"),
        ("fly", "no command 'fly'. `%tuft --help` lists them"),
        ("stats", "no command 'stats'; did you mean `%tuft status`?"),
        ("init --fast", "unrecognized arguments: --fast"),
        ("init 'half", "Close the quotation"),
        ("init --address http://[bad", "Cannot connect to TuFT at http://[bad"),
    ],
)
def test_a_failure_is_a_sentence_and_the_cell_has_failed(
    line: str, says: str, shell: InteractiveShell
) -> None:
    """S0-32: rendered without a traceback, yet "run all" stops."""
    result, out, err = cell(shell, f"%tuft {line}")
    assert not result.success
    shown = out + err
    assert says in shown
    assert "Traceback" not in shown
    assert "---->" not in shown
    assert len(shown.strip().splitlines()) <= 3


def test_a_training_cell_with_a_broken_line_is_not_run(shell: InteractiveShell) -> None:
    result, out, err = cell(shell, "%%tuft_train 'half\nran = True")
    assert not result.success
    assert "Close the quotation" in out + err
    assert "Traceback" not in out + err
    assert "ran" not in shell.user_ns


def test_a_prompt_may_end_with_a_question_mark(
    shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IPython would show help on the last word; help on a command is still shown."""
    asked: list[str] = []
    monkeypatch.setattr(magic, "run", asked.append)
    cell(shell, "if True:\n    %tuft sample Where's the treasure?\n%tuft sample 'Why?' -m a?  ")
    assert asked == ["sample Where's the treasure?", "sample 'Why?' -m a?"]
    cell(shell, "%tuft?")
    assert len(asked) == 2


@pytest.mark.parametrize("line", ["", "--help", "-h", "init --help", "init -h"])
def test_help_is_shown_and_ends_nothing(line: str, shell: InteractiveShell) -> None:
    result, shown, _ = cell(shell, f"%tuft {line}")
    assert result.success
    assert "init" in shown
    assert "usage: %tuft" in shown


def test_the_generated_configuration_can_be_seen_without_its_key(shell: InteractiveShell) -> None:
    """S0-29, P5: `%tuft config --show` prints the YAML, the key covered."""
    shown = cell(shell, "%tuft config --show tuft/demo")[1]
    assert "model_name: tuft/demo" in shown
    assert "mode: file_redis" in shown
    assert "tml-" not in shown


def test_the_doctor_answers_in_a_cell(shell: InteractiveShell) -> None:
    """S1-08: both interpreters and their versions."""
    shown = cell(shell, "%tuft doctor")[1]
    for label in ("this interpreter", "kernel python3", "backend", "shared memory", "journal"):
        assert label in shown


def test_tab_completes_verbs_and_options(shell: InteractiveShell) -> None:
    _, verbs = shell.complete("i", "%tuft i", 7)
    assert "init" in verbs
    _, options = shell.complete("--a", "%tuft init --a", 14)
    assert "--address" in options


def test_html_is_escaped_and_text_stands_beside_it() -> None:
    table = Table("<b>", [("a", "<script>"), ("empty", ""), ("two", "x\ny")])
    html = table._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "x<br>y" in html
    assert repr(table).splitlines() == ["<b>", "  a    <script>", "  two  x", "       y"]


def test_progress_in_a_notebook_is_one_output_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Handle:
        def update(self, table: Any) -> None:
            shown.append(repr(table))

    def display(table: Any, display_id: bool) -> Handle:
        shown.append(repr(table))
        return Handle()

    monkeypatch.setattr(report, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    progress = Progress()
    progress("started", "starting ...")
    progress("started", "http://x")
    progress("started", "http://x")
    progress("note", "one")
    progress("note", "two")
    assert len(shown) == 4
    assert "starting ..." not in shown[-1]
    assert "one" in shown[-1]
    assert "two" in shown[-1]
