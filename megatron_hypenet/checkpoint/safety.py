"""Refuse pickles that could run code. `.metadata` of a sharded folder is a pickle; it is read with an allow-list of plain classes.

Tensor payloads are read with `torch.load(weights_only=True)`; `common.pt` is never read, only scanned, because Megatron's own
loader would open it.
"""

from __future__ import annotations

import enum
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from megatron_hypenet.errors import CheckpointError

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2")
_METADATA_CLASSES = (
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
    "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_PLANNER_CLASSES = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")

ALLOWED_GLOBALS = frozenset(
    [("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES]
    + [("torch.distributed.checkpoint.planner", name) for name in _PLANNER_CLASSES]
    + [("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")]
    + [("torch", name) for name in (*_DTYPES, "Size", "strided")]
    + [("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set")]
    + [("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath")]
)
"""(module, name) pairs a checkpoint's pickles may refer to: data classes, dtypes and containers; nothing that acts when called."""


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves only ALLOWED_GLOBALS; every other global is refused before anything is called."""

    def __init__(self, stream: io.BytesIO, origin: Path) -> None:
        super().__init__(stream)
        self.origin = origin

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._enum_member
        if (module, name) not in ALLOWED_GLOBALS:
            raise self._refusal(f"{module}.{name}")
        return super().find_class(module, name)

    def _enum_member(self, kind: Any, name: Any) -> enum.Enum:
        """Stands in for getattr, with which Python 3.11.0 to 3.11.3 (Debian 12's) pickle the members of enumerations, and only those."""
        if not isinstance(kind, enum.EnumMeta) or not isinstance(name, str) or name not in kind.__members__:
            raise self._refusal(f"builtins.getattr({kind!r}, {name!r})")
        member: enum.Enum = kind.__members__[name]
        return member

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.origin} refers to {what}, which a checkpoint has no use for: it may run foreign code, so nothing was loaded. "
            "Use a checkpoint from a source you trust, or convert the weights from safetensors"
        )


def load_restricted(path: Path) -> Any:
    """Unpickle `path` under the allow-list; CheckpointError for a forbidden global or a damaged file."""
    return _load(path.read_bytes(), path)


def check_common(path: Path) -> None:
    """Scan a `common.pt` (torch zip file); CheckpointError if it refers to anything outside the allow-list."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    _load(archive.read(name), path)
    except zipfile.BadZipFile:
        _load(path.read_bytes(), path)


def _load(payload: bytes, path: Path) -> Any:
    try:
        return _RestrictedUnpickler(io.BytesIO(payload), path).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}; restore it or use another checkpoint") from error
