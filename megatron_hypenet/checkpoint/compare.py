"""Compare two checkpoints, written on any layouts: settings, progress, and every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import KIND, WEIGHTS_PARTS, verify_files
from megatron_hypenet.checkpoint.shards import ShardReader
from megatron_hypenet.checkpoint.survey import read_progress
from megatron_hypenet.config.loader import read_stored
from megatron_hypenet.untrusted.files import has_entry
from megatron_hypenet.untrusted.json_text import read_object

_CHUNK_ELEMENTS = 1 << 22
_PROGRESS = ("stage", "step", "samples", "tokens", "adam_step")
"""The entries of a train state that must agree; learning rate and losses depend on the rounding of
the layout that computed them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDifference:
    """The differences of one tensor between A and B; differences of values are None where the
    shapes differ."""

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    max_abs_diff: float | None
    """Largest |a - b|; NaN where only one is NaN."""
    max_rel_diff: float | None
    """max_abs_diff over the largest |a|."""


@dataclass(kw_only=True, slots=True)
class Comparison:
    """The result of `compare`. `equal` covers model, tensors and progress, not `run_settings`."""

    model: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Keys of model.json with both values."""
    run_settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Keys of config.yaml with both values; they do not count as differences."""
    progress: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    only_in_first: list[str] = field(default_factory=list)
    only_in_second: list[str] = field(default_factory=list)
    differing: list[TensorDifference] = field(default_factory=list)
    compared: int = 0
    """Tensors that both hold."""

    @property
    def equal(self) -> bool:
        """Return true when no model setting, progress or tensor (names, shapes, dtypes, bits)
        differs."""
        return not (
            self.model
            or self.progress
            or self.only_in_first
            or self.only_in_second
            or self.differing
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data for JSON."""
        return {"equal": self.equal, **asdict(self)}


def compare(
    first: Path,
    second: Path,
    *,
    weights_only: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compare two committed checkpoint folders, with one tensor of each in memory at a time.

    `weights_only` ignores optimizer state and progress. CheckpointError when one of them is
    damaged.
    """
    for folder in (first, second):
        verify_files(
            folder, hashes=True, parts=(*WEIGHTS_PARTS, fmt.CONFIG) if weights_only else ()
        )
    result = Comparison(model=_differences(_model(first), _model(second)))
    settings = [_settings(folder) for folder in (first, second)]
    if all(settings):
        result.run_settings = _differences(settings[0], settings[1])
    if not weights_only:
        states = [
            {key: read_progress(folder).get(key) for key in _PROGRESS} for folder in (first, second)
        ]
        result.progress = _differences(states[0], states[1])
    for part in (fmt.WEIGHTS,) if weights_only else (fmt.WEIGHTS, fmt.OPTIMIZER):
        readers = [_reader(folder / part) for folder in (first, second)]
        progress(f"comparing {part}: {len(readers[0])} and {len(readers[1])} tensors")
        _compare_tensors(readers[0], readers[1], result)
    return result


def _reader(folder: Path) -> ShardReader | dict[str, Any]:
    return ShardReader(folder) if folder.is_dir() else {}


def _compare_tensors(first: Any, second: Any, result: Comparison) -> None:
    result.only_in_first += sorted(key for key in first if key not in second)
    result.only_in_second += sorted(key for key in second if key not in first)
    for key in sorted(key for key in first if key in second):
        result.compared += 1
        difference = _tensor_difference(key, first, second)
        if difference is not None:
            result.differing.append(difference)


def _tensor_difference(
    key: str, first: ShardReader, second: ShardReader
) -> TensorDifference | None:
    """Return how two tensors differ; None when shape, dtype and every bit agree."""
    shapes, dtypes = (first.shape(key), second.shape(key)), (first.dtype(key), second.dtype(key))
    largest = relative = None
    if shapes[0] == shapes[1]:
        a, b = first[key], second[key]
        if dtypes[0] == dtypes[1] and torch.equal(_bits(a), _bits(b)):
            return None
        largest, scale = _largest_difference(a, b)
        relative = largest / scale if scale else None
    names = (str(dtypes[0]).removeprefix("torch."), str(dtypes[1]).removeprefix("torch."))
    return TensorDifference(
        name=key, shapes=shapes, dtypes=names, max_abs_diff=largest, max_rel_diff=relative
    )


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes: NaN equals itself, and zeros of either sign differ."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _largest_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return max |a - b| and max |a|, in float64, a few million elements at a time."""
    largest = 0.0
    scale = 0.0
    for x, y in zip(_chunks(a), _chunks(b), strict=True):
        both = x.isnan() & y.isnan()
        # equal infinities subtract to NaN
        step = torch.where(both, 0.0, (x - y).abs()).masked_fill(x == y, 0.0).max()
        if step.isnan():
            return float("nan"), float("nan")
        largest = max(largest, float(step))
        scale = max(scale, float(x.abs().nan_to_num().max()))
    return largest, scale


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    return (chunk.double() for chunk in tensor.reshape(-1).split(_CHUNK_ELEMENTS) if chunk.numel())


def _model(folder: Path) -> dict[str, Any]:
    return read_object(KIND, folder / fmt.MODEL_JSON)


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / fmt.CONFIG
    return _flat(read_stored(file)) if has_entry(file) else {}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        key: (first.get(key), second.get(key))
        for key in {**first, **second}
        if first.get(key) != second.get(key)
    }
