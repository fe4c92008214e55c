import fcntl
import os

import pytest
from pydantic import TypeAdapter, ValidationError

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.untrusted import files
from megatron_hypenet.untrusted.files import (
    FileKind,
    findings,
    has_entry,
    inside,
    is_inside,
    read_large,
    reason_of,
    shown,
)

KIND = FileKind(error=ConversionError, advice="fetch it again", max_bytes=10)


def refused(call, *words):
    with pytest.raises(ConversionError) as caught:
        call()
    for word in (*words, "fetch it again"):
        assert word in str(caught.value)


def test_text_within_the_limit_is_returned_without_its_byte_order_mark(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").write_bytes("\ufeffä".encode())
    assert KIND.read_text(tmp_path / "a") == "0123456789"
    assert KIND.read_text(tmp_path / "b") == "ä"


def test_a_larger_file_is_refused_without_being_read(tmp_path):
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(1 << 40)  # sparse
    refused(lambda: KIND.read_bytes(tmp_path / "large"), "large: larger than", "limit")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: KIND.read_bytes(tmp_path / "pipe"), "pipe: not a regular file")
    refused(lambda: KIND.read_bytes(tmp_path), "cannot be read: Is a directory")
    with pytest.raises(ConversionError, match="not a regular file"):
        KIND.read_bytes(__import__("pathlib").Path("/dev/zero"))


def test_missing_files_and_impossible_names_are_refused(tmp_path):
    refused(lambda: KIND.read_bytes(tmp_path / "none"), "none: no such file")
    refused(lambda: KIND.read_bytes(tmp_path / "a\0b"), "a\\x00b: cannot be read")
    refused(lambda: KIND.read_bytes(tmp_path / ("a" * 300)), "File name too long")


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"ab\xff", "byte 2 is 0xff"), (b"ab\0", "NUL character (at character 2)")],
)
def test_bytes_that_are_no_text_are_refused(tmp_path, content, word):
    (tmp_path / "x").write_bytes(content)
    refused(lambda: KIND.read_text(tmp_path / "x"), word)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "", 3, None, "a\0b", "a\nb", "..\\x"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ConversionError, match=r"no file name|not inside the folder"):
        inside(tmp_path, name, KIND)


@pytest.mark.parametrize("name", ["x" * 256, "a/" * 2500 + "b"])
def test_a_name_longer_than_file_systems_allow_is_refused_in_few_words(tmp_path, name):
    with pytest.raises(ConversionError, match="too long") as caught:
        inside(tmp_path, name, KIND)
    assert len(str(caught.value)) < 500


def test_symbolic_links_count_where_they_lead(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("x")
    (folder / "near").symlink_to("file")
    (folder / "far").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    assert inside(folder, "near", KIND) == folder / "near"
    assert inside(folder, "sub/new", KIND) == folder / "sub" / "new"
    refused(lambda: inside(folder, "far", KIND), "symbolic link that leads out of the folder")
    refused(lambda: inside(folder, "far/x", KIND), "symbolic link that leads out of the folder")
    refused(lambda: inside(folder, "loop", KIND), "symbolic link that leads in a circle")
    assert not is_inside(folder, folder / "far")


def test_the_cache_of_hugging_face_links_to_its_blobs(tmp_path):
    snapshot = tmp_path / "models--a" / "snapshots" / "abc"
    blobs = tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "far").symlink_to(tmp_path)
    assert inside(snapshot, "config.json", KIND) == snapshot / "config.json"
    refused(lambda: inside(snapshot, "far", KIND), "symbolic link that leads out of the folder")


def test_messages_stay_one_short_printable_line():
    assert shown("a\nb\x1b[31m\ud800") == "a\\nb\\x1b[31m\\ud800"
    assert shown("x" * 500, 10) == "xxxxxxx..."
    assert reason_of(ValueError("first\nsecond")) == "first"
    assert reason_of(ValueError()) == "ValueError"
    assert reason_of(FileNotFoundError(2, "No such file", "/x")) == "No such file"


def test_a_name_that_cannot_be_read_is_not_absent(tmp_path):
    """An optional file counts as absent only where nothing has its name."""
    path = tmp_path / "x"
    assert not has_entry(path)
    for make in (
        path.mkdir,
        path.touch,
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to("x"),
    ):
        make()
        assert has_entry(path)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("place", "count"), [(0, 100), (4095, 9000), (8191, 50_000), (49_000, 9)])
def test_a_part_of_a_large_file_is_the_same_with_and_without_the_page_cache(
    tmp_path, monkeypatch, cached, place, count
):
    monkeypatch.setattr(files, "_DIRECT_BYTES", 3 * 4096)
    content = os.urandom(50_000)
    with (tmp_path / "a").open("w+b") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        if not cached:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        flags = fcntl.fcntl(stream.fileno(), fcntl.F_GETFL)
        target = memoryview(bytearray(count))
        want = content[place : place + count]
        assert read_large(stream.fileno(), target, place) == len(want)
        assert target[: len(want)] == want
        assert fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) == flags


def test_a_part_is_read_where_nothing_can_be_read_directly(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"0123456789")
    monkeypatch.setattr(files, "_cached", lambda *_: 0)
    monkeypatch.setattr(files, "_direct", lambda *_: 0)
    target = memoryview(bytearray(5))
    with (tmp_path / "a").open("rb") as stream:
        assert read_large(stream.fileno(), target, 3) == 5
    assert bytes(target) == b"34567"


def test_findings_of_a_validation_are_bounded_lines():
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(dict[str, int]).validate_python({"a" * 999: "b", "c": "d"})
    lines = findings(raised.value, whole="model")
    assert len(lines) == 2 and all(len(line) < 700 for line in lines)
    assert lines[1].startswith("c: should be a valid integer, unable to parse")
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(int).validate_python("x\ny")
    assert findings(raised.value, whole="model")[0].startswith("model: should be")
