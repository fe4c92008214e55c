"""HALO's method: convert one layer at a time, and measure recall and language.

Every layer l is replaced by its aligned RNN mixer, one at a time, and the model is scored: recall
R_l and commonsense C_l. A layer matters when losing its attention costs recall but little else, so
its importance is (arXiv 2601.22156)

    I_l = (max_j R_j - R_l) / (max_j C_j - C_l + eps)        capped at 50

and the layers of the highest importance keep attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.selection import SelectConfig
from megatron_hypenet.errors import DataError
from megatron_hypenet.eval.results import FILE, read_results
from megatron_hypenet.model.flops import forward_flops
from megatron_hypenet.stages.selection.method import (
    HELDOUT,
    RECALL,
    Content,
    LayerScores,
    RankSettings,
    SelectionMethod,
    SelectionWork,
    register_method,
)

IMPORTANCE_EPS = 1e-10
"""Keeps the quotient finite for the layer with the best commonsense score."""


@register_method
class HaloMethod(SelectionMethod):
    """Recall against commonsense of the model with one layer converted."""

    name = "halo"
    metrics = ("recall", "commonsense")
    reads = frozenset({RECALL, HELDOUT})
    about = (
        "Each layer's attention was replaced alone by its aligned RNN mixer: the importance is the "
        "recall that this costs over the next-token accuracy that it costs. The layers with the "
        "largest values keep softmax attention."
    )
    axis = "recall lost / language score lost"

    def measure(self, work: SelectionWork) -> Content:
        """Score the teacher as it is, then with each layer swapped alone; an interrupted attempt
        goes on with the layers that are left."""
        from megatron_hypenet.stages.selection.layer_sweep import score_layers

        teacher, mixers = work.models()
        settings = work.settings
        sequences = settings.recall_sequences + len(work.heldout())

        def content(result: Content) -> Content:
            models = (result["baseline"] is not None) + len(result["layers"])
            return {**result, "tokens": models * sequences * settings.seq_length}

        def scored(result: Content) -> None:
            work.save(content(result))
            # the teacher as it is comes first
            work.progress(1 + len(result["layers"]), 1 + work.num_layers)

        return content(
            score_layers(
                teacher,
                mixers,
                lambda: work.evaluate(teacher),
                metrics=self.metrics,
                known=work.known,
                on_scored=scored,
            )
        )

    def importance(self, scores: LayerScores, settings: RankSettings) -> tuple[float, ...]:
        """Return the quotients of lost recall and lost commonsense, between 0 and the cap."""
        recall, commonsense = (scores.values[metric] for metric in self.metrics)
        best_recall, best_commonsense = max(recall), max(commonsense)
        return tuple(
            min(
                (best_recall - r) / (best_commonsense - c + IMPORTANCE_EPS),
                settings.importance_cap,
            )
            for r, c in zip(recall, commonsense, strict=True)
        )

    def flops(self, settings: SelectConfig, teacher: ModelConfig, converted: ModelConfig) -> float:
        """Count the forward passes of as many models as layers, and of the teacher."""
        sequences = settings.recall_sequences + settings.heldout_sequences
        tokens = (teacher.num_layers + 1) * sequences * settings.seq_length
        return tokens * forward_flops(teacher, settings.seq_length)


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
    columns: dict[str, list[float]] = {metric: [] for metric in HaloMethod.metrics}
    for layer in range(len(found)):
        plan, rows = read_results(found[layer])
        model = list(plan.get("models", {}))[-1:]
        of_model = [row for row in rows if [row["model"]] == model]
        for name, tasks in zip(HaloMethod.metrics, (recall, commonsense), strict=True):
            scores = [_task_score(found[layer], of_model, task) for task in tasks]
            columns[name].append(sum(scores) / len(scores))
    return LayerScores(
        method=HaloMethod.name,
        num_layers=len(found),
        values={metric: tuple(column) for metric, column in columns.items()},
    )


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
