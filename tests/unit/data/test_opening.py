"""Streams of compressed files; a file that was cut off is an error, not a short text."""

import gzip

import pytest
import zstandard

from megatron_hypenet.data.opening import damage_named, open_bytes
from megatron_hypenet.data.sources import find_files
from megatron_hypenet.errors import DataError

TEXT = b"".join(b"line %d of a text\n" % number for number in range(20_000))


def packed(path):
    half = len(TEXT) // 2
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(TEXT[:half]) + gzip.compress(TEXT[half:]))
    elif path.suffix == ".zst":
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(TEXT[:half]) + compress(TEXT[half:]))
    else:
        path.write_bytes(TEXT)
    return find_files(path).files[0]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_content_and_forward_seeks(tmp_path, name):
    file = packed(tmp_path / name)
    with open_bytes(file) as (stream, raw):
        assert stream.read() == TEXT and raw.tell() == file.size
    with open_bytes(file) as (stream, _):
        stream.seek(123_456)
        assert stream.readline() == TEXT[123_456:].split(b"\n")[0] + b"\n"
        assert stream.read(10) == TEXT[TEXT.index(b"\n", 123_456) + 1 :][:10]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_a_file_that_was_cut_off(tmp_path, name):
    file = packed(tmp_path / name)
    whole = file.path.read_bytes()
    for content in (whole[:-30], whole[: len(whole) // 3], whole[:-9] + bytes(9)):
        file.path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: cut off or damaged behind line 7: "):
            with damage_named(file, lambda: 7), open_bytes(file) as (stream, _):
                stream.read()


def test_a_file_that_cannot_be_read(tmp_path):
    file = packed(tmp_path / "a.txt")
    with pytest.raises(DataError, match="cannot be read behind line 3: Input/output error"):
        with damage_named(file, lambda: 3):
            raise OSError(5, "Input/output error")
