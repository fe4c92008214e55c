"""The manifest finds every kind of damage."""

import json
import os
from pathlib import Path

import pytest

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint import manifest as mf
from megatron_hypenet.errors import CheckpointError
from tests.reseal import reseal


@pytest.fixture
def folder(tmp_path):
    with fmt.staged(tmp_path / "ck") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a.bin").write_bytes(b"12345")
        (temporary / "b.txt").write_text("b")
        mf.write_manifest(
            temporary, kind="student", extra={"stage": "distill", "hf_config": {"x": 1}, "note": 7}
        )
    return tmp_path / "ck"


def test_records_kind_stage_origin_and_versions(folder):
    manifest = mf.verify_files(folder, hashes=True)
    assert (manifest.kind, manifest.stage, manifest.hf_config, manifest.extra) == (
        "student",
        "distill",
        {"x": 1},
        {"note": 7},
    )
    assert set(manifest.files) == {"sub/a.bin", "b.txt"} and manifest.files["sub/a.bin"].bytes == 5
    assert {"python", "torch", "megatron-core"} <= set(manifest.versions)


def test_missing_short_and_changed_files(folder):
    (folder / "sub" / "a.bin").write_bytes(b"12346")
    mf.verify_files(folder)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        mf.verify_files(folder, hashes=True)
    (folder / "sub" / "a.bin").write_bytes(b"123")
    (folder / "b.txt").unlink()
    with pytest.raises(CheckpointError, match="2 of its files .*missing"):
        mf.verify_files(folder)


def test_uncommitted_unreadable_and_newer_formats(folder):
    reseal(folder, format_version=99)
    with pytest.raises(CheckpointError, match="format 99"):
        mf.read_manifest(folder)
    (folder / fmt.MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="differs from what COMMITTED says"):
        mf.read_manifest(folder)
    (folder / fmt.COMMITTED).write_text("")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        mf.read_manifest(folder)
    (folder / fmt.COMMITTED).unlink()
    with pytest.raises(CheckpointError, match="COMMITTED"):
        mf.read_manifest(folder)


@pytest.mark.parametrize("sizes", [[], [0, 1, 5], [100, 3000, 0, 2000, 1]])
def test_a_hashed_file_is_what_was_written_and_knows_it(tmp_path, monkeypatch, sizes):
    """Small pieces are hashed by the writer, and large ones by a second thread."""
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


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("files", []),
        ("files", {"a": 3}),
        ("files", {"a": {"bytes": -1, "sha256": "0" * 64}}),
        ("files", {"a": {"bytes": 1, "sha256": "x"}}),
        ("files", {"a": {"bytes": 1, "sha256": "0" * 64, "more": 1}}),
        ("files", {"../a": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"a": {"bytes": 1 << 63, "sha256": "0" * 64}}),
        ("format_version", "2"),
        ("format_version", 0),
        ("format_version", True),
        ("extra", None),
        ("hf_config", "x"),
        ("created", 5),
        ("versions", None),
        ("unknown", 1),
    ],
)
def test_a_manifest_of_other_types_is_refused_by_name(folder, entry, value):
    reseal(folder, **{entry: value})
    with pytest.raises(CheckpointError) as caught:
        mf.verify_files(folder)
    assert str(folder) in str(caught.value)
    assert entry in str(caught.value) or "inside" in str(caught.value)


def test_a_manifest_that_was_changed_is_refused(folder):
    text = (folder / fmt.MANIFEST).read_text()
    (folder / fmt.MANIFEST).write_text(text.replace("distill", "finetune"))
    with pytest.raises(CheckpointError, match="manifest.json: differs from what COMMITTED says"):
        mf.verify_files(folder)


@pytest.mark.parametrize("left", ["", "\n", "0123"])
def test_a_marker_that_was_cut_off_is_damage(folder, left):
    (folder / fmt.COMMITTED).write_text(left)
    with pytest.raises(CheckpointError, match="COMMITTED"):
        mf.verify_files(folder)


def test_a_checkpoint_of_an_older_version_loads_and_says_so(folder, caplog):
    record = json.loads((folder / fmt.MANIFEST).read_text())
    del record["extra"]["manifest_hash_in"]  # version 0.1 wrote the rest alike
    (folder / fmt.MANIFEST).write_text(json.dumps(record))
    (folder / fmt.COMMITTED).write_text("")
    with caplog.at_level("INFO"):
        mf.verify_files(folder, hashes=True)
        mf.verify_files(folder, hashes=True)
    assert caplog.text.count("was written by an older version") == 1


@pytest.mark.parametrize(
    "name",
    [
        "model.json",
        "weights/more.distcp",
        "weights/.metadata",
        "optimizer/common.pt",
        "tokenizer/chat_template.jinja",
        "rng.safetensors",
    ],
)
def test_a_file_that_would_be_read_and_is_not_listed_is_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    (folder / "notes.txt").write_text("nobody reads this")
    with pytest.raises(CheckpointError, match=f"{name}: manifest.json does not list it"):
        mf.verify_files(folder)


def test_a_file_that_nobody_reads_is_left_alone_and_named_once(folder, caplog):
    (folder / "weights").mkdir()
    for name in ("notes.txt", "weights/.nfs0001"):
        (folder / name).write_text("")
    for _ in range(2):
        mf.verify_files(folder, hashes=True)
    assert (
        caplog.text.count(
            "also holds notes.txt, weights/.nfs0001, which manifest.json does not list: not read"
        )
        == 1
    )


def test_parts_bound_what_is_checked(folder):
    (folder / "sub" / "a.bin").write_bytes(b"12346")
    mf.verify_files(folder, hashes=True, parts=("b.txt",))
    for parts in ((), ("sub",), ("sub/a.bin",)):
        with pytest.raises(CheckpointError, match="sha256 differs"):
            mf.verify_files(folder, hashes=True, parts=parts)


def test_a_file_is_hashed_once_until_it_changes(folder, monkeypatch):
    hashed = []
    hash_file = mf.hash_file
    monkeypatch.setattr(mf, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    for _ in range(3):
        mf.verify_files(folder, hashes=True)
    assert sorted(hashed) == ["a.bin", "b.txt"]
    (folder / "b.txt").write_text("c")
    with pytest.raises(CheckpointError, match="b.txt: sha256 differs"):
        mf.verify_files(folder, hashes=True)


def test_a_listed_file_is_read_as_it_was_written(folder):
    assert mf.read_listed(folder, "b.txt") == b"b"
    (folder / "b.txt").write_text("c")
    with pytest.raises(CheckpointError, match="b.txt: differs from what manifest.json says"):
        mf.read_listed(folder, "b.txt")
    (folder / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not list it"):
        mf.read_listed(folder, "model.json")
