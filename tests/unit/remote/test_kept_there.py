"""The note that a directory of ours holds of weights on a training server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine.remote import kept_there
from tuft_jupyter.engine.remote.kept_there import NOTE, Copies, KeptThere

URL = "http://there:5000"


def kept(directory: Path, url: str = URL) -> Path:
    kept_there.write(directory, KeptThere(url, f"tinker://run/weights/{directory.name}"))
    return directory


def test_copies_whose_directories_are_gone_are_told_once_and_only_those_of_this_server(
    tmp_path: Path,
) -> None:
    old, other = kept(tmp_path / "old"), kept(tmp_path / "other", "http://elsewhere:5000")
    copies = Copies(URL)
    assert copies.saved(kept(tmp_path / "first")) == []
    for directory in (old, other):
        (directory / NOTE).unlink()
        directory.rmdir()
    assert copies.saved(kept(tmp_path / "second")) == ["tinker://run/weights/old"]
    assert copies.saved(kept(tmp_path / "third")) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": "u"}', '{"url": "u", "path": "p", "more": 1}'])
def test_a_note_that_was_cut_off_is_named_and_disturbs_no_other_save(text: str, tmp_path: Path) -> None:
    damaged = kept(tmp_path / "damaged")
    (damaged / NOTE).write_text(text)
    with pytest.raises(UserError, match=r"damaged/kept_there\.json .* cannot be read"):
        kept_there.read(damaged)
    assert Copies(URL).saved(kept(tmp_path / "whole")) == []


def test_weights_that_are_not_there_say_where_they_can_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not made on the training server that is configured"):
        kept_there.read(tmp_path)
