"""Prepare a run to start: processes, run folder, screen, and HALO's tasks with import and export.

Not a verb: `run`, `train`, `select`, `demo` and `report` share it. Here HALO, which works on
checkpoints only, is given the functions of `export/`.

One file, because every verb that runs tasks takes the same way through it.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hypenet.cli import processes
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.errors import CheckpointError, SetupError, UsageError
from megatron_hypenet.process_place import under_way

if TYPE_CHECKING:
    from megatron_hypenet.cli.progress import Screen
    from megatron_hypenet.halo.actions import Halo
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.halo.task_runner import Runner, Step


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The objects that a verb needs to run tasks."""

    run: RunConfig
    folder: RunFolder
    halo: Halo
    runner: Runner
    screen: Screen
    is_main: bool


@dataclass(frozen=True, slots=True)
class Checked:
    """The results of `checked`."""

    shape: ModelConfig
    """The teacher's shape."""
    num_processes: int
    changes: tuple[str, ...] = ()
    """What differs from the run in the folder, and what becomes of its results, for a person."""


@contextmanager
def prepared(
    run: RunConfig,
    *,
    overwrite: bool = False,
    redo_from: str | None = None,
    init: tuple[str, Path] | None = None,
    nproc: int | None = None,
    as_it_is: bool = False,
) -> Iterator[Pipeline]:
    """Start the process groups, check or create the run folder, and end both with the block. Raises
    ConfigError, UsageError.

    `init` is a stage that begins from a checkpoint of elsewhere, and that checkpoint. With
    `as_it_is` results are taken as they are, whatever made them. Where several processes are needed
    and no launcher started them, they are started here, and this process ends with their exit code.
    """
    found = checked(
        run,
        overwrite=overwrite,
        redo_from=redo_from,
        init=init,
        nproc=nproc,
        as_it_is=as_it_is,
    )
    if processes.join() is None:
        refuse_in_use(run.output_dir)
    processes.start_here(found.num_processes)
    if processes.is_rank0():
        warn(run, found)
    configure_logging()
    from megatron_hypenet.cli.banner import banner
    from megatron_hypenet.export.model_card import add_figures
    from megatron_hypenet.halo.actions import Halo
    from megatron_hypenet.halo.changes import finish_redo
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.parallel import groups
    from megatron_hypenet.supervision.events import commands_at_end
    from megatron_hypenet.supervision.faults import watched
    from megatron_hypenet.supervision.hang_watchdog import collective_minutes
    from megatron_hypenet.supervision.signals import leaving_at_once
    from megatron_hypenet.supervision.start_record import recorded

    folder = RunFolder(run.output_dir)
    is_main = processes.is_rank0()
    with ExitStack() as stack:
        if is_main:
            stack.enter_context(folder.owned())
        stack.callback(groups.destroy_parallel)
        groups.init_parallel(
            run.parallel, seed=run.seed, collective_minutes=collective_minutes(run.guard)
        )
        change = (
            []
            if as_it_is or not is_main
            else take_over(run, folder, overwrite=overwrite, redo_from=redo_from, init=init)
        )
        if is_main:
            words = processes.WORDS.get()
            stack.enter_context(recorded(folder.root, words, found.num_processes))
            stack.enter_context(commands_at_end(run.on_event, folder.root))
        groups.barrier()
        screen = screen_of(run, folder, found)
        stack.callback(screen.close)
        for line in [*change, *banner(run, found.shape, found.num_processes)]:
            screen.say(line)
        halo = Halo(
            run=run,
            folder=folder,
            import_teacher=import_teacher,
            export_student=lambda checkpoint, out: export_student(run, checkpoint, out),
            note_figures=add_figures,
            on_step=screen.on_step,
            on_part=screen.part,
            on_pause=screen.pause,
            log=screen.train_line,
        )
        steps = halo.steps()
        screen.does.update({step.name: step.does for step in steps})
        runner = runner_of(run, folder, steps, screen)
        with watched(folder.root, run.guard), leaving_at_once():
            yield Pipeline(
                run=run, folder=folder, halo=halo, runner=runner, screen=screen, is_main=is_main
            )
        if is_main:
            finish_redo(folder)


