"""Convert one layer, measure, convert back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.stages.aligned_mixers import AlignedMixers

Scores = dict[str, float]
"""Metrics of one model by name."""


@contextmanager
def swapped(model: HypeNetModel, layer: int, mixers: AlignedMixers) -> Iterator[None]:
    """Let `model` use the RNN mixer in global layer `layer` inside the block; a layer of another
    pipeline stage is not touched."""
    if str(layer) not in mixers.mixers:
        yield
        return
    original = model.mixer(layer)
    model.set_mixer(layer, mixers.of_layer(layer))
    try:
        yield
    finally:
        model.set_mixer(layer, original)


def score_layers(
    teacher: HypeNetModel,
    mixers: AlignedMixers,
    evaluate: Callable[[], Scores],
    *,
    metrics: Sequence[str],
    known: Mapping[str, Any] | None = None,
    on_scored: Callable[[dict[str, Any]], None] = lambda payload: None,
) -> dict[str, Any]:
    """Score the teacher as it is, then with each layer swapped alone; entries of scores.json.

    `evaluate` measures the `metrics` of the model in its present state. `known` is an earlier,
    perhaps unfinished result: what it holds is not measured again. `on_scored` sees the result
    after every measurement, so that it can be saved.
    """
    known = known or {}
    layers = dict(known.get("layers", {}))
    result: dict[str, Any] = {
        "num_layers": teacher.model_config.num_layers,
        "baseline": known.get("baseline"),
        "layers": layers,
    }
    if result["baseline"] is None:
        result["baseline"] = _checked(evaluate(), metrics)
        on_scored(result)
    for layer in range(teacher.model_config.num_layers):
        if str(layer) in result["layers"]:
            continue
        with swapped(teacher, layer, mixers):
            result["layers"][str(layer)] = _checked(evaluate(), metrics)
        on_scored(result)
    return result


def _checked(scores: Scores, metrics: Sequence[str]) -> Scores:
    assert set(scores) >= set(metrics), f"evaluate() must give {metrics}, got {sorted(scores)}"
    return {name: float(value) for name, value in scores.items()}
