"""A Hugging Face model folder on disk: its safetensors, read lazily, and the small files beside the
weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.untrusted.files import FileKind, has_entry, inside, read_large, shown
from megatron_hypenet.untrusted.json_text import read_object
from megatron_hypenet.untrusted.safetensors_header import BITS, TensorHeader, read_header

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
"""Makes transformers load an adapter, and with it the base model that the adapter names."""
JSON = FileKind(error=ConversionError, advice="fetch the folder again")
"""The small JSON files of a folder."""
_WEIGHTS = FileKind(
    error=ConversionError, advice="the download or copy was cut off or is damaged, fetch it again"
)

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""safetensors' names of the supported dtypes of weights, and torch's dtypes."""

_ORDER = ("F64", "F32", "BF16", "F16")


class HfWeights(Mapping[str, "Tensor"]):
    """The tensors of a folder by name; each access reads that tensor from its file. Opening reads
    the headers only, without torch.

    ConversionError when a file is missing, truncated or not safetensors, or when the index and the
    files disagree."""

    def __init__(self, hf_dir: Path) -> None:
        """Open `hf_dir`: folder with model.safetensors, or model.safetensors.index.json and the
        files that it names."""
        self.hf_dir = hf_dir
        self._file_of: dict[str, Path] = {}
        self._headers: dict[str, TensorHeader] = {}
        self._files: list[Path] = []
        index = self._read_index()
        for file in sorted(set(index.values())) if index else [SINGLE]:
            self._open(file)
        wrong = sorted(
            name for name, file in (index or {}).items() if self._file_of.get(name) != hf_dir / file
        )
        if wrong:
            raise ConversionError(
                f"{hf_dir / INDEX}: {len(wrong)} tensors are not in the file that the index names, "
                f"first {shown(wrong[0])} in"
                f" {(index or {})[wrong[0]]}; index and files come from different saves or the "
                "download is incomplete: fetch it again"
            )

    def _read_index(self) -> dict[str, str] | None:
        path, single = self.hf_dir / INDEX, self.hf_dir / SINGLE
        if has_entry(self.hf_dir / ADAPTER):
            raise ConversionError(
                f"{self.hf_dir / ADAPTER}: the folder holds an adapter, such as LoRA's, which is "
                "not applied; merge it into the model and save that, or remove the adapter's files "
                "if the model without it is meant"
            )
        if not has_entry(path):
            if not has_entry(single):
                raise ConversionError(f"{self.hf_dir}: {self._no_weights()}")
            return None
        index = read_object(JSON, inside(self.hf_dir, INDEX, JSON)).get("weight_map")
        if not isinstance(index, dict) or not index:
            JSON.refuse(path, "cannot be read: weight_map is no mapping of tensor names to files")
        for file in index.values():
            # the index is a foreign file: it may only point into the folder
            if not isinstance(file, str) or Path(file).name != file:
                JSON.refuse(
                    path, f"names the file {shown(repr(file), 80)}, which is not inside the folder"
                )
        if has_entry(single) and set(index.values()) != {SINGLE}:
            others = shown(", ".join(sorted(set(index.values()))[:4]))
            raise ConversionError(
                f"{self.hf_dir} holds two models: {SINGLE}, which transformers would load, "
                f"and {INDEX} with {others};"
                " remove those of the one that you do not mean"
            )
        return index

    def _no_weights(self) -> str:
        found = sorted(
            path.name
            for path in self.hf_dir.glob("*")
            if path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".gguf")
        )
        return (
            f"no {SINGLE} and no {INDEX}"
            + (f", only {', '.join(found[:4])}" if found else "")
            + "; only safetensors are read:"
            " save the model again with save_pretrained(..., safe_serialization=True)"
        )

    def _open(self, file: str) -> None:
        path = inside(self.hf_dir, file, _WEIGHTS)
        if not has_entry(path):
            raise ConversionError(
                f"{self.hf_dir / INDEX}: names {path.name}, which is missing; "
                "the download is incomplete, fetch it again"
            )
        for name, header in read_header(_WEIGHTS, path).items():
            if name in self._file_of:
                raise ConversionError(
                    f"{path}: holds {shown(name)}, which {self._file_of[name].name} holds too; "
                    "remove the stale file"
                )
            self._file_of[name] = path
            self._headers[name] = header
        self._files.append(path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape from the file's header, without reading the tensor."""
        return self._headers[name].shape

    def dtype(self, name: str) -> str:
        """Return safetensors' name of the stored dtype, e.g. BF16, without reading the tensor."""
        return self._headers[name].dtype

    def total_bytes(self) -> int:
        """Return the size of all weight files on disk, in bytes."""
        return sum(path.stat().st_size for path in self._files)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        import torch

        dtype = getattr(torch, DTYPES[self.dtype(name)])
        values = torch.empty(self.shape(name), dtype=dtype)
        self.read_values(name, 0, values.view(-1))
        return values

    def read_values(self, name: str, first: int, target: Tensor) -> None:
        """Fill the contiguous 1-D `target`, of the stored dtype, with values of a tensor from
        number `first` on; ConversionError when they cannot be read. Several threads may call it."""
        import torch

        path = self._file_of[name]
        place = self._headers[name].start + first * target.element_size()
        view = memoryview(target.view(torch.uint8).numpy().data)
        try:
            with _WEIGHTS.open(path) as stream:
                found = read_large(stream.fileno(), view, place)
        except OSError as error:
            raise ConversionError(
                f"{path}: {name} cannot be read ({error}); fetch the file again"
            ) from error
        if found != view.nbytes:  # it was cut after its header was read
            raise ConversionError(f"{path}: {name} cannot be read whole; fetch the file again")


def read_generation_config(hf_dir: Path) -> dict[str, Any] | None:
    """Return generation_config.json as a dict, None when the folder has none; ConversionError when
    it is no JSON object."""
    path = hf_dir / GENERATION
    if not has_entry(path):
        return None
    return read_object(JSON, inside(hf_dir, GENERATION, JSON))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON with a closing newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def weights_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[bytes, list[str]]:
    """Return the first bytes of a safetensors file, as its library writes them, and the order in
    which the tensors' bytes follow. `tensors`: name -> (safetensors' name of the dtype, shape)."""
    # the library puts wider dtypes first, and BF16 before F16
    order = sorted(tensors, key=lambda name: (_ORDER.index(tensors[name][0]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def plan_shards(sizes: Iterable[tuple[str, int]], max_shard_bytes: int) -> list[list[str]]:
    """Cut the names, in order, into groups of at most `max_shard_bytes`; a larger tensor gets a
    group of its own."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes:
        if groups[-1] and used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