def screen_of(run: RunConfig, folder: RunFolder, found: Checked) -> Screen:
    """Return the output of this process, with a clock that knows the speeds of earlier starts."""
    from megatron_hypenet.cli.progress import Screen
    from megatron_hypenet.halo.tasks import halo_steps
    from megatron_hypenet.planning.eta import Clock, read_rates, write_rates
    from megatron_hypenet.planning.planned_work import planned_work

    steps = [step.name for step in halo_steps(run, folder)]
    clock = Clock(planned_work(run, found.shape, steps), read_rates(folder.root))
    screen = Screen(clock, folder.log_file, is_main=processes.is_rank0())
    if screen.is_main:
        screen.keep = lambda: write_rates(folder.root, clock.rates)
    return screen


def announced(run: RunConfig, folder: RunFolder, screen: Screen, step: str, what: str) -> None:
    """Say that a step starts, is skipped or is done, and tell the commands of `on_event` of a stage
    or a run that is done."""
    from megatron_hypenet.config.schema import STAGES
    from megatron_hypenet.supervision.events import RUN_DONE, STAGE_DONE, run_commands

    screen.announce(step, what)
    last = step == list(screen.does)[-1]
    if screen.is_main and what.startswith("done") and (last or step in STAGES):
        event = RUN_DONE if last else STAGE_DONE
        run_commands(run.on_event, event, root=folder.root, step=step, message=f"{step} is {what}")


def runner_of(run: RunConfig, folder: RunFolder, steps: list[Step], screen: Screen) -> Runner:
    """Return the runner of `steps` on all processes, which announces them on `screen`."""
    from megatron_hypenet.checkpoint.load import verify_together
    from megatron_hypenet.checkpoint.manifest import WEIGHTS_PARTS
    from megatron_hypenet.halo.task_runner import Runner
    from megatron_hypenet.parallel import groups
    from megatron_hypenet.parallel.agreement import decided_by_first
    from megatron_hypenet.supervision.signals import leave_if_stopped

    return Runner(
        run,
        folder,
        steps,
        is_main=processes.is_rank0(),
        barrier=groups.barrier,
        announce=partial(announced, run, folder, screen),
        limited=screen.count_only,
        may_start=lambda step: leave_if_stopped(f"step {step}", [folder.root]),
        decided=decided_by_first,
        verify=lambda checkpoint: verify_together(checkpoint, parts=WEIGHTS_PARTS),
    )


def take_over(
    run: RunConfig,
    folder: RunFolder,
    *,
    overwrite: bool,
    redo_from: str | None,
    init: tuple[str, Path] | None = None,
) -> list[str]:
    """Make the folder, which this process owns, ready for `run`; returns what has changed there, as
    lines for the log."""
    from megatron_hypenet.halo.changes import accept

    lines = [] if overwrite else accept(run, folder, redo_from, init).lines()
    folder.prepare(run, overwrite=overwrite)
    return lines


def refuse_in_use(folder: Path) -> None:
    """Raise UsageError when another command or a job of SLURM works in the run folder; for the
    command that a person gives.

    It is cheap and comes before anything is started. The process that then writes into the folder
    owns it (RunFolder.owned).
    """
    from megatron_hypenet.cluster.jobs import refuse_live_jobs
    from megatron_hypenet.ownership import refuse_if_owned

    if under_way():
        return
    refuse_if_owned(folder)
    refuse_live_jobs(folder)


