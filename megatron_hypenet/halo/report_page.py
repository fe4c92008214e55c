"""Write report.html and report.png from what report_data.py read of one run, or of two to compare:
each opens anywhere by itself.

One file, because the sections of the page are short and read one after the other."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hypenet.atomic_files import write_text
from megatron_hypenet.eval import plots
from megatron_hypenet.eval.plots import Panel, Series
from megatron_hypenet.halo.report_data import ModelRow, RunData, StageData, Value
from megatron_hypenet.stages.selection.method import selection_method
from megatron_hypenet.training.short_text import short_count, short_time
from megatron_hypenet.training.tags import EVAL, LM_LOSS, RECALL, SPEED, TEACHER, TRAIN, tag_of

TEMPLATE = "report.html.j2"

SIDE_BY_SIDE = (
    "Points of one length are drawn side by side; the values are in the table. Error bars are 95 % "
    "intervals: "
)
RECALL_ABOUT = (
    "A recall document states facts (a key and its value) between held-out text and asks for each "
    "of them at its end; recall is the share of questions whose answer is the model's most likely "
    "token. "
    + SIDE_BY_SIDE
    + "Wilson's interval of a share, which takes the questions as independent."
)
LOSS_ABOUT = (
    "Next-token cross entropy on held-out text, lower is better. The text is the same at every "
    "length, cut into longer and fewer sequences, so a model that uses its context has lower "
    "losses at greater lengths. "
    + SIDE_BY_SIDE
    + "1.96 standard errors of the mean over sequences. All models read the same text, so their "
    "differences are surer than these bars."
)
CURVES_ABOUT = (
    "Stage 1 aligns an RNN mixer with the attention of every layer (squared error), stage 2 lets "
    "the student follow the teacher's next-token distribution (KL divergence), stage 3 trains it "
    "on long sequences (cross entropy). Held-out values are measured on text that no stage trains "
    "on; in training sequences there may be recall documents too, whose loss is another."
)
MEANWHILE_ABOUT = (
    "Loss and recall of the student while it was trained, beside the teacher's on the same few "
    "sequences at the shortest length, without the logit scaling of the finished model."
)
SPEED_ABOUT = (
    "Tokens per second of all processes together (the median over the stage, evaluations and "
    "saves left out), useful floating-point operations per second and process, their share of the "
    "GPU's bf16 peak (MFU), and the largest memory of any process (of the GPU, or resident on a "
    "CPU). Time is the whole task's, with loading, evaluations and saves."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    name: str
    cells: Sequence[Value | str]
    final: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    heading: Sequence[str]
    rows: Sequence[_Row]
    digits: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    title: str
    about: str
    panels: Sequence[Panel] = ()
    tables: Sequence[_Table] = ()
    picture: str = ""
    """The panels as a data URI."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Difference:
    name: str
    cells: Sequence[Value]
    digits: int
    difference: str = field(init=False, default="")
    intervals: str = field(init=False, default="")

    def __post_init__(self) -> None:
        first, second = self.cells
        object.__setattr__(self, "difference", f"{second.value - first.value:+.{self.digits}f}")
        object.__setattr__(self, "intervals", _compared(first, second))


def write_page(runs: Sequence[RunData], page: Path, picture: Path) -> None:
    """Write the page of one run or of two, and a picture with its figures."""
    sections = [
        _recall(runs),
        _losses(runs),
        _curves(runs),
        _meanwhile(runs),
        _importance(runs),
        _speed(runs),
    ]
    sections = [section for section in sections if section.panels or section.tables]
    plots.png([panel for section in sections for panel in section.panels], picture)
    write_text(page, _html(runs, [_drawn(section) for section in sections]))


def _html(runs: Sequence[RunData], sections: Sequence[_Section]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        keep_trailing_newline=True,
    )
    several = len(runs) > 1
    title = "HypeNet runs " + " and ".join(run.label for run in runs)
    return environment.get_template(TEMPLATE).render(
        title=title if several else f"HypeNet run {runs[0].label}",
        lead=[_lead(run, named=several) for run in runs],
        runs=runs,
        sections=sections,
        differences=_differences(runs) if several else [],
        settings=_settings(runs) if several else [],
        facts=_side_by_side([dict(run.facts) for run in runs]),
        value=_shown,
    )


def _lead(run: RunData, *, named: bool) -> str:
    """Return the result in one sentence."""
    first, last = run.rows[0], run.rows[-1]
    shortest, longest = min(last.recall), max(last.recall)
    return (
        (f"{run.label}: " if named else "")
        + f"The {last.model} has a held-out loss of {last.loss[min(last.loss)].value:.3f} nats per "
        f"token ({first.model}: {first.loss[min(first.loss)].value:.3f}) and recalls "
        f"{last.recall[shortest].value:.1f} % of facts at {shortest:,} tokens and "
        f"{last.recall[longest].value:.1f} % at {longest:,} ({first.model}: "
        f"{first.recall[shortest].value:.1f} % and {first.recall[longest].value:.1f} %)."
    )


