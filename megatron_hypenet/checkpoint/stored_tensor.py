"""Read one tensor that torch.save wrote, from the bytes of a larger file: checked like all foreign
files, and read without unpickling.

torch's own reader resizes a storage to any strides that the file names, and hashes any keys that it
holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_hypenet.checkpoint.safety import MAX_MEMBER_BYTES, PICKLE
from megatron_hypenet.untrusted.files import read_at, read_large, shown
from megatron_hypenet.untrusted.pickles import Global, Record, Stored, read_pickle
from megatron_hypenet.untrusted.zips import StoredZip

_REBUILD = (
    Global("torch._utils", "_rebuild_tensor_v2"),
    Global("torch._utils", "_rebuild_parameter"),
)
_ORDERED = Global("collections", "OrderedDict")
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LATER_DTYPES = ("float8_e4m3fn", "float8_e5m2")
"""Dtypes without a storage class: torch writes an UntypedStorage, and the dtype beside it
(_rebuild_tensor_v3)."""
_REBUILD_V3 = Global("torch._utils", "_rebuild_tensor_v3")
_UNTYPED = Global("torch.storage", "UntypedStorage")
_ALLOWED = {
    *_REBUILD,
    _REBUILD_V3,
    _UNTYPED,
    _ORDERED,
    *(Global("torch", name) for name in (*_STORAGES, *_LATER_DTYPES)),
}


@dataclass(frozen=True, slots=True)
class Located:
    """The place of a stored tensor's values in its file."""

    first: int
    """First byte of its storage."""
    num_bytes: int
    """Size of the storage."""
    offset: int
    """Number of values in the storage before the tensor's first."""
    stride: tuple[int, ...]
    contiguous: bool
    """Whether the values lie one behind the other in their order."""


def locate_tensor(
    path: Path,
    stream: BinaryIO,
    start: int,
    length: int,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Located:
    """Find the values of the tensor in `length` bytes from `start` of the open file `path`, which
    must have this shape and dtype.

    CheckpointError when the bytes are damaged, refer to anything but a plain tensor, or hold a
    tensor of another shape or dtype.
    """
    archive = StoredZip(PICKLE, path, stream, start, length)
    root = next(
        (name.removesuffix("data.pkl") for name in archive.names() if name.endswith("/data.pkl")),
        "",
    )
    payload = archive.read(f"{root}data.pkl", MAX_MEMBER_BYTES)
    archive.place(f"{root}version")  # without it torch's own reader takes no file
    found = read_pickle(
        PICKLE,
        path,
        payload,
        allows=_ALLOWED.__contains__,
        allows_call=_plain_call,
        forbidden="and a tensor needs no such thing",
    )
    key, stored, offset, size, stride, count = _described(path, start, found)
    if size != shape or stored != dtype:
        PICKLE.refuse(
            path,
            f"at byte {start:,} lies a {stored} tensor {list(size)[:8]}, the index says {dtype} "
            f"{list(shape)}",
        )
    first, num_bytes = archive.place(f"{root}data/{key}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if num_bytes != count * dtype.itemsize or (0 not in size and last >= count):
        PICKLE.refuse(
            path,
            f"at byte {start:,} lies a tensor {list(size)} whose {num_bytes:,} bytes do not hold "
            "it",
        )
    if f"{root}byteorder" in archive.names() and archive.read(f"{root}byteorder", 16) != b"little":
        PICKLE.refuse(path, "written on a big-endian machine, which is not supported")
    return Located(first, num_bytes, offset, stride, _is_contiguous(size, stride))


def read_values(
    path: Path,
    stream: BinaryIO,
    place: Located,
    first: int,
    target: Tensor,
    *,
    past_cache: bool = False,
) -> None:
    """Fill the contiguous `target` with the values of a contiguous stored tensor of its dtype, from
    the value number `first` on; CheckpointError when the file has become shorter. `past_cache`:
    what the page cache lacks is not put there, for a reader that no other process follows."""
    if not target.numel():
        return
    view = memoryview(target.reshape(-1).view(torch.uint8).numpy().data)
    at = place.first + (place.offset + first) * target.element_size()
    read = read_large if past_cache else read_at
    if read(stream.fileno(), view, at) != view.nbytes:
        PICKLE.refuse(path, "it ends too early")


def read_whole(
    path: Path, stream: BinaryIO, place: Located, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return a stored tensor of any strides, on the CPU; CheckpointError when the file has become
    shorter."""
    if not place.num_bytes:
        return torch.empty(shape, dtype=dtype)
    content = bytearray(place.num_bytes)
    if read_at(stream.fileno(), memoryview(content), place.first) != place.num_bytes:
        PICKLE.refuse(path, "it ends too early")
    return torch.frombuffer(content, dtype=dtype).as_strided(shape, place.stride, place.offset)


def _is_contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for n, found in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and found != step:
            return False
        step *= n
    return True


def _plain_call(what: Global, args: tuple[Any, ...]) -> bool:
    return what in (*_REBUILD, _REBUILD_V3) or (what == _ORDERED and args == ())


def _described(
    path: Path, start: int, found: Any
) -> tuple[str, torch.dtype, int, tuple[int, ...], tuple[int, ...], int]:
    """Return (name of the storage, dtype, offset in it, shape, strides, values in it) of a pickled
    tensor."""
    if isinstance(found, Record) and found.what == _REBUILD[1] and found.args:
        found = found.args[0]  # a Parameter, whose first argument is its tensor
    if (
        isinstance(found, Record)
        and found.what in (_REBUILD[0], _REBUILD_V3)
        and len(found.args) >= 6
        and isinstance(found.args[0], Stored)
    ):
        key = found.args[0].key
        (offset, size, stride) = found.args[1:4]
        if (
            isinstance(key, tuple)
            and len(key) == 5
            and key[0] == "storage"
            and isinstance(key[1], Global)
            and isinstance(key[2], str)
        ):
            dtype = _STORAGES.get(key[1].name)
            count = key[4]
            if (
                found.what == _REBUILD_V3
                and key[1] == _UNTYPED
                and len(found.args) >= 7
                and isinstance(found.args[6], Global)
            ):
                dtype = getattr(torch, found.args[6].name)
            if (
                dtype is not None
                and _counts((offset, count))
                and _counts(size)
                and _counts(stride)
                and len(size) == len(stride) <= 16
            ):
                return key[2], dtype, offset, size, stride, count
    what = str(found.what) if isinstance(found, Record) else type(found).__name__
    PICKLE.refuse(path, f"at byte {start:,} lies no plain tensor ({shown(what, 80)})")


def _counts(value: Any) -> bool:
    """Return whether this is a tuple of whole numbers from 0 to 2**60."""
    return isinstance(value, tuple) and all(
        type(number) is int and 0 <= number <= 1 << 60 for number in value
    )
