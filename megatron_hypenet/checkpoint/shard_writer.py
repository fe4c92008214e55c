"""Write tensors in Megatron's sharded format, in three parts: plan together, write separately,
finish on the first process.

Megatron's own writer starts a manager and forks one process per file, which costs seconds per save
and leaves processes behind when a worker dies. Here each process writes one file by itself, from
any thread: planning and finishing are the only collectives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_hypenet.checkpoint.format import TENSORS_SUFFIX
from megatron_hypenet.checkpoint.manifest import FileEntry, HashedFile
from megatron_hypenet.checkpoint.shards import LazyTensor, Shard, StreamedTensor
from megatron_hypenet.checkpoint.stream import FilePlan, Section, Values, write_files
from megatron_hypenet.checkpoint.tensor_archive import MAX_BYTES, is_supported, tensor_archive
from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.parallel.agreement import agree, gather_to_first, is_first, rank

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan
    from torch.distributed.checkpoint.storage import WriteResult

# torch.distributed.checkpoint takes about a second to load: inside the functions that need it

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, slots=True)
class Written:
    """The record of what one process wrote into a sharded folder: the place of each piece, and its
    file's size and hash (no file when it owns no pieces)."""

    results: tuple[WriteResult, ...]
    file: FileEntry | None


class ShardWrite:
    """One process's part in writing a sharded folder.

    Building it plans the folder, together with all processes unless `alone`. `write` uses only this
    process's data, so it may run in another thread. `finish` turns what all processes wrote into a
    readable folder; the first process calls it.
    """

    def __init__(
        self,
        folder: Path,
        shards: Iterable[Shard],
        *,
        alone: bool = False,
        objects: Mapping[str, bytes] | None = None,
    ) -> None:
        """Raise CheckpointError on all processes when the shards of a key do not tile its global
        shape exactly once. `objects` are files of torch.save for what is no tensor, by key."""
        self.folder = folder
        self.name = self.name_of(0 if alone else rank())
        """This process's file."""
        self._shards: list[Shard] | None = list(shards)
        self._objects = dict(objects or {})
        plan = _plan(self._shards, self._objects)
        plans = [plan] if alone else gather_to_first(plan)
        self._metadata: Metadata | None = None
        failure: CheckpointError | None = None
        if alone or is_first():
            try:
                self._metadata = _global_metadata(plans)
            except Exception as error:  # any error: the other processes wait for the outcome
                failure = CheckpointError(f"cannot write {folder}: {error}")
                failure.__cause__ = error
        if alone and failure is not None:
            raise failure
        if not alone:
            agree(failure)

    @staticmethod
    def name_of(rank: int) -> str:
        """Return the one file that process `rank` writes into a folder, if it owns any piece."""
        return f"__{rank}_0{TENSORS_SUFFIX}"

    def write(self, *, cancelled: Callable[[], bool] = lambda: False) -> Written:
        """Write this process's pieces to disk, release each of them, and hash the file; call it
        once. InterruptedError when `cancelled`."""
        assert self._shards is not None, "the shards of a folder are written once"
        shards = self._shards
        self._shards = None
        shards.reverse()
        if not shards and not self._objects:
            return Written((), None)
        results = []
        with HashedFile(self.folder / self.name) as stream:
            while shards:
                if cancelled():
                    raise InterruptedError(f"the save into {self.folder} was given up")
                shard = shards.pop()
                start = stream.tell()
                torch.save(_compact(_data_of(shard)), stream)  # type: ignore[arg-type] # writes and flushes only
                length = stream.tell() - start
                results.append(_result(shard.key, shard.offset, self.name, start, length))
            for key, content in self._objects.items():
                results.append(_result(key, None, self.name, stream.tell(), len(content)))
                stream.write(content)
        return Written(tuple(results), stream.entry)

    def finish(self, written: Sequence[Written], common: Mapping[str, Any] | None = None) -> None:
        """Write the folder's index from what every process wrote, in the order of ranks, plus
        Megatron's two files, of which common.pt holds `common`."""
        assert self._metadata is not None, "only the first process has the plan of the whole folder"
        from torch.distributed import checkpoint as dcp

        class IndexWriter(dcp.FileSystemWriter):
            """torch's writer of `.metadata`, without the (temporary, absolute) folder name that it
            would record there."""

            def storage_meta(self) -> None:
                return None

        writer = IndexWriter(self.folder)
        writer.set_up_storage_writer(True)
        writer.finish(self._metadata, [list(one.results) for one in written])
        (self.folder / "metadata.json").write_text(json.dumps(BACKEND))
        # megatron-core <= 0.18 refuses to load without it
        torch.save(dict(common or {}), self.folder / "common.pt")


