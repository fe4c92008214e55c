"""The manifest finds every kind of damage."""

import json
import os
from pathlib import Path

import pytest

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint import manifest as mf
from megatron_hypenet.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    with fmt.staged(tmp_path / "ck") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a.bin").write_bytes(b"12345")
        (temporary / "b.txt").write_text("b")
        mf.write_manifest(temporary, kind="student", extra={"stage": "distill", "hf_config": {"x": 1}, "note": 7})
    return tmp_path / "ck"


def test_records_kind_stage_origin_and_versions(folder):
    manifest = mf.verify_files(folder, hashes=True)
    assert (manifest.kind, manifest.stage, manifest.hf_config, manifest.extra) == ("student", "distill", {"x": 1}, {"note": 7})
    assert set(manifest.files) == {"sub/a.bin", "b.txt"} and manifest.files["sub/a.bin"].bytes == 5
    assert {"python", "torch", "megatron-core"} <= set(manifest.versions)


def test_missing_short_and_changed_files(folder):
    (folder / "sub" / "a.bin").write_bytes(b"12346")
    mf.verify_files(folder)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        mf.verify_files(folder, hashes=True)
    (folder / "sub" / "a.bin").write_bytes(b"123")
    (folder / "b.txt").unlink()
    with pytest.raises(CheckpointError, match="2 of 2 files .*missing"):
        mf.verify_files(folder)


def test_uncommitted_unreadable_and_newer_formats(folder):
    record = json.loads((folder / fmt.MANIFEST).read_text())
    (folder / fmt.MANIFEST).write_text(json.dumps(record | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        mf.read_manifest(folder)
    (folder / fmt.MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="unreadable"):
        mf.read_manifest(folder)
    (folder / fmt.COMMITTED).unlink()
    with pytest.raises(CheckpointError, match="COMMITTED"):
        mf.read_manifest(folder)


@pytest.mark.parametrize("sizes", [[], [0, 1, 5], [100, 3000, 0, 2000, 1]])
def test_a_hashed_file_is_what_was_written_and_knows_it(tmp_path, monkeypatch, sizes):
    """Small pieces, and large ones that a second thread hashes."""
    monkeypatch.setattr(mf, "_CHUNK_BYTES", 1000)
    pieces = [os.urandom(size) for size in sizes]
    with mf.HashedFile(tmp_path / "file") as file:
        for piece in pieces:
            scratch = bytearray(piece)
            assert file.write(memoryview(scratch)) == len(piece)
            scratch[:] = bytes(len(piece))  # the writer has let go of it
            file.flush()
        assert file.tell() == sum(sizes)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert file.entry == mf.hash_file(tmp_path / "file")


@pytest.mark.parametrize("size", [10, 3000])
def test_a_disk_that_is_full_is_heard_of(monkeypatch, size):
    monkeypatch.setattr(mf, "_CHUNK_BYTES", 1000)
    with pytest.raises(OSError, match="No space left"), mf.HashedFile(Path("/dev/full")) as file:
        file.write(bytes(size))
    assert not hasattr(file, "entry")
