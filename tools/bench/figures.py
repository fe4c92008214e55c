"""Figures of the benchmarks: panels of horizontal bars, ours in a colour of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Panel:
    """One set of bars."""

    heading: str
    unit: str
    values: Mapping[str, float | None]
    """Length of each bar by its label, from the top; None leaves a gap."""


def bars(
    path: Path,
    title: str,
    panels: Sequence[Panel],
    *,
    columns: int = 1,
    ours: Sequence[str] = ("ours",),
) -> None:
    """Write the panels as one picture, row by row; in a row all panels have the labels of the
    first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // columns)
    bars_of_rows = [len(panels[row * columns].values) for row in range(rows)]
    height = sum(0.34 * count + 0.9 for count in bars_of_rows) + 0.6
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(4 + 4 * columns, height),
        squeeze=False,
        gridspec_kw={"height_ratios": [count + 1 for count in bars_of_rows]},
    )
    for place, panel in enumerate(panels):
        axis = axes[place // columns][place % columns]
        names = list(panel.values)
        lengths = [value or 0.0 for value in panel.values.values()]
        colours = ["tab:orange" if name in ours else "tab:blue" for name in names]
        axis.bar_label(
            axis.barh(names, lengths, color=colours), [_said(length) for length in lengths]
        )
        axis.set_xlabel(panel.unit)
        axis.set_title(panel.heading, loc="left")
        axis.invert_yaxis()
        axis.margins(x=0.15)
        if place % columns:
            axis.set_yticks([])
    for place in range(len(panels), rows * columns):
        axes[place // columns][place % columns].set_axis_off()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _said(length: float) -> str:
    if not length:
        return ""
    return f" {length:,.0f}" if length >= 1000 else f" {length:.4g}"
