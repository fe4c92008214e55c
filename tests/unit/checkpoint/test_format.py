"""A folder appears whole or not at all."""

import errno
import os

import pytest

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.errors import CheckpointError, SetupError


def test_iteration_names_round_trip_and_sort_by_number(tmp_path):
    for step in (5, 12_345_678, 70):
        (tmp_path / fmt.iteration_name(step)).mkdir()
    (tmp_path / "iter_12").mkdir()
    (tmp_path / "iter_0000099").symlink_to(tmp_path)
    assert [fmt.iteration_of(folder) for folder in fmt.iteration_folders(tmp_path)] == [
        5,
        70,
        12_345_678,
    ]


def test_staged_folder_is_committed_at_the_end_only(tmp_path):
    target = tmp_path / "deep" / "ck"
    with fmt.staged(target) as temporary:
        (temporary / "a").write_text("x")
        assert not target.exists()
    assert fmt.is_committed(target) and (target / "a").read_text() == "x"
    assert os.listdir(target.parent) == ["ck"]


def test_failed_save_leaves_no_trace_and_keeps_the_old_one(tmp_path):
    target = tmp_path / "ck"
    with fmt.staged(target) as temporary:
        (temporary / "a").write_text("old")
    with (
        pytest.raises(SetupError, match="no space left") as caught,
        fmt.staged(target, overwrite=True),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.exit_code == 4
    with pytest.raises(ZeroDivisionError), fmt.staged(target, overwrite=True):
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ["ck"] and (target / "a").read_text() == "old"


def test_existing_target_needs_overwrite(tmp_path):
    target = tmp_path / "ck"
    for text in ("1", "2"):
        with fmt.staged(target, overwrite=text == "2") as temporary:
            (temporary / "a").write_text(text)
    assert (target / "a").read_text() == "2" and os.listdir(tmp_path) == ["ck"]
    with pytest.raises(CheckpointError, match="already exists"), fmt.staged(target):
        pass


def test_remove_stale_takes_only_leftovers(tmp_path):
    for name in (".iter_0000003.tmp-17", ".iter_0000003.old-17", "iter_0000003", ".hidden"):
        (tmp_path / name).mkdir()
    fmt.remove_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "iter_0000003"]


def test_a_save_that_lacked_only_its_name_gets_it(tmp_path):
    """Killed between the marker and the rename, or between the two renames of an overwriting
    save."""
    for name, text in (
        (".iter_0000003.tmp-17", "new"),
        (".iter_0000003.old-17", "old"),
        (".iter_0000002.tmp-17", "other"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(text)
        (tmp_path / name / fmt.COMMITTED).touch()
    with fmt.staged(tmp_path / "iter_0000002"):
        pass
    fmt.remove_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000002", "iter_0000003"]
    assert (tmp_path / "iter_0000003" / "a").read_text() == "new" and not (
        tmp_path / "iter_0000002" / "a"
    ).exists()


def test_a_failed_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "ck"
    with fmt.staged(target) as temporary:
        (temporary / "a").write_text("old")
    rename = os.replace

    def refuse(source, destination):
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "broken")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="broken"), fmt.staged(target, overwrite=True):
        pass
    assert os.listdir(tmp_path) == ["ck"] and (target / "a").read_text() == "old"