def checked(
    run: RunConfig,
    *,
    overwrite: bool = False,
    redo_from: str | None = None,
    init: tuple[str, Path] | None = None,
    nproc: int | None = None,
    world_size: int | None = None,
    as_it_is: bool = False,
    on_gpus: bool | None = None,
) -> Checked:
    """Check everything that can be checked before a process, a folder or a model is made.

    `redo_from` is the step that --redo-from names, `init` a stage that begins from a checkpoint of
    elsewhere, and that checkpoint; with `as_it_is` changes are not looked at. `nproc` is what
    --nproc asks for on this machine; `world_size` is the number of processes of a run that others
    will start, and `on_gpus` whether it will have GPUs (default: whether this machine has some).
    """
    from megatron_hypenet.config.checks import check_run
    from megatron_hypenet.halo.changes import changed
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.halo.task_runner import identity_of

    folder = RunFolder(run.output_dir)
    if overwrite and redo_from is not None:
        raise UsageError(
            "--overwrite deletes the whole run, --redo-from keeps a part of it: give one of them"
        )
    if not overwrite:
        folder.check_known(run)
        if not under_way():
            folder.refuse_stop()
    shape = teacher_shape(run.teacher)
    num_processes = world_size or processes.count(run, shape, nproc)
    # a number of processes that only follows from the layout does not restrict the advice
    follows = (
        not (world_size or nproc or processes.join())
        and num_processes == run.parallel.model_parallel_size
    )
    check_run(shape, run, None if follows else num_processes)
    identity_of([source.path for source in run.data.every_source])
    check_trackers(run)
    if not world_size:
        check_gpu_software(run)
    # processes that others start later (`world_size`) are not those that this environment tells of
    if world_size or (not under_way() and processes.join() is None):
        check_data(run, again=overwrite, on_gpus=on_gpus)
    lines = [] if overwrite or as_it_is else changed(run, folder, redo_from, init).lines()
    return Checked(shape, num_processes, tuple(lines))


def check_gpu_software(run: RunConfig) -> None:
    """Raise SetupError where the run asks for Transformer Engine or FP8 and this machine lacks what
    they need."""
    if run.model.transformer_impl == "transformer_engine":
        from megatron_hypenet.model import transformer_engine

        transformer_engine.require("model.transformer_impl=transformer_engine")
    if run.fp8.used:
        from megatron_hypenet.model.fp8_layers import require_fp8_gpu

        require_fp8_gpu("fp8.teacher" if run.fp8.teacher else "fp8.student")


def check_trackers(run: RunConfig) -> None:
    """Raise SetupError where a tracker is asked for whose library is not installed."""
    import importlib.util

    for name in type(run.trackers).model_fields:
        if getattr(run.trackers, name) is not None and importlib.util.find_spec(name) is None:
            raise SetupError(
                f"trackers.{name} is set, and Python finds no module {name}; "
                "pip install 'megatron-hypenet[trackers]', or leave the setting out"
            )


def check_data(run: RunConfig, *, again: bool, on_gpus: bool | None = None) -> None:
    """Look at the lengths of recall documents, and at the files and the first document of every
    source of data. Raises DataError.

    A large text is refused where GPUs would wait for it, unless it was tokenized before and is not
    to be done `again`.
    """
    from megatron_hypenet.data.check import (
        check_recall_lengths,
        check_source,
        refuse_large_text,
    )
    from megatron_hypenet.data.pairs import INDEX_FILE
    from megatron_hypenet.halo.run_folder import RunFolder

    check_recall_lengths(run)
    sizes = [check_source(source) for source in run.data.every_source]
    done = (RunFolder(run.output_dir).data / INDEX_FILE).is_file() and not again
    if done or run.device == "cpu" or not any(sizes):
        return
    if processes.has_gpus() if on_gpus is None else on_gpus:
        refuse_large_text(run.data.every_source, run.teacher)


def warn(run: RunConfig, found: Checked) -> None:
    """Print warnings on stderr about settings that are allowed but probably a mistake."""
    from megatron_hypenet.config.checks import layout_warnings
    from megatron_hypenet.config.layout import Layout

    for line in layout_warnings(Layout(found.shape, run, found.num_processes)):
        print(f"warning: {line}", file=sys.stderr)


