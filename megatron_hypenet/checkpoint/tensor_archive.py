"""The bytes that torch.save writes for one tensor, known before its values are: so values can go
straight to their place in a file, in pieces and by several threads.

torch.save writes a zip file of stored members. Which members there are, and the content of the
small ones, is taken from what the installed torch writes for a tensor of one value; `is_supported`
compares the outcome with torch.save.
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import torch

MAX_BYTES = (1 << 32) - (1 << 20)
"""Largest size in bytes of a tensor that is laid out here: zip files note larger ones in another
way."""

_ALIGNMENT = 64
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_DESCRIPTOR = struct.Struct("<4sIII")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_FLAGS = 0x0808
"""Sizes and checksum follow the content; names are UTF-8."""
_DATA = "archive/data/0"
_PICKLE = "archive/data.pkl"
_IDENTITY = "archive/.data/serialization_id"
_POLYNOMIAL = 0xEDB88320
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class TensorArchive:
    """What lies around the values of one tensor in its archive."""

    head: bytes
    """The bytes before the values."""
    num_bytes: int
    """Size of the values."""
    _before: tuple[tuple[str, bytes], ...]
    _after: tuple[tuple[str, bytes], ...]

    @property
    def length(self) -> int:
        """Return the size of the whole archive in bytes."""
        return len(self.head) + self.num_bytes + self.tail_bytes

    @property
    def tail_bytes(self) -> int:
        """Return the number of bytes behind the values."""
        return len(self.tail(0))

    def tail(self, crc: int) -> bytes:
        """Return the bytes behind the values, whose crc32 is `crc`."""
        out = _Zip()
        for name, content in self._before:
            out.add(name, content)
        out.add(_DATA, None, num_bytes=self.num_bytes, crc=crc)
        start = len(out.written) - _DESCRIPTOR.size
        for name, content in self._after:
            if name == _IDENTITY:
                content = content[:20] + f"{out.combined_crc:020d}".encode()
            out.add(name, content)
        return bytes(out.written[start:]) + out.directory()


def tensor_archive(shape: tuple[int, ...], dtype: torch.dtype) -> TensorArchive:
    """Return the archive of a contiguous tensor of this shape, which has at least one value and at
    most MAX_BYTES."""
    before, after = _members(dtype)
    # nothing is written into it, so it takes no memory
    tensor = torch.empty(shape, dtype=dtype)
    pickled = tuple(
        (name, _pickled(tensor) if name == _PICKLE else content) for name, content in before
    )
    out = _Zip()
    for name, content in pickled:
        out.add(name, content)
    out.open(_DATA)
    num_bytes = tensor.numel() * dtype.itemsize
    return TensorArchive(bytes(out.written), num_bytes, pickled, after)


@functools.cache
def is_supported(dtype: torch.dtype) -> bool:
    """Return whether the installed torch.save writes what this module expects, for tensors of
    `dtype`."""
    tensor = torch.zeros(3, 1, dtype=dtype)
    stream = io.BytesIO()
    torch.save(tensor, stream)
    values = bytes(tensor.numel() * dtype.itemsize)
    try:
        archive = tensor_archive((3, 1), dtype)
    except (KeyError, ValueError):  # it has no such members
        return False
    return archive.head + values + archive.tail(zlib.crc32(values)) == stream.getvalue()


def combined_crc(first: int, second: int, num_bytes: int) -> int:
    """Return the crc32 of two byte strings, one behind the other, from the crc32 of each and the
    second's length (zlib's crc32_combine)."""
    return _times(_shift(num_bytes), first) ^ second


@functools.lru_cache(maxsize=256)
def _shift(num_bytes: int) -> int:
    """Return x ** (8 * num_bytes) modulo the polynomial of crc32."""
    power = 1 << 31
    square = 1 << 30
    bits = 8 * num_bytes
    while bits:
        if bits & 1:
            power = _times(square, power)
        square = _times(square, square)
        bits >>= 1
    return power


def _times(a: int, b: int) -> int:
    """Multiply two polynomials modulo the polynomial of crc32; bit 31 is the constant term."""
    product = 0
    place = 1 << 31
    while a:
        if a & place:
            product ^= b
            a ^= place
        place >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


Members = tuple[tuple[str, bytes], ...]


@functools.cache
def _members(dtype: torch.dtype) -> tuple[Members, Members]:
    """Return name and content of torch.save's members before and behind the values, in their
    order."""
    stream = io.BytesIO()
    torch.save(torch.zeros(1, dtype=dtype), stream)
    with zipfile.ZipFile(stream) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        found = [(info.filename, archive.read(info)) for info in infos]
    at = [name for name, _ in found].index(_DATA)
    return tuple(found[:at]), tuple(found[at + 1 :])


def _pickled(tensor: torch.Tensor) -> bytes:
    """Return what torch.save writes as data.pkl."""
    stream = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, torch.storage.TypedStorage):
                kind = getattr(torch, value._pickle_storage_type())
                return ("storage", kind, "0", "cpu", value._size())
            return None

    pickler = Pickler(stream, protocol=2)
    pickler.dump(tensor)
    return stream.getvalue()


class _Zip:
    """A zip file as torch writes it: stored members whose content is aligned."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.size = 0
        """Bytes so far, with those of members whose content is elsewhere."""
        self.combined_crc = 0
        self._entries: list[tuple[str, int, int, int]] = []

    def open(self, name: str) -> None:
        """Write a member's header."""
        start = self.size + _LOCAL.size + len(name) + 4
        padding = -start % _ALIGNMENT
        self._write(
            _LOCAL.pack(b"PK\x03\x04", 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(name), 4 + padding)
            + name.encode()
            + b"FB"
            + padding.to_bytes(2, "little")
            + b"Z" * padding
        )

    def add(self, name: str, content: bytes | None, *, num_bytes: int = 0, crc: int = 0) -> None:
        """Write a member; without content only what is around its `num_bytes` bytes."""
        start = self.size
        self.open(name)
        if content is not None:
            num_bytes = len(content)
            crc = zlib.crc32(content)
            self._write(content)
        else:
            self.size += num_bytes
        self._write(_DESCRIPTOR.pack(b"PK\x07\x08", crc, num_bytes, num_bytes))
        self._entries.append((name, start, num_bytes, crc))
        mixed = crc + 0x9E3779B9 + (self.combined_crc << 6) + (self.combined_crc >> 2)
        self.combined_crc = (self.combined_crc ^ mixed) & _MASK

    def directory(self) -> bytes:
        """Return the table of members, which ends the file."""
        table = b"".join(
            _CENTRAL.pack(
                b"PK\x01\x02", 0, 0, _FLAGS, 0, 0, 0, crc, num_bytes, num_bytes,
                len(name), 0, 0, 0, 0, 0, start,
            )
            + name.encode()
            for name, start, num_bytes, crc in self._entries
        )  # fmt: skip
        count = len(self._entries)
        end = self.size + len(table)
        return (
            table
            + _END_64.pack(b"PK\x06\x06", 44, 798, 45, 0, 0, count, count, len(table), self.size)
            + _LOCATOR.pack(b"PK\x06\x07", 0, end, 1)
            + _END.pack(b"PK\x05\x06", 0, 0, count, count, len(table), self.size, 0)
        )

    def _write(self, content: bytes) -> None:
        self.written += content
        self.size += len(content)