def _shown(cell: Value | str, digits: int) -> Any:
    """Return a cell as HTML: a number, with its interval behind it."""
    from markupsafe import Markup

    if isinstance(cell, str):
        return cell
    text = f"{cell.value:.{digits}f}"
    if cell.low is None or cell.high is None:
        return text
    ends = f"({cell.low:.{digits}f} to {cell.high:.{digits}f})"
    return Markup('{} <span class="range">{}</span>').format(text, ends)


def _drawn(section: _Section) -> _Section:
    if not section.panels:
        return section
    content = base64.b64encode(plots.svg(section.panels)).decode()
    return _Section(
        title=section.title,
        about=section.about,
        tables=section.tables,
        picture=f"data:image/svg+xml;base64,{content}",
    )


def _recall(runs: Sequence[RunData]) -> _Section:
    return _Section(
        title="Recall by context length",
        about=RECALL_ABOUT,
        panels=[_lengths(runs, "recall", "Recall by context length", "facts recalled in %")],
        tables=[_length_table(runs, "recall", digits=1)],
    )


def _losses(runs: Sequence[RunData]) -> _Section:
    return _Section(
        title="Loss on held-out text by context length",
        about=LOSS_ABOUT,
        panels=[_lengths(runs, "loss", "Held-out loss by context length", "nats per token")],
        tables=[_length_table(runs, "loss", digits=4)],
    )


def _models(runs: Sequence[RunData]) -> list[tuple[RunData, ModelRow, str]]:
    """Return the models that figures and tables show, with their names: all of one run, teacher and
    finished student of two."""
    if len(runs) == 1:
        return [(runs[0], row, row.model) for row in runs[0].rows]
    return [
        (run, row, f"{run.label}: {row.model}")
        for run in runs
        for row in (run.rows[0], run.rows[-1])
    ]


def _lengths(runs: Sequence[RunData], what: str, title: str, unit: str) -> Panel:
    series = []
    for _, row, name in _models(runs):
        values: dict[int, Value] = getattr(row, what)
        ranges = [
            None if value.low is None or value.high is None else (value.low, value.high)
            for value in values.values()
        ]
        points = [(float(length), value.value) for length, value in values.items()]
        series.append(Series(label=name, points=points, ranges=ranges))
    marks = {run.trained_at for run in runs}
    mark = marks.pop() if len(marks) == 1 else None
    return plots.by_length(series, title=title, unit=unit, percent=what == "recall", mark=mark)


def _length_table(runs: Sequence[RunData], what: str, *, digits: int) -> _Table:
    models = _models(runs)
    lengths = sorted({length for _, row, _ in models for length in getattr(row, what)})
    return _Table(
        heading=["model", *(f"{length:,} tokens" for length in lengths)],
        rows=[
            _Row(
                name=name,
                cells=[getattr(row, what).get(length, "not measured") for length in lengths],
                final=row is run.rows[-1],
            )
            for run, row, name in models
        ],
        digits=digits,
    )


def _numbers(runs: Sequence[RunData]) -> dict[str, int]:
    """Return the numbers of the training stages by name."""
    return {stage.name: at for run in runs for at, stage in enumerate(run.stages, start=1)}


def _curves(runs: Sequence[RunData]) -> _Section:
    """Return the loss of every stage."""
    panels: list[Panel] = []
    for name, number in _numbers(runs).items():
        series = [
            one for run, stage in _stages(runs, name) for one in _stage_series(runs, run, stage)
        ]
        if series:
            loss = next(stage.loss for _, stage in _stages(runs, name))
            about = tag_of(TRAIN + loss)
            panels.append(
                plots.curves(
                    series,
                    title=f"Stage {number}, {name}: {loss}",
                    unit=about.unit if about else "",
                    log=number == 1,
                )
            )
    return _Section(title="Curves of the stages", about=CURVES_ABOUT, panels=panels)


def _meanwhile(runs: Sequence[RunData]) -> _Section:
    """Return what the student could do while it was trained."""
    panels: list[Panel] = []
    for quantity, unit in ((LM_LOSS, "nats per token"), (RECALL, "%")):
        for name, number in _numbers(runs).items():
            series = [
                one
                for run, stage in _stages(runs, name)
                for one in _beside_teacher(runs, run, stage, quantity)
            ]
            if series:
                title = f"Stage {number}, {name}: held-out {quantity}"
                percent = quantity == RECALL
                panels.append(plots.curves(series, title=title, unit=unit, percent=percent))
    return _Section(
        title="What the student could do meanwhile", about=MEANWHILE_ABOUT, panels=panels
    )


