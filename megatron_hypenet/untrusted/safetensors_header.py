"""Read the header of a foreign safetensors file: names, dtypes, shapes and places, checked against
the file's size.

The file is: eight bytes with the header's length (little endian), the header (a JSON object), the
tensors' bytes one after another.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.untrusted.files import FileKind, reason_of, shown
from megatron_hypenet.untrusted.json_text import parse_json

BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I64": 64,
    "U64": 64,
    "I32": 32,
    "U32": 32,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
}
"""safetensors' names of dtypes and the size of one value in bits."""
MAX_DIMENSIONS = 16
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What the header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Place of its first byte in the file."""


def read_header(kind: FileKind, path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of the safetensors file `path` by name, in the order of their bytes.

    Raise `kind`'s error unless the file is regular and whole, its header is within the kind's
    limits, and every tensor's bytes follow the previous one's and are as many as its dtype and
    shape need, up to the file's end.
    """
    with kind.open(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            kind.refuse(
                path,
                f"not a complete safetensors file ({size:,} bytes, of which the header would take "
                f"{length:,})",
            )
        if length > kind.max_bytes:
            kind.refuse(path, f"its header has {length:,} bytes, the limit is {kind.max_bytes:,}")
        try:
            content = stream.read(length)
        except OSError as error:
            kind.refuse(path, f"cannot be read: {reason_of(error)}")
    header = parse_json(kind, path, kind.decode(path, content))
    if not isinstance(header, dict):
        kind.refuse(path, "not a safetensors file: its header is no JSON object")
    notes = header.pop(_METADATA, None)
    notes = {} if notes is None else notes
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        kind.refuse(path, f"its {_METADATA} is no object of texts")
    found = sorted(
        (_entry(kind, path, name, entry) for name, entry in header.items()), key=lambda row: row[:2]
    )
    end = 0
    for start, stop, name, _ in found:
        if start != end:
            kind.refuse(
                path,
                f"damaged: the bytes of {shown(name)} start at {start}, those before end at {end}",
            )
        end = stop
    if end != size - 8 - length:
        kind.refuse(
            path,
            f"not a complete safetensors file: the header describes {end:,} bytes of tensors, "
            f"it has {size - 8 - length:,}",
        )
    return {
        name: TensorHeader(dtype, shape, 8 + length + start)
        for start, _, name, (dtype, shape) in found
    }


def _entry(
    kind: FileKind, path: Path, name: str, entry: Any
) -> tuple[int, int, str, tuple[str, tuple[int, ...]]]:
    """Return (first byte, end, name, (dtype, shape)) of one entry of the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        kind.refuse(path, f"damaged: {shown(name)} has no dtype, shape and data_offsets, or more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        kind.refuse(
            path,
            f"{shown(name)} has the dtype {shown(repr(dtype), 40)}, which is none of safetensors",
        )
    if (
        not _counts(shape)
        or len(shape) > MAX_DIMENSIONS
        or not _counts(offsets)
        or len(offsets) != 2
    ):
        kind.refuse(
            path, f"damaged: the shape or the data_offsets of {shown(name)} are no lists of counts"
        )
    start, stop = offsets
    needed = math.prod(shape) * BITS[dtype]
    if needed != (stop - start) * 8:
        kind.refuse(
            path,
            f"damaged: {shown(name)} is {dtype} {shown(shape)}, which is not the {stop - start:,} "
            "bytes that it has",
        )
    return start, stop, name, (dtype, tuple(shape))


def _counts(value: Any) -> bool:
    """Return whether this is a list of whole numbers from 0 to 2**62."""
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number <= 1 << 62 for number in value
    )
