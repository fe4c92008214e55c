"""Choose the layers that keep softmax attention.

`hypenet select CONFIG.yaml` measures every layer by the method `select.method` (halo, kl, gates,
uniform) and ranks them. `hypenet select rank` only ranks a scores file, which may come from any
evaluation harness; it needs no tensors and imports none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hypenet.cli.options import (
    ConfigArgument,
    ContextParallelOption,
    DryRunOption,
    JsonOption,
    OverridesArgument,
    OverwriteOption,
    PipelineParallelOption,
    ProcessesOption,
    RedoOption,
    TensorParallelOption,
    collect_overrides,
)

if TYPE_CHECKING:
    from megatron_hypenet.stages.selection.method import LayerScores
    from megatron_hypenet.stages.selection.ranking import Selection


class _ConfigByDefault(typer.core.TyperGroup):
    """`hypenet select CONFIG.yaml` is short for `hypenet select sweep CONFIG.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front unless a command or --help is there."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["sweep", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    help=__doc__,
    epilog="Example:\n\n"
    "hypenet select rank --scores scores.json --num-attention 7 --out mixers.json",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    cls=_ConfigByDefault,
)


@app.command()
def rank(
    scores: Annotated[
        Path,
        typer.Option(
            "--scores",
            help="Scores file of hypenet select, or of another program: "
            '{"layers": {"0": {"recall": .., "commonsense": ..}, ..}}; or a '
            "folder with LAYER/eval.json of hypenet eval.",
        ),
    ],
    num_attention: Annotated[
        int,
        typer.Option(
            "--num-attention", help="Layers that keep attention; the paper keeps a quarter."
        ),
    ],
    recall: Annotated[
        str | None,
        typer.Option(
            "--recall", metavar="TASK,TASK", help="Tasks of evaluations, TASK or TASK:METRIC."
        ),
    ] = None,
    commonsense: Annotated[
        str | None, typer.Option("--commonsense", metavar="TASK,TASK", help="The same.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File for mixer_types and attention_layers (JSON).")
    ] = None,
    cap: Annotated[
        float | None,
        typer.Option(
            "--cap", help="Largest importance a layer can have, of method halo; the default is 50."
        ),
    ] = None,
    mixer: Annotated[
        str | None,
        typer.Option(
            "--mixer", help="RNN mixer of the other layers; the default is that of align.mixer."
        ),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rank the layers of a scores file by importance and write which keep attention.

    Example:

      hypenet select rank --scores scores.json --num-attention 7 --out mixers.json
    """
    from megatron_hypenet.atomic_files import write_json
    from megatron_hypenet.errors import UsageError
    from megatron_hypenet.ownership import writing
    from megatron_hypenet.stages.selection.halo import HaloMethod, scores_of_evaluations
    from megatron_hypenet.stages.selection.method import RankSettings
    from megatron_hypenet.stages.selection.ranking import rank as rank_layers
    from megatron_hypenet.stages.selection.scores import load_scores

    if cap is not None and not cap > 0:
        raise UsageError(f"--cap={cap}: the largest importance must be above 0")
    recurrent = _recurrent(mixer)
    if scores.is_dir():
        if not (recall and commonsense):
            raise UsageError(
                f"--scores {scores} is a folder of evaluations: add --recall and --commonsense, "
                "the tasks that count"
            )
        layer_scores = scores_of_evaluations(scores, recall.split(","), commonsense.split(","))
    elif recall or commonsense:
        raise UsageError("--recall and --commonsense choose among evaluations in a folder")
    else:
        layer_scores = load_scores(scores)
    if cap is not None and layer_scores.method != HaloMethod.name:
        raise UsageError(
            f"--cap={cap}: {scores} has scores of method {layer_scores.method}, and only those of "
            f"{HaloMethod.name} have a largest importance; leave --cap out"
        )
    settings = RankSettings(
        num_attention=num_attention, **({} if cap is None else {"importance_cap": cap})
    )
    selection = rank_layers(layer_scores, settings, recurrent)
    if out is not None and not dry_run:
        try:
            with writing(out):
                write_json(out, selection.to_json())
        except OSError as error:
            raise UsageError(
                f"--out {out}: cannot be written: {error.strerror}; choose a writable place"
            ) from error
    show(layer_scores, selection, as_json=as_json)
    if out is not None:
        print(f"{'would write' if dry_run else 'wrote'} {out}", file=sys.stderr)


def _recurrent(name: str | None) -> str:
    """Return the RNN mixer of that name, or the default one; UsageError for a name that is none."""
    from megatron_hypenet.config.mixers import default_mixer, mixer_specs
    from megatron_hypenet.errors import UsageError

    known = sorted(found for found, spec in mixer_specs().items() if spec.recurrent)
    if name is not None and name not in known:
        raise UsageError(f"--mixer {name}: no RNN mixer has this name; use {' or '.join(known)}")
    return default_mixer().name if name is None else name


@app.command()
def sweep(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    tp: TensorParallelOption = None,
    pp: PipelineParallelOption = None,
    cp: ContextParallelOption = None,
    nproc: ProcessesOption = None,
    overwrite: OverwriteOption = False,
    redo_from: RedoOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure every layer by select.method, then rank; teacher import and alignment are done first
    where the run folder lacks them.

    An interrupted sweep continues. The word `sweep` may be left out.

    Examples:

      hypenet select configs/run/quickstart.yaml teacher=/models/Qwen3-0.6B data=corpus.txt

      hypenet select configs/run/quickstart.yaml teacher=/models/Qwen3-0.6B data=corpus.txt
        select.method=gates
    """
    from megatron_hypenet.config.loader import load_run_config

    run = load_run_config(config, collect_overrides(overrides, tp=tp, pp=pp, cp=cp))
    from megatron_hypenet.cli import pipeline

    if dry_run:
        found = pipeline.checked(run, overwrite=overwrite, redo_from=redo_from, nproc=nproc)
        rows = pipeline.planned(run, overwrite=overwrite)
        rows = rows[: [row["step"] for row in rows].index("select") + 1]
        pipeline.show_plan(run, rows, found, as_json=as_json)
        return
    with pipeline.prepared(run, overwrite=overwrite, redo_from=redo_from, nproc=nproc) as ready:
        ready.runner.run_through("select")
        if ready.is_main:
            from megatron_hypenet.halo.layer_selection import chosen

            ready.screen.close()
            show(*chosen(run, ready.folder), as_json=as_json)
            print(
                f"wrote {ready.folder.scores_file} and {ready.folder.mixers_file}", file=sys.stderr
            )


def show(scores: LayerScores, selection: Selection, *, as_json: bool) -> None:
    """Print the ranking on stdout: a table with one row per layer, most important first, or one
    JSON object."""
    if as_json:
        print(json.dumps({**selection.to_json(), "importance": list(selection.importance)}))
        return
    from rich.console import Console
    from rich.table import Table

    order = sorted(
        range(scores.num_layers), key=lambda layer: (-selection.importance[layer], layer)
    )
    kept = len(selection.attention_layers)
    table = Table(
        title=f"{kept} of {scores.num_layers} layers keep attention (method {scores.method})"
    )
    metrics = [name for name in scores.values if scores.values[name] != selection.importance]
    for heading in ("rank", "layer", *metrics, "importance"):
        table.add_column(heading, justify="right")
    table.add_column("mixer")
    for position, layer in enumerate(order, start=1):
        numbers = (*(scores.values[name][layer] for name in metrics), selection.importance[layer])
        table.add_row(
            str(position),
            str(layer),
            *(f"{value:.3f}" for value in numbers),
            selection.mixer_types[layer],
        )
    Console(file=sys.stdout).print(table)
