"""The benchmarks' own promises: one list of marks, a page that agrees with it, and a GPU's code that runs here too."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.usefixtures("benchmarks")
def test_the_page_on_performance_has_every_mark_of_the_table() -> None:
    from marks import MARKS

    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "performance.md").read_text().splitlines()
        if line.startswith("|")
    ]
    for mark in MARKS.values():
        words = f"at {'most' if mark.most else 'least'} {mark.bound:g}{mark.unit}"
        found = [row for row in rows if row[0] == mark.what]
        assert [row[2] for row in found] == [words], mark.what
        assert found[0][1], mark.what


@pytest.mark.usefixtures("benchmarks")
def test_a_row_that_falls_short_says_what_is_known_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    from common import held, show
    from marks import MARKS

    bad = held("throughput", 1.0)
    good = held("throughput", 1.3)
    late = held("restart", 11.0)
    assert (bad.ok, good.ok, late.ok) == (False, True, False)
    assert show([good])
    assert not show([bad, good])
    printed = capsys.readouterr().out
    assert printed.count(MARKS["throughput"].note) == 1
    assert "1.3 x" in printed


@pytest.mark.usefixtures("benchmarks")
def test_every_mark_is_measured_by_some_part_of_the_table() -> None:
    from marks import MARKS

    source = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "marks")
    for key in MARKS:
        kind = key.split()[0]
        assert f'held("{kind}"' in source or f'held(f"{kind} ' in source, key
