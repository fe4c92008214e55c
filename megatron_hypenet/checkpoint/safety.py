"""The names to which pickles of a sharded folder may refer. They are read without being unpickled
(untrusted/pickles.py), so nothing in them runs.

`common.pt` is never used: it is scanned, because Megatron's own loader would unpickle it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.pickles import Global, read_pickle
from megatron_hypenet.untrusted.zips import StoredZip

PICKLE = FileKind(
    error=CheckpointError,
    advice="the checkpoint is damaged, restore it or use another one",
    max_bytes=64 << 20,
)
"""The pickles of a checkpoint, and the files that hold them."""
MAX_MEMBER_BYTES = 1 << 20
"""Largest accepted pickle inside a zip file: pickles of tensors have some hundred bytes."""

_FORBIDDEN = (
    "which a checkpoint has no use for: it may run foreign code, so nothing was loaded. "
    "Use a checkpoint from a source you trust, or convert the weights from safetensors"
)

_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "float8_e4m3fn",
    "float8_e5m2",
)
_METADATA_CLASSES = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_PLANNER_CLASSES = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
_ENUMERATIONS = {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): (
        "TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT",
    ),
    ("torch.distributed.checkpoint.planner", "WriteItemType"): ("TENSOR", "SHARD", "BYTE_IO"),
}  # fmt: skip
_GETATTR = Global("builtins", "getattr")

ALLOWED_GLOBALS = frozenset(
    [("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES]
    + [("torch.distributed.checkpoint.planner", name) for name in _PLANNER_CLASSES]
    + [
        ("torch.distributed.checkpoint.filesystem", name)
        for name in ("_StorageInfo", "_StoragePrefix")
    ]
    + [("torch", name) for name in (*_DTYPES, "Size", "strided")]
    + [
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("builtins", "getattr"),
    ]
    + [("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath")]
)
"""(module, name) pairs a checkpoint's pickles may refer to: data classes, dtypes and containers,
nothing with an effect when called."""


def read_plain(path: Path, payload: bytes) -> Any:
    """Return the inert value of the pickle `payload` of the file `path`; CheckpointError for a
    forbidden global or a damaged pickle."""
    return read_pickle(
        PICKLE, path, payload, allows=_allows, allows_call=_allows_call, forbidden=_FORBIDDEN
    )


def check_common(path: Path) -> None:
    """Scan a `common.pt` (torch zip file); CheckpointError if it refers to anything outside the
    allow-list, or is no such file."""
    with PICKLE.open(path) as stream:
        archive = StoredZip(PICKLE, path, stream, 0, os.fstat(stream.fileno()).st_size)
        names = archive.names()
        for name in names:
            if name.endswith(".pkl"):
                read_plain(path, archive.read(name, MAX_MEMBER_BYTES))
        if not any(name.endswith("/version") for name in names):
            PICKLE.refuse(path, "it has no member 'version', so torch did not write it whole")


def _allows(found: Global) -> bool:
    return (found.module, found.name) in ALLOWED_GLOBALS


def _allows_call(what: Global, args: tuple[Any, ...]) -> bool:
    """Return whether a pickle may ask for this call: getattr only as Python 3.11.0 to 3.11.3
    (Debian 12's) pickle members of enumerations."""
    if what != _GETATTR:
        return True
    if len(args) != 2 or not isinstance(args[0], Global) or not isinstance(args[1], str):
        return False
    return args[1] in _ENUMERATIONS.get((args[0].module, args[0].name), ())
