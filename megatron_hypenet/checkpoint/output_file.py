"""A large new file that several threads write in blocks.

Blocks go to the disk past the page cache (O_DIRECT) where the file system can do that: copying them
into fresh pages of the cache costs more processor time than all checks of a conversion, and the
pages push out what other programs use. Elsewhere they are written as usual.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path

BLOCK_BYTES = 4096
"""Direct writes begin and end at multiples of this, in the file and in memory."""
_FLUSH_BYTES = 256 << 20
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate


def aligned_buffer(num_bytes: int) -> memoryview:
    """Return memory that can be written past the page cache."""
    return memoryview(mmap.mmap(-1, max(1, num_bytes)))[:num_bytes]


class OutputFile:
    """A new file of a known size. Used by several threads; `close` brings it to the disk."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Create the file and take its space on the disk. OSError when it exists, or when the disk
        is full."""
        flags = os.O_WRONLY | os.O_CLOEXEC
        self._plain = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = -1
        self._is_direct = False
        # the kernel lets one thread at a time write through the cache, and others spin meanwhile
        self._writing = threading.Lock()
        self._unflushed = 0
        self._flusher: threading.Thread | None = None
        try:
            if num_bytes:
                _reserve(self._plain, num_bytes)
            with contextlib.suppress(OSError):  # this file system has no direct writes
                self._direct = os.open(path, flags | os.O_DIRECT)
                self._is_direct = True
        except BaseException:
            self.abandon()
            raise

    def write(self, content: memoryview, place: int) -> None:
        """Write `content` to byte `place`. Direct where `place` is a multiple of BLOCK_BYTES and
        `content` lies in an `aligned_buffer` from its first byte on."""
        whole = content.nbytes // BLOCK_BYTES * BLOCK_BYTES
        if self._is_direct and place % BLOCK_BYTES == 0 and whole:
            try:
                _write_at(self._direct, content[:whole], place)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._is_direct = False  # the file system opens such files and cannot write them
            else:
                content, place = content[whole:], place + whole
        if content.nbytes:
            self._write_plain(content, place)

    def _write_plain(self, content: memoryview, place: int) -> None:
        with self._writing:
            _write_at(self._plain, content, place)
            self._unflushed += content.nbytes
            if self._unflushed < _FLUSH_BYTES or (self._flusher and self._flusher.is_alive()):
                return
            self._unflushed = 0
            # little is left at the end
            self._flusher = threading.Thread(target=self._flush, daemon=True)
            self._flusher.start()

    def _flush(self) -> None:
        with contextlib.suppress(OSError):  # the last fsync reports it
            os.fdatasync(self._plain)

    def close(self) -> None:
        """Bring the file to the disk and close it."""
        try:
            os.fsync(self._plain)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        if self._flusher is not None:
            self._flusher.join()
        os.close(self._plain)
        if self._direct >= 0:
            os.close(self._direct)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Take a file's space on the disk at once: a full disk is known before the work, and writing
    costs a fraction of what a growing file costs. Does nothing where the file system cannot."""
    # not os.posix_fallocate: where the file system cannot, it writes into every block
    failed = _fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes))
    if failed and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _write_at(descriptor: int, content: memoryview, place: int) -> None:
    while content.nbytes:
        written = os.pwrite(descriptor, content, place)
        place += written
        content = content[written:]
