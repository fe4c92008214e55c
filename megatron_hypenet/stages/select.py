"""Layer selection, the pure part: from per-layer scores to the layers that stay softmax attention.

Every layer l is once replaced alone by its aligned RNN mixer and scored: recall R_l and commonsense C_l. A layer matters when losing
its attention costs recall but little else, so its importance is (arXiv 2601.22156)

    I_l = (max_j R_j - R_l) / (max_j C_j - C_l + eps)        capped at 50

and the `num_attention` layers of the highest importance keep attention. No tensor library is imported here: ranking is a desk job.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.errors import ConfigError, DataError

IMPORTANCE_CAP = 50.0
"""Upper bound of an importance (paper's code): a layer whose loss costs no commonsense at all would otherwise divide by eps."""
IMPORTANCE_EPS = 1e-10
"""Keeps the quotient finite for the layer with the best commonsense score."""
METRICS = ("recall", "commonsense")
"""The two scores that every layer must have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerScores:
    """Scores of the model with one layer replaced, in layer order; higher is better. The scale is free: it cancels only per metric."""

    recall: tuple[float, ...]
    commonsense: tuple[float, ...]

    @property
    def num_layers(self) -> int:
        """Number of layers that were swapped, one after the other."""
        return len(self.recall)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which mixer every layer gets, and the importances that decided it."""

    mixer_types: tuple[str, ...]
    attention_layers: tuple[int, ...]
    importance: tuple[float, ...]

    def to_json(self) -> dict[str, list[Any]]:
        """The content of `mixers.json`."""
        return {"mixer_types": list(self.mixer_types), "attention_layers": list(self.attention_layers)}


def importance(scores: LayerScores, *, cap: float = IMPORTANCE_CAP, eps: float = IMPORTANCE_EPS) -> tuple[float, ...]:
    """Importance of each layer's attention, in layer order, between 0 and `cap`."""
    best_recall, best_commonsense = max(scores.recall), max(scores.commonsense)
    pairs = zip(scores.recall, scores.commonsense, strict=True)
    return tuple(min((best_recall - r) / (best_commonsense - c + eps), cap) for r, c in pairs)


def rank(scores: LayerScores, num_attention: int, *, cap: float = IMPORTANCE_CAP) -> Selection:
    """Keep attention in the `num_attention` most important layers; on a tie the lower layer index wins.

    Raises ConfigError unless 1 <= num_attention <= number of layers.
    """
    num_layers = scores.num_layers
    if not 1 <= num_attention <= num_layers:
        raise ConfigError(
            f"layer selection: num_attention={num_attention} is out of range for {num_layers} scored layers; "
            f"use 1 to {num_layers} (the paper keeps a quarter: {max(1, num_layers // 4)})"
        )
    values = importance(scores, cap=cap)
    chosen = sorted(range(num_layers), key=lambda layer: (-values[layer], layer))[:num_attention]
    return selection_of(chosen, num_layers, values)


def selection_of(attention_layers: Sequence[int], num_layers: int, values: Sequence[float] = ()) -> Selection:
    """The selection that keeps attention in the given layers, whoever chose them."""
    kept = frozenset(attention_layers)
    types = tuple("attn" if layer in kept else "lightning_attn" for layer in range(num_layers))
    return Selection(mixer_types=types, attention_layers=tuple(sorted(kept)), importance=tuple(values))


def parse_scores(payload: Any, *, where: str = "scores") -> LayerScores:
    """Check a decoded scores file: `{"layers": {"0": {"recall": r, "commonsense": c}, ...}, ...}`; other top-level keys are free.

    Raises DataError that lists every problem: layers missing from 0..n-1, metrics missing, not a number, NaN or infinite.
    """
    layers = payload.get("layers") if isinstance(payload, Mapping) else None
    if not isinstance(layers, Mapping) or not layers:
        raise DataError(f'{where}: expected a non-empty object under "layers": {{"layers": {{"0": {{"recall": .., "commonsense": ..}}}}}}')
    problems: list[str] = []
    by_index: dict[int, Any] = {}
    for key, entry in layers.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and str(int(key)) == key):
            problems.append(f"layer key {key!r} is not a plain layer index such as '0'")
        else:
            by_index[int(key)] = entry
    expected = _expected_layers(payload, by_index)
    missing = [str(layer) for layer in range(expected) if layer not in by_index]
    extra = [str(layer) for layer in sorted(by_index) if layer >= expected]
    if missing:
        problems.append(f"missing layers {', '.join(missing)} (expected 0 to {expected - 1})")
    if extra:
        problems.append(f"layers {', '.join(extra)} are beyond num_layers={expected}")
    values = {layer: _metrics_of(layer, entry, problems) for layer, entry in sorted(by_index.items())}
    if problems:
        listed = "\n  - ".join(problems)
        raise DataError(f"{where}: the layer scores cannot be ranked:\n  - {listed}\nScore every layer once, then rank again.")
    columns = {name: tuple(values[layer][name] for layer in range(expected)) for name in METRICS}
    return LayerScores(recall=columns["recall"], commonsense=columns["commonsense"])


