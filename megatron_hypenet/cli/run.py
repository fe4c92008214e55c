"""All of HALO in order: teacher in, Hugging Face HypeNet out. Start it again and it continues where
it stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

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

if TYPE_CHECKING:
    from megatron_hypenet.config.schema import RunConfig

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
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
    """Import the teacher, align, select layers, assemble, distil, finetune, export to Hugging Face
    format, and report.

    Examples:

      hypenet run configs/run/quickstart.yaml teacher=/models/Qwen3-0.6B data=corpus.txt

      hypenet run configs/run/distill_2b.yaml teacher=/models/Qwen3-1.7B data=corpus --tp 2
        --nproc 8

      hypenet run configs/run/distill_2b.yaml teacher=/models/Qwen3-1.7B data=corpus
        --launcher hostfile --hostfile hosts
    """
    from megatron_hypenet.cli import processes
    from megatron_hypenet.config.loader import load_run_config

    processes.choose(launcher, hostfile, env)
    settings = load_run_config(config, collect_overrides(overrides, tp=tp, pp=pp, cp=cp))
    run_all(
        settings,
        nproc=nproc,
        overwrite=overwrite,
        redo_from=redo_from,
        dry_run=dry_run,
        as_json=as_json,
    )


def run_all(
    settings: RunConfig,
    *,
    nproc: int | None,
    overwrite: bool,
    redo_from: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Do, or with `dry_run` list, every step of a run that is not done, then show the report."""
    from megatron_hypenet.cli import pipeline

    if dry_run:
        found = pipeline.checked(settings, overwrite=overwrite, redo_from=redo_from, nproc=nproc)
        pipeline.show_plan(
            settings, pipeline.planned(settings, overwrite=overwrite), found, as_json=as_json
        )
        return
    with pipeline.prepared(
        settings, overwrite=overwrite, redo_from=redo_from, nproc=nproc
    ) as ready:
        ready.runner.run_all()
        if ready.is_main:
            from megatron_hypenet.cli.report import show

            ready.screen.close()
            show(ready.folder, [ready.folder.report_page], as_json=as_json)
