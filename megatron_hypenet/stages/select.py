"""Rank layers by their scores, and choose those that keep softmax attention.

Every layer l is replaced by its aligned RNN mixer, one at a time, and the model is scored: recall
R_l and commonsense C_l. A layer matters when losing its attention costs recall but little else, so
its importance is (arXiv 2601.22156)

    I_l = (max_j R_j - R_l) / (max_j C_j - C_l + eps)        capped at 50

and the `num_attention` layers of the highest importance keep attention. No tensor library is
imported here: ranking needs none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.config.mixers import mixer_specs
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.model import MAX_LAYERS
from megatron_hypenet.errors import ConfigError, DataError
from megatron_hypenet.eval.results import FILE, read_results
from megatron_hypenet.untrusted.files import FileKind, has_entry, shown
from megatron_hypenet.untrusted.json_text import read_json, read_typed

_SCORES = FileKind(error=DataError, advice="score every layer once, then rank again")
_MIXERS = FileKind(error=DataError, advice="write the file with `hypenet select rank`")

IMPORTANCE_CAP = 50.0
"""Upper bound of an importance (paper's code): a layer whose loss costs no commonsense at all would
otherwise divide by eps."""
IMPORTANCE_EPS = 1e-10
"""Keeps the quotient finite for the layer with the best commonsense score."""
METRICS = ("recall", "commonsense")
"""The two metrics that every layer must have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerScores:
    """Scores of the model with one layer replaced, in layer order; higher is better. Their scale is
    free, but must be the same for all layers."""

    recall: tuple[float, ...]
    commonsense: tuple[float, ...]

    @property
    def num_layers(self) -> int:
        """Return the number of layers that were scored."""
        return len(self.recall)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The mixer of every layer, and the importances that decided it."""

    mixer_types: tuple[str, ...]
    attention_layers: tuple[int, ...]
    importance: tuple[float, ...]

    def to_json(self) -> dict[str, list[Any]]:
        """Return the content of `mixers.json`."""
        return {
            "mixer_types": list(self.mixer_types),
            "attention_layers": list(self.attention_layers),
        }


def importance(
    scores: LayerScores, *, cap: float = IMPORTANCE_CAP, eps: float = IMPORTANCE_EPS
) -> tuple[float, ...]:
    """Return the importance of each layer's attention, in layer order, between 0 and `cap`."""
    best_recall, best_commonsense = max(scores.recall), max(scores.commonsense)
    pairs = zip(scores.recall, scores.commonsense, strict=True)
    return tuple(min((best_recall - r) / (best_commonsense - c + eps), cap) for r, c in pairs)


def scores_of_evaluations(
    folder: Path, recall: Sequence[str], commonsense: Sequence[str]
) -> LayerScores:
    """Return the scores of evaluations by `hypenet eval`: `folder`/LAYER/eval.json is of the model
    with that layer replaced. `recall` and `commonsense` name tasks, as NAME or NAME:METRIC, whose
    mean counts. DataError for a layer, a task or a metric that is missing."""
    found: dict[int, Path] = {}
    for file in folder.glob(f"*/{FILE}"):
        if file.parent.name.isdecimal():
            found[int(file.parent.name)] = file
    if sorted(found) != list(range(len(found))) or not found:
        missing = next((n for n in range(len(found) + 1) if n not in found), 0)
        raise DataError(
            f"{folder}: no evaluation of layer {missing}, {missing}/{FILE}; evaluate the model "
            "with each layer replaced, and name the folders by the layers"
        )
    columns: dict[str, list[float]] = {"recall": [], "commonsense": []}
    for layer in range(len(found)):
        plan, rows = read_results(found[layer])
        model = list(plan.get("models", {}))[-1:]
        of_model = [row for row in rows if [row["model"]] == model]
        for name, tasks in (("recall", recall), ("commonsense", commonsense)):
            scores = [_task_score(found[layer], of_model, task) for task in tasks]
            columns[name].append(sum(scores) / len(scores))
    return LayerScores(recall=tuple(columns["recall"]), commonsense=tuple(columns["commonsense"]))


def _task_score(file: Path, rows: Sequence[dict[str, Any]], task: str) -> float:
    """Return the mean of a task's rows, NAME or NAME:METRIC."""
    name, _, metric = task.partition(":")
    named = [row for row in rows if row["task"] == name]
    chosen = [row for row in named if row.get("way") == metric] if metric else named
    ways = sorted({str(row.get("way", "")) for row in chosen})
    if len(ways) > 1:
        raise DataError(f"{file}: task {name} has several metrics: choose {name}:{ways[0]} or so")
    if not chosen:
        raise DataError(
            f"{file}: no row of task {task}; it has "
            + (", ".join(sorted({row["task"] for row in rows})) or "none")
        )
    return sum(float(row["score"]) for row in chosen) / len(chosen)


def rank(
    scores: LayerScores, num_attention: int, mixer: str, *, cap: float = IMPORTANCE_CAP
) -> Selection:
    """Keep attention in the `num_attention` most important layers, with the RNN mixer `mixer` in
    the others; on a tie the lower layer index wins.

    Raises ConfigError unless 1 <= num_attention <= number of layers.
    """
    num_layers = scores.num_layers
    if not 1 <= num_attention <= num_layers:
        raise ConfigError(
            f"layer selection: num_attention={num_attention} is out of range for {num_layers} "
            "scored layers; "
            f"use 1 to {num_layers} (the paper keeps a quarter: {max(1, num_layers // 4)})"
        )
    values = importance(scores, cap=cap)
    chosen = sorted(range(num_layers), key=lambda layer: (-values[layer], layer))[:num_attention]
    return selection_of(chosen, num_layers, mixer, values)


def selection_of(
    attention_layers: Sequence[int], num_layers: int, mixer: str, values: Sequence[float] = ()
) -> Selection:
    """Return the selection that keeps attention in the given layers and has the RNN mixer `mixer`
    in the others."""
    kept = frozenset(attention_layers)
    types = tuple(ATTENTION if layer in kept else mixer for layer in range(num_layers))
    return Selection(
        mixer_types=types, attention_layers=tuple(sorted(kept)), importance=tuple(values)
    )


def parse_scores(payload: Any, *, where: str = "scores") -> LayerScores:
    """Check a decoded scores file: `{"layers": {"0": {"recall": r, "commonsense": c}, ...}, ...}`;
    other top-level keys are free.

    Raises DataError that lists every problem: layers missing from 0..n-1, metrics missing, not a
    number, NaN or infinite.
    """
    layers = payload.get("layers") if isinstance(payload, Mapping) else None
    if not isinstance(layers, Mapping) or not layers:
        raise DataError(
            f'{where}: expected a non-empty object under "layers": {{"layers": {{"0": {{"recall": '
            f'.., "commonsense": ..}}}}}}'
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
    values = {
        layer: _metrics_of(layer, entry, problems) for layer, entry in sorted(by_index.items())
    }
    if problems:
        listed = "\n  - ".join(problems)
        raise DataError(
            f"{where}: the layer scores cannot be ranked:\n  - {listed}\nScore every layer once, "
            "then rank again."
        )
    columns = {name: tuple(values[layer][name] for layer in range(expected)) for name in METRICS}
    return LayerScores(recall=columns["recall"], commonsense=columns["commonsense"])


def load_scores(path: Path) -> LayerScores:
    """Read and check a scores file. Raises DataError when it is absent, not JSON, or names a layer
    twice."""
    if not has_entry(path):
        raise DataError(
            f"{path}: there is no scores file; run `hypenet select CONFIG.yaml` to make one"
        )
    return parse_scores(read_json(_SCORES, path), where=str(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mixers:
    """The required keys of `mixers.json`; others are allowed."""

    mixer_types: list[str]
    attention_layers: list[int]


def load_selection(path: Path, *, num_layers: int) -> Selection:
    """Read `mixers.json`; the two keys must agree with each other and with the model's depth.
    Raises DataError."""
    found = read_typed(_MIXERS, path, _Mixers)
    types = found.mixer_types
    layers = found.attention_layers
    if len(types) != num_layers:
        raise DataError(
            f"{path}: {len(types)} mixer_types, but the teacher has {num_layers} layers; "
            "rank the scores of this teacher"
        )
    if unknown := sorted(set(types) - set(mixer_specs())):
        _MIXERS.refuse(
            path,
            f"mixer_types names unknown mixers {shown(unknown)}; known mixers: "
            + ", ".join(sorted(mixer_specs())),
        )
    if [layer for layer, kind in enumerate(types) if kind == ATTENTION] != sorted(layers):
        _MIXERS.refuse(
            path, f"attention_layers {shown(layers)} and mixer_types {shown(types)} disagree"
        )
    return Selection(
        mixer_types=tuple(types), attention_layers=tuple(sorted(layers)), importance=()
    )


def _expected_layers(payload: Mapping[str, Any], by_index: Mapping[int, Any]) -> int:
    """Return the model's depth: `num_layers` when the file states it, else one more than the
    highest layer named."""
    stated = payload.get("num_layers")
    if isinstance(stated, int) and not isinstance(stated, bool) and stated > 0:
        return stated
    return max(by_index, default=-1) + 1


def _metrics_of(layer: int, entry: Any, problems: list[str]) -> dict[str, float]:
    """Return the metrics of one layer; what is wrong with them is appended to `problems`."""
    if not isinstance(entry, Mapping):
        problems.append(
            f"layer {layer}: expected an object with {' and '.join(METRICS)}, "
            f"got {type(entry).__name__}"
        )
        return {}
    values: dict[str, float] = {}
    for name in METRICS:
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
