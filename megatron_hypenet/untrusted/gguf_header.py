"""Read the header of a foreign GGUF file: its settings, and the types, shapes and places of its
tensors, checked against the file's size.

The file is, little endian: the letters GGUF, a version, two counts; the settings, each a name, a
type and a value; the tensors' names, shapes, types and offsets; padding; the tensors' bytes.
Strings and arrays begin with a length of 64 bits, so a damaged one can ask for any amount of
memory: here every length is compared with what is left of the file before it is used. Source:
ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.untrusted.files import MIB, FileKind, reason_of, shown

MAX_HEADER = 64 * MIB
"""Largest accepted header; a vocabulary of 256,000 words with its merges takes about 12 MiB."""
MAX_DIMENSIONS = 4
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"

# the numbers of GGUF's types of values, with struct's letters
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """What the header says about one tensor."""

    type: int
    """GGML's number of the type that its blocks have."""
    shape: tuple[int, ...]
    """Rows first, as numpy and torch have it; the file's order is the reverse."""
    start: int
    """Place of its first byte in the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Settings by name (numbers, booleans, texts, or lists of one of them), and tensors by name."""

    settings: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(
    kind: FileKind, path: Path, block_sizes: Mapping[int, tuple[int, int]]
) -> GgufHeader:
    """Return the header of the GGUF file `path`.

    `block_sizes` gives, for GGML's number of each type that may occur, the values in a block and
    its bytes. Raise `kind`'s error unless the file is regular and whole, the header is within
    `MAX_HEADER` and the kind's `max_values`, no name occurs twice, and every tensor's bytes lie in
    the file, outside of the header and of every other tensor.
    """
    with kind.open(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            content = stream.read(min(size, MAX_HEADER))
        except OSError as error:
            kind.refuse(path, f"cannot be read: {reason_of(error)}")
    reader = _Reader(kind, path, content, whole=len(content) == size)
    if reader.take(4) != b"GGUF":
        kind.refuse(path, "not a GGUF file: it does not begin with these letters")
    version = reader.number("I")
    if version not in VERSIONS:
        kind.refuse(path, f"GGUF version {version}, or big endian; versions 2 and 3 are read")
    num_tensors, num_settings = reader.count(), reader.count()
    settings: dict[str, Any] = {}
    for _ in range(num_settings):
        reader.add(settings, reader.text(), reader.value)
    entries: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(num_tensors):
        reader.add(entries, reader.text(), reader.tensor)
    alignment = settings.get(ALIGNMENT, 32)
    if type(alignment) is not int or not 0 < alignment <= MIB or alignment & (alignment - 1):
        kind.refuse(path, f"{ALIGNMENT} is {shown(alignment, 40)}, not a power of two")
    first = -(-reader.place // alignment) * alignment
    return GgufHeader(settings, _placed(kind, path, entries, block_sizes, first, size))


def _placed(
    kind: FileKind,
    path: Path,
    entries: Mapping[str, tuple[int, tuple[int, ...], int]],
    block_sizes: Mapping[int, tuple[int, int]],
    first: int,
    size: int,
) -> dict[str, GgufTensor]:
    """Return the tensors with their places in a file of `size` bytes, whose data start at byte
    `first`."""
    tensors: dict[str, GgufTensor] = {}
    for name, (number, shape, offset) in entries.items():
        if number not in block_sizes:
            known = ", ".join(map(str, sorted(block_sizes)))
            kind.refuse(path, f"{shown(name, 80)} has the type {number}; known types: {known}")
        values, block_bytes = block_sizes[number]
        if not shape or shape[-1] % values:
            kind.refuse(
                path, f"damaged: {shown(name, 80)} is {shape}, which is no whole blocks of {values}"
            )
        num_bytes = math.prod(shape) // values * block_bytes
        tensors[name] = GgufTensor(number, shape, first + offset, num_bytes)
    end = first
    for name, tensor in sorted(tensors.items(), key=lambda row: row[1].start):
        if tensor.start < end:
            kind.refuse(
                path,
                f"damaged: the bytes of {shown(name, 80)} start at {tensor.start:,}, "
                f"those before end at {end:,}",
            )
        end = tensor.start + tensor.num_bytes
    if end > size:
        kind.refuse(path, f"cut off: its header describes {end:,} bytes, it has {size:,}")
    return tensors


class _Reader:
    """Takes values from the beginning of a file, one after the other."""

    def __init__(self, kind: FileKind, path: Path, content: bytes, *, whole: bool) -> None:
        self.place = 0
        self._kind, self._path, self._content, self._whole = kind, path, content, whole
        self._values = 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes; refuse the file where there are not so many."""
        if count > len(self._content) - self.place:
            if self._whole:
                self._kind.refuse(
                    self._path,
                    f"cut off or damaged: its header asks for {count:,} bytes from byte "
                    f"{self.place:,} on, the file has {len(self._content):,}",
                )
            self._kind.refuse(
                self._path, f"its header is larger than {MAX_HEADER // MIB} MiB, the limit"
            )
        self.place += count
        return self._content[self.place - count : self.place]

    def number(self, letter: str) -> Any:
        """Return the next number, whose type `letter` is struct's."""
        (found,) = struct.unpack(f"<{letter}", self.take(_bytes(letter)))
        return found

    def count(self) -> int:
        """Return the next count of values, which `max_values` and what is left of the file bound
        together with all counts before."""
        found: int = self.number("Q")
        self._values += found
        if self._values > self._kind.max_values:
            self._kind.refuse(self._path, f"holds more than {self._kind.max_values:,} values")
        return found

    def text(self) -> str:
        """Return the next string."""
        return self._kind.decode(self._path, self.take(self.number("Q")))

    def add(self, into: dict[str, Any], name: str, read: Any) -> None:
        """Put what `read()` returns under `name`; refuse a name that is there already."""
        if name in into:
            self._kind.refuse(self._path, f"damaged: {shown(name, 80)} occurs twice")
        into[name] = read()

    def value(self) -> Any:
        """Return the next setting: its type and its value."""
        number = self.number("I")
        if number != _ARRAY:
            return self._single(number)
        item, length = self.number("I"), self.count()
        if item in _SCALARS:
            letter = _SCALARS[item]
            return list(struct.unpack(f"<{length}{letter}", self.take(_bytes(letter) * length)))
        return [self._single(item) for _ in range(length)]

    def tensor(self) -> tuple[int, tuple[int, ...], int]:
        """Return the next tensor's type, shape (rows first) and offset behind the header."""
        dimensions = self.number("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            self._kind.refuse(self._path, f"damaged: a tensor of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return self.number("I"), shape, self.number("Q")

    def _single(self, number: int) -> Any:
        if number == _STRING:
            return self.text()
        if number not in _SCALARS:
            self._kind.refuse(self._path, f"a setting of type {number}, which is not read")
        return self.number(_SCALARS[number])


def _bytes(letter: str) -> int:
    return struct.calcsize(f"<{letter}")
