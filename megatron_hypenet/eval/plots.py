"""Figures, drawn without a display: layer importances, the report of losses and recall by length,
and heat maps of an evaluation by length and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOTS_PER_INCH = 150
KEPT_COLOUR = "#c4472b"
REPLACED_COLOUR = "#9db4c0"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure on the file-only Agg canvas (pyplot would look for a display and keep global
    state) and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png", metadata={"Software": "megatron_hypenet"})


def importance(values: Sequence[float], attention_layers: Sequence[int], path: Path) -> None:
    """Plot the importance of every layer's attention as bars, in layer order; the layers that keep
    softmax attention have another colour."""
    kept = set(attention_layers)
    figure, (axis,) = _figure(max(6.0, 0.32 * len(values) + 2.0), 3.6)
    layers = range(len(values))
    axis.bar(
        layers,
        values,
        color=[KEPT_COLOUR if layer in kept else REPLACED_COLOUR for layer in layers],
    )
    axis.set_xticks(list(layers))
    axis.set_xlabel("layer")
    axis.set_ylabel("importance: recall lost / language score lost")
    axis.set_title("Importance of each layer's attention", loc="left")
    for colour, label in (
        (KEPT_COLOUR, "keeps softmax attention"),
        (REPLACED_COLOUR, "becomes Lightning Attention"),
    ):
        axis.bar([], [], color=colour, label=label)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def report(content: Mapping[str, Any], path: Path) -> None:
    """Plot two panels from the content of report.json: recall by context length, one line a model,
    and held-out loss, one bar a model.

    Needs `rows` (each with model, heldout_loss and recall by length multiple), `seq_length`, and
    optionally `train_seq_length`, which is marked: beyond it a model is used at lengths it was not
    trained on.
    """
    rows = content["rows"]
    figure, (recall, loss) = _figure(11.0, 4.2, columns=2)
    for row in rows:
        points = sorted(
            (int(multiple) * int(content["seq_length"]), value)
            for multiple, value in row["recall"].items()
        )
        recall.plot(
            [length for length, _ in points],
            [value for _, value in points],
            marker="o",
            label=row["model"],
        )
    lengths = sorted(
        {int(multiple) * int(content["seq_length"]) for row in rows for multiple in row["recall"]}
    )
    recall.set_xscale("log", base=2)
    recall.set_xticks(lengths, [f"{length:,}" for length in lengths])
    recall.minorticks_off()
    recall.set_ylim(-3, 103)
    recall.set_xlabel("context length in tokens")
    recall.set_ylabel("facts recalled in %")
    recall.set_title("Recall by context length", loc="left")
    if content.get("train_seq_length"):
        recall.axvline(
            content["train_seq_length"], color="0.6", linestyle=":", label="distillation length"
        )
    recall.legend(frameon=False)
    bars = loss.barh(
        [row["model"] for row in rows], [row["heldout_loss"] for row in rows], color=REPLACED_COLOUR
    )
    loss.bar_label(bars, fmt="%.3f", padding=3)
    loss.invert_yaxis()
    loss.margins(x=0.15)
    loss.set_xlabel("nats per token, lower is better")
    loss.set_title("Loss on held-out text", loc="left")
    for axis in (recall, loss):
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


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