def write_shards(folder: Path, shards: Iterable[Shard]) -> dict[str, FileEntry]:
    """Write whole tensors or pieces into `folder` (created if needed) from this process alone;
    returns size and hash of the files with tensors, by name. Raises CheckpointError or OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = ShardWrite(folder, shards, alone=True)
    return _finished(plan, plan.write())


def stream_shards(
    folder: Path,
    tensors: Mapping[str, StreamedTensor],
    *,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, FileEntry]:
    """Write the same as `write_shards` in bounded memory, with several threads, from tensors that
    are produced in pieces; see `stream.write_files`."""
    shards = [Shard.whole(key, tensor) for key, tensor in tensors.items()]
    return stream_pieces(folder, shards, workers=workers, progress=progress)


def stream_pieces(
    folder: Path,
    shards: Sequence[Shard],
    *,
    objects: Mapping[str, bytes] | None = None,
    common: Mapping[str, Any] | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, FileEntry]:
    """Write pieces of tensors whose data are StreamedTensors, as `stream_shards` does whole ones,
    with `objects` as in `ShardWrite` and `common` as in `ShardWrite.finish`. CheckpointError when
    the pieces do not tile their tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = objects or {}
    tensors = [shard.data for shard in shards if isinstance(shard.data, StreamedTensor)]
    if len(tensors) < len(shards) or not all(map(_streams, tensors)):
        plan = ShardWrite(folder, shards, alone=True, objects=objects)
        return _finished(plan, plan.write(), common)
    file = folder / ShardWrite.name_of(0)
    with ThreadPoolExecutor(1, "loading") as loading:
        loading.submit(_load_planner)  # while most of the time is spent outside of Python
        places, entry = _stream(file, tensors, objects.values(), workers, progress)
    plan = ShardWrite(folder, shards, alone=True, objects=objects)
    keys = [(shard.key, shard.offset) for shard in shards] + [(key, None) for key in objects]
    results = [
        _result(key, offset, plan.name, *place)
        for (key, offset), place in zip(keys, places, strict=True)
    ]
    return _finished(plan, Written(tuple(results), entry), common)


def _load_planner() -> None:
    import torch.distributed.checkpoint.default_planner  # noqa: F401


def _stream(
    path: Path,
    tensors: Iterable[StreamedTensor],
    objects: Iterable[bytes],
    workers: int | None,
    progress: Callable[[str], None] | None,
) -> tuple[list[tuple[int, int]], FileEntry | None]:
    """Write what `ShardWrite.write` writes, to the byte; returns first byte and length of each
    tensor and object, and size and hash of the file."""
    sections: list[Section] = []
    places = []
    start = 0
    for tensor in tensors:
        archive = tensor_archive(tensor.shape, tensor.dtype)
        sections += [
            archive.head,
            Values(
                num_bytes=archive.num_bytes,
                unit=tensor.unit * tensor.dtype.itemsize,
                fill=tensor.fill,
                trailer=archive.tail,
                trailer_bytes=archive.tail_bytes,
            ),
        ]
        places.append((start, archive.length))
        start += archive.length
    for content in objects:
        sections.append(content)
        places.append((start, len(content)))
        start += len(content)
    plan = FilePlan(path, sections, hashed=True)
    (entry,) = write_files([plan], workers=workers, progress=progress)
    return places, entry


def _streams(tensor: StreamedTensor) -> bool:
    """Return whether the place of every byte of the tensor's archive is known beforehand."""
    num_bytes = tensor.num_values * tensor.dtype.itemsize
    return 0 < num_bytes <= MAX_BYTES and is_supported(tensor.dtype)


def _finished(
    plan: ShardWrite, written: Written, common: Mapping[str, Any] | None = None
) -> dict[str, FileEntry]:
    plan.finish([written], common)
    return {} if written.file is None else {plan.name: written.file}


def _result(
    key: str, offset: tuple[int, ...] | None, file: str, start: int, length: int
) -> WriteResult:
    """Return the place of a piece, or of an object, which has no offset."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.storage import WriteResult

    return WriteResult(MetadataIndex(key, offset), length, _StorageInfo(file, start, length))


def _plan(shards: Sequence[Shard], objects: Iterable[str] = ()) -> SavePlan:
    """Plan one write per shard and per object, of which `objects` are the keys; data is not
    read."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
    )
    from torch.distributed.checkpoint.planner import (
        SavePlan,
        TensorWriteData,
        WriteItem,
        WriteItemType,
    )

    items = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in objects]
    for shard in shards:
        chunk = ChunkStorageMetadata(
            offsets=torch.Size(shard.offset), sizes=torch.Size(shard.data.shape)
        )
        data = TensorWriteData(
            chunk=chunk,
            properties=TensorProperties(dtype=shard.data.dtype),
            size=torch.Size(shard.global_shape),
        )
        items.append(
            WriteItem(
                index=MetadataIndex(shard.key, shard.offset),
                type=WriteItemType.SHARD,
                tensor_data=data,
            )
        )
    return SavePlan(items=items)


def _global_metadata(plans: list[SavePlan]) -> Metadata:
    """Return the index of all plans, without places on disk; ValueError when pieces overlap, leave
    holes or are written twice."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    writers: dict[MetadataIndex, int] = {}
    for writer, plan in enumerate(plans):
        for item in plan.items:
            if item.index in writers:  # torch would silently keep one of them
                raise ValueError(
                    f"processes {writers[item.index]} and {writer} both write {item.index.fqn} at "
                    f"{item.index.offset}"
                )
            writers[item.index] = writer
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # checks bounds and overlap; coverage only across several processes
    metadata: Any = planner.create_global_plan(plans)[1]
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata) and sum(
            math.prod(c.sizes) for c in stored.chunks
        ) != math.prod(stored.size):
            raise ValueError(f"the shards of {key} do not tile its shape {tuple(stored.size)}")
    result: Metadata = metadata
    return result


def _data_of(shard: Shard) -> Tensor:
    data = shard.data
    if isinstance(data, LazyTensor):
        data = data.load()
    elif isinstance(data, StreamedTensor):
        data = data.whole()
    if tuple(data.shape) != tuple(shard.data.shape) or data.dtype != shard.data.dtype:
        raise CheckpointError(
            f"{shard.key}: announced as {shard.data.dtype} {tuple(shard.data.shape)}, "
            f"got {data.dtype} {tuple(data.shape)}"
        )
    return data.detach().contiguous()


def _compact(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU in a storage of its own, because torch.save writes whole
    storages."""
    tensor = tensor.detach().cpu()
    return (
        tensor.clone()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        else tensor
    )
