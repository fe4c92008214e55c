import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hypenet.atomic_files import (
    is_temporary,
    replacing,
    sweep,
    target_of,
    temporary_beside,
    temporary_folder,
    write_json,
    write_text,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "ä\n")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "ä\n"
    with pytest.raises(RuntimeError), replacing(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_temporary_names_tell_what_they_become(tmp_path):
    path = temporary_beside(tmp_path / "a.b")
    assert path.name == f".a.b.tmp-{os.getpid()}"
    assert target_of(path) == tmp_path / "a.b"
    for name in (".x.tmp-12", ".x.old-3", ".x.partial77.bin", ".x.tmp-12.idx"):
        assert is_temporary(Path(name))
    for name in ("x.tmp-12", ".x.tmp", ".x.tmp-", ".x", ".owner.json", ".x.tmp-12a", ".gitignore"):
        assert not is_temporary(Path(name))


def test_a_sweep_takes_what_killed_processes_left_and_nothing_else(tmp_path):
    keep = ["a/b.txt", ".hidden", "a/.x.tmp", "weights/.metadata"]
    for name in (
        *keep,
        ".t.tmp-1/weights/w",
        "a/.s.json.tmp-22",
        "d/.train.partial3.bin",
        "d/.train.tmp-3.idx",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    (tmp_path / ".link.tmp-5").symlink_to(outside)
    assert len(sweep(tmp_path)) == 5
    assert sorted(
        str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()
    ) == sorted(keep)
    assert (outside / "file").exists()


def test_what_was_being_replaced_gets_its_name_back_when_nothing_took_it(tmp_path):
    for name in (".gone.old-1", ".there.old-1", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "there"]
    assert (tmp_path / "there" / "file").read_text() == "there"


def test_a_sweep_for_one_target_leaves_the_others_and_folders_below(tmp_path):
    for name in (".one.tmp-1", ".one.tmp-2.bin", ".other.tmp-1", "sub/.one.tmp-1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert {path.name for path in sweep(tmp_path, names=("one",))} == {
        ".one.tmp-1",
        ".one.tmp-2.bin",
    }
    assert (tmp_path / ".other.tmp-1").exists() and (tmp_path / "sub" / ".one.tmp-1").exists()


def test_temporary_folders_of_killed_processes_go_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code = (
        "import os, signal\n"
        "from megatron_hypenet.atomic_files import temporary_folder\n"
        "with temporary_folder():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    with temporary_folder() as one, temporary_folder() as other:
        assert {path for path in tmp_path.iterdir()} == {one, other}
    assert not left.exists() and list(tmp_path.iterdir()) == []