def planned(run: RunConfig, *, overwrite: bool = False) -> list[dict[str, Any]]:
    """Return the steps of a run that was `checked`, and their state; starts and writes nothing."""
    from megatron_hypenet.halo.older_records import up_to_date
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.halo.task_runner import Runner
    from megatron_hypenet.halo.tasks import halo_steps

    folder = up_to_date(RunFolder(run.output_dir), run)
    rows = Runner(run, folder, halo_steps(run, folder)).plan()
    return [{**row, "state": "to do"} for row in rows] if overwrite else rows


def show_plan(
    run: RunConfig, rows: list[dict[str, Any]], found: Checked, *, as_json: bool, **more: Any
) -> None:
    """Print the output of --dry-run: the resolved configuration, the processes that would start,
    and the steps; `more` is for JSON."""
    from megatron_hypenet.config.loader import dump_config

    warn(run, found)
    start = processes.planned_start(found.num_processes)
    if as_json:
        print(
            json.dumps(
                {
                    **more,
                    "config": run.model_dump(mode="json"),
                    "launch": start and start.describe(),
                    "changes": list(found.changes),
                    "steps": rows,
                }
            )
        )
        return
    print(dump_config(run))
    if start:
        print("\n".join(start.lines()))
    for line in found.changes:
        print(line)
    print(f"steps in {run.output_dir}:")
    for number, row in enumerate(rows, start=1):
        print(f"  {number:>2}. {row['step']:<14}{row['state']:<7}{row['does']}")


def teacher_shape(path: Path) -> ModelConfig:
    """Return the shape of the teacher, a Hugging Face folder or a checkpoint, from its headers
    alone. Raises CheckpointError, ConversionError."""
    from megatron_hypenet.checkpoint.find import read_model_config, resolve
    from megatron_hypenet.config.paths import download_hint

    if not path.exists():
        raise CheckpointError(
            f"teacher {path} does not exist; set teacher=PATH to a Hugging Face folder (Qwen3, "
            f"Llama or Qwen2) or a converted checkpoint{download_hint(path)}"
        )
    if (path / "config.json").is_file():
        from megatron_hypenet.export.plan import plan_import

        return plan_import(path).config
    try:
        return read_model_config(resolve(path, fall_back=False))
    except CheckpointError as error:
        raise CheckpointError(
            f"teacher {path}: no Hugging Face folder (it has no config.json), "
            f"and no checkpoint either: {error}. "
            "Set teacher=PATH to a Hugging Face folder (Qwen3, Llama or Qwen2) or a converted "
            "checkpoint"
        ) from error


def import_teacher(source: Path, target: Path) -> None:
    """Make a committed teacher checkpoint at `target`: converted from a Hugging Face folder, or a
    link to a checkpoint that exists."""
    from megatron_hypenet.checkpoint.find import resolve
    from megatron_hypenet.checkpoint.manifest import verify_files
    from megatron_hypenet.export.from_hf import import_hf

    if (source / "config.json").is_file():
        import_hf(source, target, overwrite=True)
    else:
        checkpoint = resolve(source, fall_back=False).resolve()
        verify_files(checkpoint, hashes=True)  # once, before hours of distilling from it
        if target.is_symlink():
            target.unlink()
        target.symlink_to(checkpoint, target_is_directory=True)


def export_student(run: RunConfig, checkpoint: Path, out: Path) -> None:
    """Write the Hugging Face folder of the finished student, with the logit scaling of the
    configuration switched on."""
    from megatron_hypenet.export.to_hf import export_hf

    dtype = None if run.export.dtype == "auto" else run.export.dtype
    export_hf(
        checkpoint,
        out,
        attn_logits_scaling=run.export.attn_logits_scaling,
        dtype=dtype,
        overwrite=True,
    )


def configure_logging() -> None:
    """Show our own messages as plain lines on stderr; notes of the libraries below us only from
    warnings up."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("megatron_hypenet").setLevel(logging.INFO)
    # 0.18 and later warn of each layer spec they adapt
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings(
            "ignore", category=category, module=r"(megatron|torch|deepspeed|transformers)\b"
        )
