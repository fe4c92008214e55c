"""The report of a run: losses and recall of teacher and student, time per step, figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hypenet.cli.options import JsonOption
from megatron_hypenet.cli.status import RunArgument

if TYPE_CHECKING:
    from megatron_hypenet.halo.run_folder import RunFolder

EVALUATION = Path("eval") / "eval.json"
"""Where `hypenet eval` leaves its results in a run."""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def report(
    run_folder: RunArgument,
    again: Annotated[
        bool, typer.Option("--again", help="Evaluate again, even when the report is there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the report of a run; evaluate first what has not been evaluated, and draw the figures
    again.

    Example:

      hypenet report runs/demo
    """
    from megatron_hypenet.checkpoint.places import run_of
    from megatron_hypenet.config.loader import load_run_config
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.untrusted.files import has_entry

    folder = RunFolder(run_of(run_folder))
    if again or not has_entry(folder.report_file):
        evaluate(
            folder, load_run_config(folder.config_file, [f"output_dir={folder.root}"]), again=again
        )
    else:
        from megatron_hypenet.halo.report import draw_report

        with folder.owned():
            draw_report(folder)
    show(folder, as_json=as_json)


def evaluate(folder: RunFolder, run: Any, *, again: bool) -> None:
    """Make the report step's results; CheckpointError names what the run lacks."""
    from megatron_hypenet.cli import pipeline
    from megatron_hypenet.config.schema import STAGES
    from megatron_hypenet.errors import CheckpointError
    from megatron_hypenet.halo.tasks import halo_steps

    finished = folder.records()
    needed = {*STAGES, "select"}
    missing = [
        step.name
        for step in halo_steps(run, folder)
        if step.name in needed and step.name not in finished
    ]
    if missing:
        raise CheckpointError(
            f"{folder.root} is unfinished: {', '.join(missing)} not done; "
            f"continue it with `hypenet run {folder.config_file}`"
        )
    with pipeline.prepared(run, as_it_is=True) as ready:
        if again and ready.is_main:
            folder.report_file.unlink(missing_ok=True)
        ready.runner.run_step("report")


def show(folder: RunFolder, *, as_json: bool) -> None:
    """Print the report on stdout, as a table and the places of everything, or as the JSON that was
    stored."""
    from megatron_hypenet.halo.report import read_report

    content = read_report(folder)
    evaluation = evaluated(folder)
    if as_json:
        print(json.dumps({**content, **({"evaluation": evaluation} if evaluation else {})}))
        return
    from rich.console import Console
    from rich.table import Table

    rows = content["rows"]
    multiples = list(rows[0]["recall"])
    table = Table(
        title="held-out loss in nats, and recall in % by context length (1x = "
        f"{content['seq_length']} tokens)"
    )
    table.add_column("model", no_wrap=True)
    for heading in ("loss", *(f"{multiple}x" for multiple in multiples)):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['heldout_loss']:.4f}",
            *(f"{row['recall'][multiple]:.1f}" for multiple in multiples),
        )
    console = Console(file=sys.stdout)
    console.print(table)
    print(
        f"attention kept in layers {', '.join(map(str, content['attention_layers']))}; "
        f"whole run {content['seconds']:.0f} s of work"
    )
    for name, place in (
        ("model", folder.export),
        ("TensorBoard", folder.tensorboard),
        ("report", folder.report_file),
    ):
        print(f"{name + ':':<13}{place}")
    print(f"{'figure:':<13}{folder.report_plot}")
    if evaluation:
        from megatron_hypenet.eval import results

        print(f"\nhypenet eval ({folder.root / EVALUATION}):\n{results.table(evaluation)}")


def evaluated(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the rows that `hypenet eval` has left in the run, none where it did not run."""
    from megatron_hypenet.eval.results import read_results
    from megatron_hypenet.untrusted.files import has_entry

    file = folder.root / EVALUATION
    return read_results(file)[1] if has_entry(file) else []