def _stages(runs: Sequence[RunData], name: str) -> list[tuple[RunData, StageData]]:
    return [(run, stage) for run in runs for stage in run.stages if stage.name == name]


def _named(runs: Sequence[RunData], run: RunData, what: str) -> str:
    return what if len(runs) == 1 else f"{run.label}: {what}"


def _stage_series(runs: Sequence[RunData], run: RunData, stage: StageData) -> Iterable[Series]:
    if stage.losses:
        yield Series(label=_named(runs, run, "training"), points=stage.losses)
    if heldout := stage.points.get(EVAL + stage.loss):
        yield Series(label=_named(runs, run, "held-out text"), points=heldout)


def _beside_teacher(
    runs: Sequence[RunData], run: RunData, stage: StageData, quantity: str
) -> Iterable[Series]:
    if student := stage.points.get(EVAL + quantity):
        yield Series(label=_named(runs, run, "student"), points=student)
        if teacher := stage.points.get(EVAL + TEACHER + quantity):
            yield Series(label=_named(runs, run, "teacher"), points=teacher, constant=True)


def _importance(runs: Sequence[RunData]) -> _Section:
    drawn = [run for run in runs if run.importance]
    return _Section(
        title="Importance of the layers",
        about=" ".join(
            dict.fromkeys(selection_method(run.selection_method).about for run in drawn)
        ),
        panels=[
            plots.importance_panel(
                run.importance,
                run.attention_layers,
                mixer=run.mixer,
                axis=selection_method(run.selection_method).axis,
                title=_named(runs, run, "importance of each layer's attention"),
            )
            for run in drawn
        ],
    )


def _speed(runs: Sequence[RunData]) -> _Section:
    heading = ["stage", "steps", "tokens", "time", "tokens/s", "TFLOP/s", "MFU", "memory in GiB"]
    rows = [
        _Row(name=_named(runs, run, stage.name), cells=_speed_cells(stage))
        for run in runs
        for stage in run.stages
    ]
    tables = [_Table(heading=heading, rows=rows)] if rows else []
    tasks = list(dict.fromkeys(task for run in runs for task in run.seconds))
    if tasks:
        taken = [
            _Row(
                name=run.label if len(runs) > 1 else "time",
                cells=[
                    short_time(run.seconds[task]) if task in run.seconds else "" for task in tasks
                ],
            )
            for run in runs
        ]
        tables.append(_Table(heading=["task", *tasks], rows=taken))
    return _Section(title="Speed, memory, time", about=SPEED_ABOUT, tables=tables)


def _speed_cells(stage: StageData) -> list[str]:
    speed = stage.median(f"{SPEED}tokens-per-second")
    work = stage.median(f"{SPEED}tflops-per-gpu")
    share = stage.median(f"{SPEED}mfu")
    memory = stage.highest(f"{SPEED}memory-gib")
    unknown = "not known"
    return [
        f"{stage.steps:,}",
        short_count(stage.tokens),
        unknown if stage.seconds is None else short_time(stage.seconds),
        unknown if speed is None else f"{speed:,.0f}",
        unknown if work is None else f"{work:.3g}",
        unknown if share is None else f"{100 * share:.1f} %",
        unknown if memory is None else f"{memory:.2f}",
    ]


def _differences(runs: Sequence[RunData]) -> list[_Difference]:
    first, second = (run.rows[-1] for run in runs)
    found = []
    for what, name, digits in (("loss", "held-out loss", 4), ("recall", "recall in %", 1)):
        ours: dict[int, Value] = getattr(first, what)
        theirs: dict[int, Value] = getattr(second, what)
        found += [
            _Difference(
                name=f"{name} at {length:,} tokens",
                cells=[ours[length], theirs[length]],
                digits=digits,
            )
            for length in ours
            if length in theirs
        ]
    return found


def _compared(first: Value, second: Value) -> str:
    if None in (first.low, first.high, second.low, second.high):
        return "not known"
    assert first.low is not None and first.high is not None
    assert second.low is not None and second.high is not None
    return "overlap" if first.low <= second.high and second.low <= first.high else "apart"


def _settings(runs: Sequence[RunData]) -> list[list[str]]:
    rows = _side_by_side([{key: str(value) for key, value in run.settings.items()} for run in runs])
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] != "output_dir"]


def _side_by_side(columns: Sequence[dict[str, str]]) -> list[list[str]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "") for column in columns)] for name in names]


def file_name(label: str) -> str:
    """Return a label as the part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", label).strip("._") or "run"
