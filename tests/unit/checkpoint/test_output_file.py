"""Files are the same with and without the page cache."""

import errno
import fcntl
import os

import pytest

from megatron_hypenet.checkpoint.output_file import BLOCK_BYTES, OutputFile, aligned_buffer

CONTENT = os.urandom(100_001)


@pytest.mark.parametrize("refuses", [False, True])
def test_blocks_go_past_the_page_cache_where_that_can_be_done(tmp_path, monkeypatch, refuses):
    written = []
    write = os.pwrite

    def pwrite(descriptor, data, place):
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if direct and refuses:
            raise OSError(errno.EINVAL, "not on this file system")
        written.append((direct, place, len(data)))
        return write(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    buffer = aligned_buffer(2 * BLOCK_BYTES)
    file = OutputFile(tmp_path / "a", len(CONTENT))
    for place in reversed(range(0, len(CONTENT), len(buffer))):
        part = CONTENT[place : place + len(buffer)]
        buffer[: len(part)] = part
        file.write(buffer[: len(part)], place)
    file.close()
    assert (tmp_path / "a").read_bytes() == CONTENT
    direct = [(place, size) for is_direct, place, size in written if is_direct]
    assert all(place % BLOCK_BYTES == size % BLOCK_BYTES == 0 for place, size in direct)
    opened = os.open(tmp_path / "b", os.O_CREAT)
    os.close(opened)
    if refuses or not can_be_direct(tmp_path / "b"):
        assert not direct
    else:  # all whole blocks
        assert sum(size for _, size in direct) == len(CONTENT) // BLOCK_BYTES * BLOCK_BYTES


def can_be_direct(path):
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "a").write_text("kept")
    with pytest.raises(FileExistsError):
        OutputFile(tmp_path / "a", 10)
    assert (tmp_path / "a").read_text() == "kept"


def test_a_failed_write_is_raised(tmp_path, monkeypatch):
    file = OutputFile(tmp_path / "a", 10)
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    with pytest.raises(OSError, match="bad"):
        file.write(memoryview(b"0123456789"), 0)
    file.abandon()
