"""Write and read report.json: losses and recall of a run's models, and the time of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.schema import STAGES, RunConfig
from megatron_hypenet.errors import DataError
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import read_json, software
from megatron_hypenet.stages.selection.ranking import Selection
from megatron_hypenet.untrusted.files import FileKind, has_entry
from megatron_hypenet.untrusted.json_text import read_object, typed

FORMAT_VERSION = 1
_REPORT = FileKind(error=DataError, advice="make it again: hypenet report RUN_DIR --again")


def write_report(
    run: RunConfig, folder: RunFolder, rows: Sequence[Mapping[str, Any]], *, report_seconds: float
) -> None:
    """Write report.json from the measured rows, the selection and the recorded steps;
    `report_seconds` is the time of the evaluation."""
    write_json(
        folder.report_file,
        report_of(run, rows, read_json(folder.mixers_file), folder.records(), report_seconds),
    )


def report_of(
    run: RunConfig,
    rows: Sequence[Mapping[str, Any]],
    selection: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Return the content of report.json. Losses are nats per token, accuracies %, times seconds."""
    steps = {name: record["seconds"] for name, record in records.items() if name != "report"} | {
        "report": round(seconds, 3)
    }
    choice = records.get("select", {})
    return {
        "format_version": FORMAT_VERSION,
        "seq_length": run.eval.seq_length,
        "length_multiples": list(run.eval.length_multiples),
        "train_seq_length": run.distill.seq_length,
        "attn_logits_scaling": run.export.attn_logits_scaling,
        "rows": [dict(row) for row in rows],
        "attention_layers": list(selection["attention_layers"]),
        "mixer_types": list(selection["mixer_types"]),
        "selection": {
            "method": choice.get("method"),
            "tokens": choice.get("tokens"),
            "seconds": choice.get("scoring_seconds"),
        },
        "teacher_probe_loss": records.get("probe", {}).get("teacher_loss"),
        "step_seconds": steps,
        "seconds": round(sum(steps.values()), 3),
        "software": software(),
    }


Multiple = Annotated[str, Field(pattern="^[1-9][0-9]{0,5}$")]
"""A multiple of the report's sequence length, as a key of JSON."""
Nats = Annotated[float, Field(ge=0, le=1e6)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loss:
    """Held-out loss at one length, in nats per token."""

    loss: Nats
    standard_error: Nats | None
    sequences: Annotated[int, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One model in report.json."""

    model: str
    heldout_loss: Nats
    recall: Annotated[dict[Multiple, Annotated[float, Field(ge=0, le=100)]], Field(min_length=1)]
    recall_questions: Annotated[int, Field(gt=0)] | None = None
    loss_by_length: dict[Multiple, _Loss] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Software:
    """The code and libraries that made the report."""

    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Selection:
    """How the attention layers were chosen, and what that took."""

    method: str | None = None
    tokens: Annotated[int, Field(ge=0)] | None = None
    seconds: Seconds | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Report:
    """The entries of report.json that are shown and drawn."""

    rows: Annotated[list[_Row], Field(min_length=1)]
    seq_length: Annotated[int, Field(gt=0, le=1 << 40)]
    attention_layers: list[int]
    seconds: Seconds
    step_seconds: dict[str, Seconds] = field(default_factory=dict)
    mixer_types: list[str] = field(default_factory=list)
    attn_logits_scaling: str | float | None = None
    selection: _Selection | None = None
    software: _Software | None = None
    train_seq_length: Annotated[int, Field(gt=0, le=1 << 40)] | None = None


def read_report(folder: RunFolder) -> dict[str, Any]:
    """Return the content of report.json. DataError when it is damaged."""
    content = read_object(_REPORT, folder.report_file)
    rows = typed(_REPORT, folder.report_file, content, _Report).rows
    if any(row.recall.keys() != rows[0].recall.keys() for row in rows):
        _REPORT.refuse(folder.report_file, "its rows have different context lengths")
    return content


def student_row(stage: str) -> str:
    """Return what the report calls the student after a training stage."""
    return f"student after stage {STAGES.index(stage) + 1}"


def report_on(folder: RunFolder, checkpoint: Path) -> dict[str, Any] | None:
    """Return the content of report.json up to the row of the model in `checkpoint`, which lies in
    the run; None where the report is not about it. DataError when the report is damaged."""
    records = folder.records()
    place = str(checkpoint.absolute().relative_to(folder.root.absolute()))
    stages = [name for name in STAGES if records.get(name, {}).get("checkpoint") == place]
    if not stages or "report" not in records or not has_entry(folder.report_file):
        return None
    content = read_report(folder)
    names = [row["model"] for row in content["rows"]]
    own = student_row(stages[0])
    if own not in names:
        return None
    return {**content, "rows": content["rows"][: names.index(own) + 1]}


def row_line(row: Mapping[str, Any]) -> str:
    """Return one row as a line for the log."""
    recall = ", ".join(f"{multiple}x {value:.1f}" for multiple, value in row["recall"].items())
    return f"{row['model']}: held-out loss {row['heldout_loss']:.4f}, recall in %: {recall}"


def draw_importance(folder: RunFolder, selection: Selection, *, axis: str) -> None:
    """Draw the importances of all layers as importance.png; `axis` says what they are."""
    from megatron_hypenet.eval.plots import importance

    mixer = next((name for name in selection.mixer_types if name != ATTENTION), "an RNN mixer")
    importance(
        selection.importance,
        selection.attention_layers,
        folder.importance_plot,
        mixer=mixer,
        axis=axis,
    )
