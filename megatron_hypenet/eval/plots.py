"""Figures, drawn without a display: layer importances, curves of training, losses and recall by
length with error bars, and heat maps of an evaluation by length and depth.

Series that lie on each other stay apart: each has its own marker, dashes and colour (from the
palette of Okabe and Ito, which the colour-blind can tell apart), and points of one length are drawn
side by side.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOTS_PER_INCH = 150
KEPT_COLOUR = "#c4472b"
REPLACED_COLOUR = "#9db4c0"

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#b3a000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))

MANY_POINTS = 60
"""Number of points from which a line has no markers of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a figure."""

    label: str
    points: Sequence[tuple[float, float]]
    ranges: Sequence[tuple[float, float] | None] | None = None
    """Lower and upper end of each point's error bar; None for a point without one."""
    constant: bool = False
    """Whether it is a value to compare with, drawn thin."""


Panel = Callable[[Any], None]
"""Draws into an axis."""


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure on the file-only Agg canvas (pyplot would look for a display and keep global
    state) and its axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def png(panels: Sequence[Panel], path: Path, *, columns: int = 2) -> None:
    """Draw the panels into one picture at `path`."""
    _save(_drawn(panels, columns), path)


def svg(panels: Sequence[Panel], *, columns: int = 2) -> bytes:
    """Draw the panels into one picture; returns an SVG file with letters as paths, which looks the
    same everywhere."""
    content = io.BytesIO()
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "megatron_hypenet"}):  # the same file for the same content
        _drawn(panels, columns).savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png", metadata={"Software": "megatron_hypenet"})


