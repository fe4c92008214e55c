"""What a report says of a run, read from its folder: facts, results with intervals, curves, speed.

Runs of older versions lack some of it; what is missing is listed, and the rest is reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hypenet.checkpoint.find import read_model_config
from megatron_hypenet.config.schema import STAGES, RunConfig
from megatron_hypenet.errors import HypenetError
from megatron_hypenet.eval.intervals import NORMAL_95, share_interval
from megatron_hypenet.halo.fingerprints import flat_settings
from megatron_hypenet.halo.report import read_report
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.stages.selection.method import RankSettings, selection_method
from megatron_hypenet.stages.selection.scores import load_scores
from megatron_hypenet.stages.spec import stage_spec
from megatron_hypenet.training.short_text import short_count, short_time
from megatron_hypenet.training.step_files import LOSSES, METRICS, loss_lines, metrics_lines

CURVE_POINTS = 200
"""Most points of a curve; neighbouring steps of a longer one are averaged."""

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Value:
    """A measurement with the ends of its 95 % interval, where these are known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRow:
    """The results of one model by context length in tokens."""

    model: str
    recall: Mapping[int, Value]
    """Facts recalled, in %."""
    loss: Mapping[int, Value]
    """Held-out loss in nats per token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageData:
    """What is known of one training stage."""

    name: str
    loss: str
    """The name of the quantity that it minimises (`StageSpec.loss`)."""
    steps: int
    tokens: int
    seconds: float | None
    losses: Points
    """Training loss by step, of neighbouring steps averaged."""
    points: Mapping[str, Points]
    """By tag, the values of metrics.jsonl by step."""

    def median(self, tag: str) -> float | None:
        """Return the median of the values of a tag; None without any."""
        values = [value for _, value in self.points.get(tag, ())]
        return statistics.median(values) if values else None

    def highest(self, tag: str) -> float | None:
        """Return the largest value of a tag; None without any."""
        return max((value for _, value in self.points.get(tag, ())), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What a report says of one run."""

    label: str
    """How figures and tables call it."""
    place: str
    facts: Sequence[tuple[str, str]]
    rows: Sequence[ModelRow]
    stages: Sequence[StageData]
    importance: Sequence[float]
    selection_method: str
    """The method of layer selection that the importances are of."""
    attention_layers: Sequence[int]
    mixer: str
    trained_at: int | None
    """Tokens per sequence of distillation."""
    seconds: Mapping[str, float]
    """By task."""
    settings: Mapping[str, Any]
    """By dotted key, as they were stored."""
    missing: Sequence[str] = field(default_factory=tuple)
    """What the folder lacks, in sentences."""


def run_data(folder: RunFolder, run: RunConfig | None, label: str) -> RunData:
    """Read what a report says of the run in `folder`; `run` is its configuration, or None where
    this version cannot read it. DataError when report.json is missing or damaged."""
    content = read_report(folder)
    missing: list[str] = []
    stages = [] if run is None else [_stage(folder, run, name, missing) for name in STAGES]
    if run is None:
        missing.append(
            "the configuration is of another version: curves, tokens and speeds are left out"
        )
    rows = [_row(row, content) for row in content["rows"]]
    if not any(value.low is not None for row in rows for value in row.recall.values()):
        missing.append(
            "report.json was written by an older version, without numbers of questions and "
            "losses by length: figures have no error bars; hypenet report with --again measures "
            "them"
        )
    settings = flat_settings(folder.stored_settings() or {})
    method, importance = _importance(folder, settings, len(content["attention_layers"]), missing)
    return RunData(
        label=label,
        place=str(folder.root.absolute()),
        facts=_facts(folder, content, settings, missing),
        rows=rows,
        stages=stages,
        importance=importance,
        selection_method=method,
        attention_layers=content["attention_layers"],
        mixer=str(settings.get("align.mixer", "an RNN mixer")),
        trained_at=content.get("train_seq_length"),
        seconds=content.get("step_seconds", {}),
        settings=settings,
        missing=missing,
    )


def _row(row: Mapping[str, Any], content: Mapping[str, Any]) -> ModelRow:
    unit = int(content["seq_length"])
    questions = row.get("recall_questions")
    recall = {}
    for multiple, percent in row["recall"].items():
        ends = share_interval(percent, questions) if questions else (None, None)
        recall[int(multiple) * unit] = Value(percent, *ends)
    loss = {unit: Value(row["heldout_loss"])}
    for multiple, found in row.get("loss_by_length", {}).items():
        error = found["standard_error"]
        half = None if error is None else NORMAL_95 * error
        loss[int(multiple) * unit] = Value(
            found["loss"],
            None if half is None else found["loss"] - half,
            None if half is None else found["loss"] + half,
        )
    return ModelRow(
        model=row["model"], recall=dict(sorted(recall.items())), loss=dict(sorted(loss.items()))
    )


