"""Open text files, compressed ones too, as streams of bytes; damage is one error that names the
file and the last line that could be read."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from megatron_hypenet.data.sources import SourceFile
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import FileKind, reason_of, shown

_READ = 1 << 20
_TEXT = FileKind(error=DataError, advice="name a file that can be read")


class CutOff(Exception):
    """A compressed file that ends before its content does, or is damaged; it becomes a DataError
    where the place is known."""


@contextmanager
def open_bytes(file: SourceFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield (the content, unpacked; the file on the disk, whose position tells how much was
    read)."""
    raw = _TEXT.open(file.path)
    with raw:
        if file.codec == ".gz":
            yield (
                cast(BinaryIO, io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw)), _READ)),
                raw,
            )
        elif file.codec == ".zst":
            yield cast(BinaryIO, io.BufferedReader(_Zstandard(raw), _READ)), raw
        else:
            yield raw, raw


@contextmanager
def damage_named(file: SourceFile, items: Callable[[], int]) -> Iterator[None]:
    """Turn errors of reading and unpacking into a DataError; `items` says how many lines or rows
    were read before."""
    unit = "line" if file.kind in (".txt", ".jsonl") else "row"
    try:
        yield
    except (CutOff, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file.path}: cut off or damaged behind {unit} {items()}: {shown(reason_of(error))}; "
            "fetch the file again"
        ) from None
    except OSError as error:
        raise DataError(
            f"{file.path}: cannot be read behind {unit} {items()}: {reason_of(error)}; "
            "name a file that can be read"
        ) from error


class _Zstandard(io.RawIOBase):
    """Unpacks zstd frames one after the other. The library's own reader takes a file that was cut
    off for a short one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._ready = b""
        self._packed = b""
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True: forwards, by reading."""
        return True

    def tell(self) -> int:
        """Return the number of bytes of the content that were read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read and drop what lies before `offset`, which is counted from the start."""
        if whence != io.SEEK_SET or offset < self._position:
            raise io.UnsupportedOperation("a zstd stream is read forwards")
        while self._position < offset:
            if not self._take(min(_READ, offset - self._position)):
                break
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with up to its length; 0 at the end."""
        content = self._take(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _take(self, count: int) -> bytes:
        while not self._ready and self._fill():
            pass
        content = self._ready[:count]
        self._ready = self._ready[count:]
        self._position += len(content)
        return content

    def _fill(self) -> bool:
        """Unpack some more; False at the end of the file."""
        if not self._packed:
            self._packed = self._raw.read(1 << 17)
        if not self._packed:
            if self._frame is not None:
                raise CutOff("the file ends inside a frame")
            return False
        if self._frame is None:
            self._frame = self._unpacker.decompressobj()
        try:
            self._ready = self._frame.decompress(self._packed)
        except self._error as error:
            raise CutOff(str(error)) from None
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = None
        return True