def _drawn(panels: Sequence[Panel], columns: int) -> Any:
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(5.6 * columns, 3.7 * rows, rows, columns)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for panel, axis in zip(panels, axes, strict=False):
        panel(axis)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def importance(
    values: Sequence[float],
    attention_layers: Sequence[int],
    path: Path,
    *,
    mixer: str,
    axis: str,
) -> None:
    """Draw the bar chart of `importance_panel` at `path`."""
    figure, (place,) = _figure(max(6.0, 0.32 * len(values) + 2.0), 3.6)
    importance_panel(values, attention_layers, mixer=mixer, axis=axis)(place)
    place.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def importance_panel(
    values: Sequence[float],
    attention_layers: Sequence[int],
    *,
    mixer: str,
    axis: str,
    title: str = "Importance of each layer's attention",
) -> Panel:
    """Return the bar chart of the importance of every layer's attention, in layer order, with
    `axis` as the name of its values; the layers that keep softmax attention have another colour and
    a hatch."""
    kept = set(attention_layers)

    def draw(place: Any) -> None:
        from matplotlib.patches import Patch

        for layer, value in enumerate(values):
            place.bar(layer, value, **_look(layer in kept))
        step = -(-len(values) // 24)
        place.set_xticks(range(0, len(values), step))
        place.set_xlabel("layer")
        place.set_ylabel(axis)
        _titled(place, title)
        words = {True: "keeps softmax attention", False: f"becomes {mixer}"}
        handles = [Patch(label=text, **_look(which)) for which, text in words.items()]
        place.legend(handles=handles, frameon=False, fontsize=8)

    return draw


def _look(kept: bool) -> dict[str, Any]:
    return (
        {"facecolor": KEPT_COLOUR, "hatch": "//", "edgecolor": "white"}
        if kept
        else {"facecolor": REPLACED_COLOUR, "edgecolor": "white"}
    )


def by_length(
    series: Sequence[Series],
    *,
    title: str,
    unit: str,
    percent: bool = False,
    mark: int | None = None,
) -> Panel:
    """Return the chart of values by context length in tokens (a logarithmic axis), with points of
    one length side by side; `mark` is a length with a line and the words "trained at"."""

    def draw(axis: Any) -> None:
        axis.set_xscale("log", base=2)
        lengths = sorted({length for one in series for length, _ in one.points})
        for number, one in enumerate(series):
            shift = 2.0 ** (0.06 * (number - (len(series) - 1) / 2))
            xs = [length * shift for length, _ in one.points]
            ys = [value for _, value in one.points]
            ends = None
            if one.ranges is not None:
                known = [at or (y, y) for y, at in zip(ys, one.ranges, strict=True)]
                ends = [
                    [y - low for y, (low, _) in zip(ys, known, strict=True)],
                    [high - y for y, (_, high) in zip(ys, known, strict=True)],
                ]
            style = {**_style(number, one, len(series)), "linewidth": 1.3}
            axis.errorbar(xs, ys, yerr=ends, capsize=2.5, elinewidth=1.0, markersize=4.5, **style)
        if mark is not None:
            axis.axvline(mark, color="0.55", linewidth=0.8)
            axis.annotate(
                " trained at", (mark, 1), xycoords=("data", "axes fraction"), fontsize=7,
                color="0.35", va="top",
            )  # fmt: skip
        axis.set_xlim(lengths[0] / 1.4, lengths[-1] * 1.4)
        axis.set_xticks(lengths, [f"{length:,.0f}" for length in lengths], fontsize=8)
        axis.minorticks_off()
        if percent:
            axis.set_ylim(-4, 104)
        axis.set_xlabel("context length in tokens")
        axis.set_ylabel(unit)
        _titled(axis, title)
        _legend(axis)

    return draw


def curves(
    series: Sequence[Series], *, title: str, unit: str, log: bool = False, percent: bool = False
) -> Panel:
    """Return the chart of values by optimizer step."""

    def draw(axis: Any) -> None:
        for number, one in enumerate(series):
            style = _style(number, one, len(series))
            if len(one.points) > MANY_POINTS:
                style["marker"] = ""
            axis.plot(
                [step for step, _ in one.points],
                [value for _, value in one.points],
                markersize=4,
                **style,
            )
        if log and all(value > 0 for one in series for _, value in one.points):
            axis.set_yscale("log")
        if percent:
            axis.set_ylim(-4, 104)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(unit)
        _titled(axis, title)
        _legend(axis)

    return draw


def _style(number: int, one: Series, total: int) -> dict[str, Any]:
    """Return the looks of series `number` of `total`: a later one is thinner, so that an equal one
    below it still shows."""
    at = number % len(COLOURS)
    width = 0.9 if one.constant else min(1.1 + 0.8 * (total - 1 - number), 3.5)
    # matplotlib leaves a label out that begins with an underscore
    label = f" {one.label}" if one.label.startswith("_") else one.label
    return {
        "label": label, "color": COLOURS[at], "marker": MARKERS[at], "linestyle": DASHES[at],
        "fillstyle": "none" if number % 2 else "full", "linewidth": width,
    }  # fmt: skip


def _titled(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, parse_math=False)


def _legend(axis: Any) -> None:
    legend = axis.legend(frameon=False, fontsize=7.5)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names of runs are no formulas


def heat_maps(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot scores in % by length and depth, a map for each model and task: rows with `model`,
    `task`, `length`, `depth` and `score`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(2.6 * len(tasks) + 1, 2.4 * len(models) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(models), len(tasks), squeeze=False)
    for model, line in zip(models, axes, strict=True):
        for task, axis in zip(tasks, line, strict=True):
            own = [row for row in rows if row["model"] == model and row["task"] == task]
            lengths = sorted({row["length"] for row in own})
            depths = sorted({row["depth"] for row in own})
            found = {(row["depth"], row["length"]): row["score"] for row in own}
            values = [[found[depth, length] for length in lengths] for depth in depths]
            axis.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            for y, line_values in enumerate(values):
                for x, value in enumerate(line_values):
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7)
            axis.set_xticks(range(len(lengths)), [f"{x:,}" for x in lengths], fontsize=7)
            axis.set_yticks(range(len(depths)), [f"{100 * x:.0f}%" for x in depths], fontsize=7)
            axis.set_title(f"{model}: {task}", loc="left", fontsize=8)
    figure.supxlabel("context length in tokens", fontsize=8)
    figure.supylabel("depth of the answer", fontsize=8)
    _save(figure, path)