def _stage(folder: RunFolder, run: RunConfig, name: str, missing: list[str]) -> StageData:
    config = run.stage(name)
    place = folder.stage(name)
    losses = [
        (float(line.step), line.loss)
        for _, line in loss_lines(place / LOSSES)
        if line.loss is not None
    ]
    points: dict[str, Points] = {}
    for _, line in metrics_lines(place / METRICS):
        for tag, value in line.values.items():
            if value is not None:
                points.setdefault(tag, []).append((float(line.step), value))
    for file, found in ((LOSSES, losses), (METRICS, points)):
        if not found:
            missing.append(
                f"{name}/{file} is not there: "
                + ("no curve of the loss" if file == LOSSES else "no held-out curves, no speed")
                + f" of stage {name}"
            )
    return StageData(
        name=name,
        loss=stage_spec(name).loss(config),
        steps=config.train_iters,
        tokens=config.train_iters * config.tokens_per_step,
        seconds=folder.records().get(name, {}).get("seconds"),
        losses=thinned(losses),
        points=points,
    )


def thinned(points: Points, most: int = CURVE_POINTS) -> Points:
    """Return at most `most` points, each the mean of neighbouring ones at the last one's step."""
    size = -(-len(points) // most) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _importance(
    folder: RunFolder, settings: Mapping[str, Any], num_attention: int, missing: list[str]
) -> tuple[str, Sequence[float]]:
    """Return the method of layer selection and the importance of every layer; none where there are
    no scores."""
    try:
        scores = load_scores(folder.scores_file)
        ranking = RankSettings(
            num_attention=num_attention,
            importance_cap=float(settings.get("select.importance_cap", 50.0)),
        )
        return scores.method, selection_method(scores.method).importance(scores, ranking)
    except (HypenetError, OSError, TypeError, ValueError):
        missing.append("selection/scores.json is not there: no importance of layers")
        return "", ()


def _facts(
    folder: RunFolder,
    content: Mapping[str, Any],
    settings: Mapping[str, Any],
    missing: list[str],
) -> list[tuple[str, str]]:
    """Return names and values of the table that a report begins with."""
    records = folder.records()
    kept = content["attention_layers"]
    num_layers = len(content.get("mixer_types", ()))
    software = content.get("software", {})
    data = records.get("data", {})
    found = {
        "teacher": str(settings.get("teacher", "not recorded")),
        "teacher's size": _size(folder.teacher),
        "student": f"{len(kept)} of {num_layers or 'its'} layers keep softmax attention "
        f"({', '.join(map(str, kept))}), the others have {settings.get('align.mixer', 'a mixer')}",
        "layer selection": _selection(content.get("selection") or {}),
        "student's size": _size(folder.stage("finetune")),
        "training data": _listed(settings.get("data.train", "not recorded")),
        "its tokens": _count(data.get("train_tokens")),
        "held-out tokens": _count(data.get("heldout_tokens")) or "a share of the training data",
        "logit scaling": str(content.get("attn_logits_scaling", "not recorded")),
        "finished": str(records.get("report", {}).get("finished", "")),
        "time of all tasks": short_time(content["seconds"]),
        "software": ", ".join(f"{name} {n}" for name, n in software.get("versions", {}).items()),
        "commit": str(software.get("git_commit") or ""),
    }
    for name in ("teacher's size", "student's size"):
        if not found[name]:
            missing.append(f"{name} is left out: its checkpoint is not in the folder")
    return [(name, value) for name, value in found.items() if value]


def _selection(found: Mapping[str, Any]) -> str:
    """Return the method and what it took, as far as the report has it."""
    if found.get("method") is None:
        return ""
    tokens, seconds = found.get("tokens"), found.get("seconds")
    parts = [
        f"method {found['method']}",
        "" if tokens is None else f"{short_count(tokens)} tokens read",
        "" if seconds is None else short_time(seconds),
    ]
    return ", ".join(filter(None, parts))


def _size(checkpoint: Path) -> str:
    try:
        shape = read_model_config(checkpoint)
    except (HypenetError, OSError):
        return ""
    return (
        f"{shape.num_parameters:,} weights, {shape.num_layers} layers, hidden size "
        f"{shape.hidden_size:,}, vocabulary {shape.vocab_size:,}"
    )


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else ""
