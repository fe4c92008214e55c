"""The report of a run: losses and recall of teacher and student by length, curves, speed, as a page
to hand on; and two runs beside each other."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hypenet.cli.options import JsonOption
from megatron_hypenet.cli.status import RunArgument

if TYPE_CHECKING:
    from megatron_hypenet.config.schema import RunConfig
    from megatron_hypenet.halo.run_folder import RunFolder

EVALUATION = Path("eval") / "eval.json"
"""Where `hypenet eval` leaves its results in a run."""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def report(
    run_folder: RunArgument,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="RUN_DIR",
            help="Another finished run: write a page with both, side by side, into the first one.",
        ),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Evaluate again, even when the report is there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the report of a run and write it as one HTML page that needs nothing else, and as a
    picture; evaluate first what has not been evaluated.

    Examples:

      hypenet report runs/demo

      hypenet report runs/demo --compare runs/longer
    """
    from megatron_hypenet.checkpoint.places import run_of
    from megatron_hypenet.config.loader import load_run_config
    from megatron_hypenet.errors import DataError
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.untrusted.files import has_entry

    folder = RunFolder(run_of(run_folder))
    others = [] if compare is None else [RunFolder(run_of(compare))]
    for other in others:
        if not has_entry(other.report_file):
            raise DataError(
                f"{other.root} has no report to compare with; `hypenet report "
                f"{shlex.quote(str(other.root))}` makes it"
            )
    if again or not has_entry(folder.report_file):
        evaluate(
            folder, load_run_config(folder.config_file, [f"output_dir={folder.root}"]), again=again
        )
    pages = draw([folder, *others])
    show(folder, pages, as_json=as_json)


def draw(folders: list[RunFolder]) -> list[Path]:
    """Write the page of the first folder's run and, when there is a second one, the page of both
    into the first; returns the pages."""
    from megatron_hypenet.halo.report_data import run_data
    from megatron_hypenet.halo.report_page import file_name, write_page

    first = folders[0]
    found = [
        run_data(folder, readable(folder), label)
        for folder, label in zip(folders, labels(folders), strict=True)
    ]
    with first.owned():
        if len(found) == 1:
            write_page(found, first.report_page, first.report_plot)
            return [first.report_page]
        page = first.report_page.with_name(f"compare_{file_name(found[1].label)}.html")
        write_page(found, page, page.with_suffix(".png"))
        return [page]


def readable(folder: RunFolder) -> RunConfig | None:
    """Return the configuration of a run; None where this version does not know all of it."""
    from megatron_hypenet.config.loader import load_run_config
    from megatron_hypenet.errors import ConfigError

    try:
        return load_run_config(folder.config_file, [f"output_dir={folder.root}"])
    except ConfigError:
        return None


def labels(folders: list[RunFolder]) -> list[str]:
    """Return the shortest ends of the folders' paths that tell them apart."""
    paths = [folder.root.resolve() for folder in folders]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


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


def show(folder: RunFolder, pages: list[Path], *, as_json: bool) -> None:
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
    for page in pages:
        print(f"{'page:':<13}{page}")
        print(f"{'figure:':<13}{page.with_suffix('.png')}")
    if evaluation:
        from megatron_hypenet.eval import results

        print(f"\nhypenet eval ({folder.root / EVALUATION}):\n{results.table(evaluation)}")


def evaluated(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the rows that `hypenet eval` has left in the run, none where it did not run."""
    from megatron_hypenet.eval.results import read_results
    from megatron_hypenet.untrusted.files import has_entry

    file = folder.root / EVALUATION
    return read_results(file)[1] if has_entry(file) else []
