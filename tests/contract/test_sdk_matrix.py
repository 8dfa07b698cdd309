"""Old and new SDKs do the same against one server: the oldest, the one most people have pinned, the newest."""

from __future__ import annotations

import re

import pytest

from examples.run_on_server import Server
from tests.support import sdk_matrix
from tests.support.live import ROOT, key_of


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_old_and_new_sdks_get_the_same_numbers(alice: Server) -> None:
    """L10, S1-02: 40 steps, sampling, saving, resuming and the REST client on 0.16.1, 0.25.0 and the newest release."""
    wanted = [*dict.fromkeys((sdk_matrix.VERSIONS[0], "0.25.0", sdk_matrix.newest()))]
    address, key = f"{alice.url}tuft", key_of(alice.work)
    reports = [sdk_matrix.run(version, address, key, alice.work) for version in wanted]
    for report in reports:
        assert report.parts == dict.fromkeys(report.parts, "ok"), "\n".join(report.parts.values())
        assert report.steps == sdk_matrix.STEPS
        assert report.apart(reports[-1]) <= sdk_matrix.TOLERANCE


def test_the_readme_shows_every_version_that_is_tried() -> None:
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \|(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert tuple(version for version, _ in rows)[: len(sdk_matrix.VERSIONS)] == sdk_matrix.VERSIONS
    assert not [version for version, row in rows if "no" in row]
