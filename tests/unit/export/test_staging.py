"""A folder appears whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from megatron_hypenet.errors import ConversionError, SetupError
from megatron_hypenet.export.staging import staged


def test_a_folder_appears_at_the_end_and_replaces_what_may_be(tmp_path):
    for text in ("one", "two"):
        with staged(tmp_path / "out", refuse=lambda: None) as temporary:
            (temporary / "file").write_text(text)
            assert temporary.parent == tmp_path
        assert (tmp_path / "out/file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), SetupError, "no space left"),
        (OSError(errno.EIO, "Input/output error"), ConversionError, "Input/output error"),
        (ConversionError("a value is not finite"), ConversionError, "not finite"),
    ],
)
def test_an_error_leaves_nothing(tmp_path, raised, expected, message):
    with (
        pytest.raises(expected, match=message),
        staged(tmp_path / "out", refuse=lambda: None) as temporary,
    ):
        (temporary / "file").write_text("half")
        raise raised
    assert list(tmp_path.iterdir()) == []


def test_what_appeared_meanwhile_is_kept(tmp_path):
    def refuse():
        if (tmp_path / "out").exists():
            raise ConversionError("exists")

    with pytest.raises(ConversionError, match="exists"), staged(tmp_path / "out", refuse=refuse):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_there_comes_back_where_the_rename_fails(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("old")
    rename = os.replace

    def failing(source, target):
        if Path(target) == tmp_path / "out" and not (tmp_path / "out").exists() and failures:
            raise failures.pop()
        rename(source, target)

    failures = [OSError(errno.EIO, "Input/output error")]
    monkeypatch.setattr(os, "replace", failing)
    with (
        pytest.raises(ConversionError, match="Input/output error"),
        staged(tmp_path / "out", refuse=lambda: None) as temporary,
    ):
        (temporary / "file").write_text("new")
    assert (tmp_path / "out/file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
