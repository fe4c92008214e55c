"""The whole pipeline on the bundled tiny teacher: a few minutes on two CPU cores, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_hypenet.cli import processes
from megatron_hypenet.cli.options import (
    ContextParallelOption,
    DryRunOption,
    JsonOption,
    OverridesArgument,
    PipelineParallelOption,
    ProcessesOption,
    RedoOption,
    TensorParallelOption,
    collect_overrides,
)
from megatron_hypenet.config.bundled import bundle

app = typer.Typer(add_completion=False, rich_markup_mode=None)

CONFIG = bundle() / "configs" / "run" / "demo.yaml"


@app.command()
def demo(
    overrides: OverridesArgument = None,
    tp: TensorParallelOption = None,
    pp: PipelineParallelOption = None,
    cp: ContextParallelOption = None,
    nproc: ProcessesOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Run folder (runs/demo); an unfinished demo in it is continued."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier demo in --out and start again.")
    ] = False,
    redo_from: RedoOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Distil the bundled Qwen3 into a HypeNet and compare both: held-out loss, and recall up to 8
    times the training length.

    Examples:

      hypenet demo

      hypenet demo --out runs/longer distill.train_iters=600
    """
    from megatron_hypenet.config.loader import load_run_config
    from megatron_hypenet.errors import SetupError, UsageError

    if not CONFIG.is_file():
        raise SetupError(
            f"{CONFIG} is missing: the demo needs the configs/ and assets/ that come with the "
            "package; install it again"
        )
    processes.use_all_cores()
    words = collect_overrides(overrides, tp=tp, pp=pp, cp=cp)
    if out is not None:
        if any(word.startswith("output_dir=") for word in words):
            raise UsageError("--out and output_dir= are the same setting; give one of them")
        words = [*words, f"output_dir={out}"]
    settings = load_run_config(CONFIG, words)
    from megatron_hypenet.cli.run import run_all

    run_all(
        settings,
        nproc=nproc,
        overwrite=overwrite,
        redo_from=redo_from,
        dry_run=dry_run,
        as_json=as_json,
    )
