"""One training stage of HALO: align (1), distill (2) or finetune (3)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_hypenet.cli import completion
from megatron_hypenet.cli.options import (
    ConfigArgument,
    ContextParallelOption,
    DryRunOption,
    HostfileOption,
    JsonOption,
    LauncherOption,
    OverridesArgument,
    OverwriteOption,
    PipelineParallelOption,
    ProcessesOption,
    RedoOption,
    TensorParallelOption,
    VariablesOption,
    collect_overrides,
)
from megatron_hypenet.config.schema import STAGES

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    stage: Annotated[
        str,
        typer.Option(
            "--stage",
            help=f"{', '.join(STAGES)}, or its number; default: the first that is not done.",
            autocompletion=completion.stages,
        ),
    ] = "",
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            help="Student that the stage starts from; default: what the run folder holds.",
        ),
    ] = None,
    tp: TensorParallelOption = None,
    pp: PipelineParallelOption = None,
    cp: ContextParallelOption = None,
    nproc: ProcessesOption = None,
    launcher: LauncherOption = "local",
    hostfile: HostfileOption = None,
    env: VariablesOption = None,
    overwrite: OverwriteOption = False,
    redo_from: RedoOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train one stage in the run folder; the steps before it are done first where the run folder
    lacks them.

    With --init the stage starts from that checkpoint instead, and nothing but teacher and data is
    made before it. An interrupted stage continues from its newest checkpoint.

    Examples:

      hypenet train configs/run/quickstart.yaml teacher=/models/Qwen3-0.6B data=corpus.txt

      hypenet train configs/run/quickstart.yaml --stage 3
        --init runs/other/distill teacher=/models/Qwen3-0.6B data=corpus.txt
    """
    from megatron_hypenet.cli import pipeline, processes
    from megatron_hypenet.config.loader import load_run_config
    from megatron_hypenet.errors import UsageError

    processes.choose(launcher, hostfile, env)
    settings = load_run_config(config, collect_overrides(overrides, tp=tp, pp=pp, cp=cp))
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.halo.tasks import halo_steps, stage_name, starts_from

    can_start = starts_from(halo_steps(settings, RunFolder(settings.output_dir)))
    if init is not None and not stage:
        raise UsageError(
            f"--init needs --stage: say which stage starts from it, {' or '.join(can_start)}"
        )
    chosen = stage_name(stage) if stage else None
    if init is not None and chosen not in can_start:
        raise UsageError(
            f"--init is for {' and '.join(can_start)}; stage {chosen} starts from the teacher"
        )
    begin = start_of(chosen, init)
    found = pipeline.checked(
        settings, overwrite=overwrite, redo_from=redo_from, init=begin, nproc=nproc
    )
    name = chosen or first_unfinished(pipeline.planned(settings, overwrite=overwrite))
    if init is not None:
        check_init(
            init, starts=not dry_run and processes.planned_start(found.num_processes) is not None
        )
    if dry_run:
        rows = [
            row
            for row in pipeline.planned(settings, overwrite=overwrite)
            if init is None or row["step"] in ("teacher", "data", name)
        ]
        rows = rows[: [row["step"] for row in rows].index(name) + 1]
        pipeline.show_plan(settings, rows, found, as_json=as_json, stage=name)
        return
    with pipeline.prepared(
        settings, overwrite=overwrite, redo_from=redo_from, init=begin, nproc=nproc
    ) as ready:
        checkpoint = ready.halo.train_from(ready.runner, name, init)
        if ready.is_main:
            ready.screen.close()
            print(
                json.dumps({"stage": name, "checkpoint": str(checkpoint)})
                if as_json
                else checkpoint
            )
            print(f"TensorBoard: tensorboard --logdir {ready.folder.tensorboard}", file=sys.stderr)


def start_of(stage: str | None, init: Path | None) -> tuple[str, Path] | None:
    """Return the stage that begins from a checkpoint of elsewhere, and that checkpoint; None
    without --init. Raises CheckpointError."""
    from megatron_hypenet.checkpoint.find import resolve

    if init is None or stage is None:
        return None
    return stage, resolve(init, fall_back=False)


def check_init(init: Path, *, starts: bool) -> None:
    """Raise CheckpointError for a student to start from that is damaged, before a run folder is
    made for it.

    A command that only `starts` the processes leaves the hashes to the first of them.
    """
    from megatron_hypenet.checkpoint.find import resolve
    from megatron_hypenet.checkpoint.manifest import verify_files
    from megatron_hypenet.cli import processes

    verify_files(resolve(init, fall_back=False), hashes=processes.is_rank0() and not starts)


def first_unfinished(steps: list[dict[str, Any]]) -> str:
    """Return the first training stage among the steps of a run that is not done; the last stage
    when all are."""
    return next(
        (row["step"] for row in steps if row["step"] in STAGES and row["state"] != "done"),
        STAGES[-1],
    )
