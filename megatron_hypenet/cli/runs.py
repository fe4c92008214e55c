"""`hypenet runs`: list the runs in a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_hypenet.cli.options import JsonOption
from megatron_hypenet.errors import HypenetError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that holds runs, up to three levels down.")
    ] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List the runs in a folder: state, step, iteration, and the last save.

    Example:

      hypenet runs runs
    """
    from megatron_hypenet.checkpoint.places import run_around
    from megatron_hypenet.cluster.run_state import run_folders

    rows = [row_of(place) for place in run_folders(run_around(folder) or folder)]
    if as_json:
        print(json.dumps({"runs": rows}))
    elif rows:
        show(rows)
    else:
        print(f"{folder}: no runs")


def row_of(folder: Path) -> dict[str, Any]:
    """Return what `status` says of one run; a run that cannot be read has the state "unknown" and
    the reason."""
    from megatron_hypenet.cli.status import status_of

    try:
        return status_of(folder)
    except HypenetError as error:
        return {"run": str(folder), "state": "unknown", "why": str(error)}


def show(rows: list[dict[str, Any]]) -> None:
    """Print one line per run."""
    from rich.console import Console
    from rich.table import Table

    from megatron_hypenet.training.short_text import short_time

    table = Table(box=None)
    for heading in ("run", "state", "step", "iteration", "loss", "last save"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        step, iteration, save = (row.get(key) for key in ("step", "iteration", "last_save"))
        loss = iteration and iteration["loss"]
        table.add_row(
            row["run"],
            row["state"],
            f"{step['name']} {step['place']}/{step['of']}" if step else "",
            f"{iteration['number']}/{iteration['of']}" if iteration else "",
            "" if loss is None else f"{loss:.4g}",
            f"{short_time(save['seconds_ago'])} ago" if save else "",
        )
    Console(file=sys.stdout).print(table)
