"""Scores files: what a method measured of every layer, as JSON.

    {"method": "halo", "num_layers": 2, "tokens": 1000, "seconds": 2.5,
     "layers": {"0": {"recall": 80, "commonsense": 50}, "1": {"recall": 60, "commonsense": 48}}}

Only `layers` is required; without `method` they are halo's, as other programs write them. No tensor
library is imported here: ranking needs none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hypenet.config.model import MAX_LAYERS
from megatron_hypenet.config.selection import SELECTION_METHODS, SelectConfig
from megatron_hypenet.errors import DataError
from megatron_hypenet.stages.selection.method import LayerScores, selection_method
from megatron_hypenet.untrusted.files import FileKind, has_entry, shown
from megatron_hypenet.untrusted.json_text import read_json

_SCORES = FileKind(error=DataError, advice="score every layer once, then rank again")
_UNNAMED = SelectConfig().method
"""The method of scores that do not name one: the default, which was the only one at first."""


def parse_scores(payload: Any, *, where: str = "scores") -> LayerScores:
    """Check a decoded scores file: `{"layers": {"0": {METRIC: number, ...}, ...}, ...}`, with the
    metrics of its `method`; unknown top-level keys are free.

    Raises DataError that lists every problem: layers missing from 0..n-1, metrics missing, not a
    number, NaN or infinite.
    """
    layers = payload.get("layers") if isinstance(payload, Mapping) else None
    if not isinstance(layers, Mapping) or not layers:
        raise DataError(
            f'{where}: expected a non-empty object under "layers": {{"layers": {{"0": {{"recall": '
            f'.., "commonsense": ..}}}}}}'
        )
    name = payload.get("method", _UNNAMED)
    if name not in SELECTION_METHODS:
        raise DataError(
            f"{where}: method is {shown(repr(name), 40)}; "
            f"methods are {', '.join(SELECTION_METHODS)}"
        )
    problems: list[str] = []
    by_index: dict[int, Any] = {}
    for key, entry in layers.items():
        if not (isinstance(key, str) and re.fullmatch("0|[1-9][0-9]{0,8}", key)):
            problems.append(
                f"layer key {shown(repr(key), 40)} is not a plain layer index such as '0'"
            )
        else:
            by_index[int(key)] = entry
    expected = _expected_layers(payload, by_index)
    if expected > MAX_LAYERS:
        raise DataError(f"{where}: scores of {expected} layers; a model has at most {MAX_LAYERS}")
    missing = [str(layer) for layer in range(expected) if layer not in by_index]
    extra = [str(layer) for layer in sorted(by_index) if layer >= expected]
    if missing:
        problems.append(f"missing layers {', '.join(missing)} (expected 0 to {expected - 1})")
    if extra:
        problems.append(f"layers {', '.join(extra)} are beyond num_layers={expected}")
    metrics = selection_method(name).metrics
    values = {
        layer: _metrics_of(layer, entry, metrics, problems)
        for layer, entry in sorted(by_index.items())
    }
    tokens, seconds, num_attention = (
        _count_of(payload, key, problems) for key in ("tokens", "seconds", "num_attention_layers")
    )
    if problems:
        listed = "\n  - ".join(problems)
        raise DataError(
            f"{where}: the layer scores cannot be ranked:\n  - {listed}\nScore every layer once, "
            "then rank again."
        )
    return LayerScores(
        method=name,
        num_layers=expected,
        values={key: tuple(values[layer][key] for layer in range(expected)) for key in metrics},
        num_attention=None if num_attention is None else int(num_attention),
        tokens=None if tokens is None else int(tokens),
        seconds=seconds,
    )


def load_scores(path: Path) -> LayerScores:
    """Read and check a scores file. Raises DataError when it is absent, not JSON, or names a layer
    twice."""
    if not has_entry(path):
        raise DataError(
            f"{path}: there is no scores file; run `hypenet select CONFIG.yaml` to make one"
        )
    return parse_scores(read_json(_SCORES, path), where=str(path))


def _count_of(payload: Mapping[str, Any], key: str, problems: list[str]) -> float | None:
    """Return a number that is not negative, or None where it is not stated; what is wrong with it
    is appended to `problems`."""
    value = payload.get(key)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1e18:
        problems.append(f"{key} is {shown(repr(value), 40)}, expected a number from 0 to 1e18")
        return None
    return float(value)


def _expected_layers(payload: Mapping[str, Any], by_index: Mapping[int, Any]) -> int:
    """Return the model's depth: `num_layers` when the file states it, else one more than the
    highest layer named."""
    stated = payload.get("num_layers")
    if isinstance(stated, int) and not isinstance(stated, bool) and stated > 0:
        return stated
    return max(by_index, default=-1) + 1


def _metrics_of(
    layer: int, entry: Any, metrics: Sequence[str], problems: list[str]
) -> dict[str, float]:
    """Return the metrics of one layer; what is wrong with them is appended to `problems`."""
    if not isinstance(entry, Mapping):
        problems.append(
            f"layer {layer}: expected an object with {' and '.join(metrics) or 'nothing in it'}, "
            f"got {type(entry).__name__}"
        )
        return {}
    values: dict[str, float] = {}
    for name in metrics:
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.append(
                f"layer {layer}: "
                f"{name} is {'missing' if name not in entry else shown(repr(value), 40)}, "
                "expected a number"
            )
        elif not math.isfinite(value):
            problems.append(f"layer {layer}: {name} is {value}, expected a finite number")
        else:
            values[name] = float(value)
    return values