def load_scores(path: Path) -> LayerScores:
    """Read and check a scores file. Raises DataError when it is absent, not JSON, or names a layer twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = f"the scores file cannot be read ({error.strerror})"
        raise DataError(f"{path}: {reason}; run `hypenet select CONFIG.yaml` to make one") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the scores file is not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        payload = json.loads(text, object_pairs_hook=_no_duplicates)
    except _DuplicateKeyError as error:
        raise DataError(f"{path}: {error}; each layer may be scored once") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    return parse_scores(payload, where=str(path))


def load_selection(path: Path, *, num_layers: int) -> Selection:
    """Read `mixers.json`; the two keys must agree with each other and with the model's depth. Raises DataError."""
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        types, layers = list(payload["mixer_types"]), list(payload["attention_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a mixers file ({type(error).__name__}: {error}); write one with `hypenet select rank`") from error
    if len(types) != num_layers:
        raise DataError(f"{path}: {len(types)} mixer_types, but the teacher has {num_layers} layers; rank the scores of this teacher")
    if [layer for layer, kind in enumerate(types) if kind == "attn"] != sorted(layers):
        raise DataError(f"{path}: attention_layers {layers} and mixer_types {types} disagree; write the file with `hypenet select rank`")
    return Selection(mixer_types=tuple(types), attention_layers=tuple(sorted(layers)), importance=())


class _DuplicateKeyError(ValueError):
    """A JSON object names the same key twice."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`json` hook: plain decoding silently keeps the last of two equal keys, and a layer scored twice must not pass."""
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise _DuplicateKeyError(f"duplicate keys {', '.join(map(repr, twice))}")
    return dict(pairs)


def _expected_layers(payload: Mapping[str, Any], by_index: Mapping[int, Any]) -> int:
    """The model's depth: `num_layers` when the file states it, else one more than the highest layer named."""
    stated = payload.get("num_layers")
    if isinstance(stated, int) and not isinstance(stated, bool) and stated > 0:
        return stated
    return max(by_index, default=-1) + 1


def _metrics_of(layer: int, entry: Any, problems: list[str]) -> dict[str, float]:
    """The metrics of one layer; what is wrong with them is appended to `problems`."""
    if not isinstance(entry, Mapping):
        problems.append(f"layer {layer}: expected an object with {' and '.join(METRICS)}, got {type(entry).__name__}")
        return {}
    values: dict[str, float] = {}
    for name in METRICS:
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.append(f"layer {layer}: {name} is {'missing' if name not in entry else repr(value)}, expected a number")
        elif not math.isfinite(value):
            problems.append(f"layer {layer}: {name} is {value}, expected a finite number")
        else:
            values[name] = float(value)
    return values
