"""HALO in order: teacher -> alignment -> layer selection -> assembly -> distillation -> finetuning
-> export -> report.

This is the table only, without the actions (actions.py), so that a command that only plans a run or
starts its processes imports no models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.find import finished_checkpoint, is_whole
from megatron_hypenet.config.schema import GATES, STAGES, RunConfig, SourceConfig
from megatron_hypenet.errors import CheckpointError, ConfigError
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import Step, identity_of

Action = Callable[[], dict[str, Any]]

STAGE_ALIASES = {str(number): name for number, name in enumerate(STAGES, 1)}
"""HALO's stage numbers for the names of the training stages."""


def halo_steps(
    run: RunConfig, folder: RunFolder, action_of: Callable[[str], Action] | None = None
) -> list[Step]:
    """Return all tasks of `run` in order; `action_of(name)` gives the action of one. Without it
    they can be planned but not run."""

    def step(
        name: str,
        does: str,
        after: tuple[str, ...],
        settings: tuple[str, ...],
        results: tuple[Path, ...],
        inputs: Callable[[], Any] = lambda: None,
        alone: bool = False,
        files: Callable[[], Iterable[Path]] = tuple,
        decides: bool = True,
    ) -> Step:
        config = run.stage(name) if name in STAGES else None
        action = action_of(name) if action_of is not None else _only_planned
        return Step(
            name=name,
            does=does,
            after=after,
            settings=settings,
            results=results,
            action=action,
            inputs=inputs,
            alone=alone,
            checkpoint=checkpoint_of(run, folder, name),
            files=files,
            decides=decides,
            length=config.train_iters if config else None,
            decay=config.decay_iters if config else None,
        )

    training = ("data", "seed", "precision")
    after_text = ("teacher", "data")
    align, distill, finetune = (folder.stage(name) for name in ("align", "distill", "finetune"))
    chosen = (folder.scores_file, folder.mixers_file)
    reported = (folder.report_file, folder.report_plot)
    steps = [
        step(
            "teacher",
            "import the teacher",
            (),
            (),
            (folder.teacher,),
            lambda: identity_of([run.teacher]),
            alone=True,
        ),
        step(
            "data",
            "tokenize the text",
            ("teacher",),
            (),
            (folder.data,),
            lambda: _texts(run),
            alone=True,
            files=lambda: _files_in(folder.data),
        ),
        step(
            "probe",
            "check that the teacher predicts text, and that the text is long enough",
            after_text,
            ("precision",),
            (),
            lambda: _checked_lengths(run),
            decides=False,
        ),
        step(
            "align",
            "stage 1: align an RNN mixer per layer",
            ("probe",),
            ("align", *training),
            (align,),
            lambda: _in_fp8(teacher=run.fp8.teacher),
        ),
        step("select", "score and rank the layers", ("align",), ("select",), chosen),
        step(
            "assemble",
            "assemble the student",
            ("align", "select"),
            ("seed",),
            (folder.assembled,),
            lambda: identity_of([folder.mixers_file]),
            alone=True,
        ),
        step(
            "distill",
            "stage 2: distil from the teacher",
            ("assemble",),
            ("distill", *training),
            (distill,),
            lambda: _in_fp8(teacher=run.fp8.teacher, student=run.fp8.student),
        ),
        step(
            "finetune",
            "stage 3: finetune on long sequences",
            ("distill",),
            ("finetune", *training),
            (finetune,),
            lambda: _in_fp8(
                teacher=run.fp8.teacher and run.finetune.teacher_weight > 0,
                student=run.fp8.student,
            ),
        ),
        step(
            "export",
            "export to Hugging Face format",
            ("finetune",),
            ("export",),
            (folder.export,),
            alone=True,
            # the report adds its figures to the model card
            files=lambda: (file for file in _files_in(folder.export) if file.name != "README.md"),
        ),
        step("report", "evaluate and report", ("finetune", "select"), ("eval", "export"), reported),
    ]
    for name, stage in GATES.items():
        bounds = run.eval.gate.after(stage)
        if bounds.is_set:
            gate = step(
                name,
                f"check what the student is worth after {stage}",
                (stage,),
                ("eval", "export"),
                (),
                lambda bounds=bounds: bounds.model_dump(mode="json"),  # type: ignore[misc]
                decides=False,
            )
            steps = _with_gate(steps, gate)
    return steps


def _files_in(folder: Path) -> list[Path]:
    """Return the files in a folder and in those below it, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _with_gate(steps: list[Step], gate: Step) -> list[Step]:
    """Put a gate behind the stage that it comes after, and before what comes after that stage."""
    (stage,) = gate.after
    at = [step.name for step in steps].index(stage) + 1
    later = [
        replace(step, after=(*step.after, gate.name)) if stage in step.after else step
        for step in steps[at:]
    ]
    return [*steps[:at], gate, *later]


def starts_from(steps: Iterable[Step]) -> dict[str, str]:
    """Return, by training stage, the task that leaves the student which it starts from: the first
    that it comes after, when that is another stage or the assembly. Others start from the
    teacher."""
    first = {step.name: step.after[0] for step in steps if step.name in STAGES}
    return {stage: task for stage, task in first.items() if task in (*STAGES, "assemble")}


def _in_fp8(**what: bool | str | None) -> dict[str, Any] | None:
    """Return what a stage computes in FP8; None where that is nothing, as before there was FP8."""
    return {name: value for name, value in what.items() if value} or None


def _checked_lengths(run: RunConfig) -> list[Any]:
    """Return the settings that the probe compares with teacher and text."""
    return [
        run.guard.max_teacher_loss,
        [run.stage(name).seq_length for name in STAGES],
        [run.select.seq_length, run.select.recall_pairs],
        [
            run.eval.seq_length,
            run.eval.recall_pairs,
            *run.eval.length_multiples,
            *sorted(set(run.eval.gate.multiples) - set(run.eval.length_multiples)),
        ],
        run.data.model_dump(mode="json", exclude={"train", "heldout"}),
        *([run.guard.max_fp8_kl] if run.fp8.teacher else []),
    ]


def from_init(step: Step, start: Path) -> Step:
    """Return training stage `step` as it begins from the checkpoint `start` of elsewhere: nothing
    but teacher and data comes before it."""
    return replace(
        step, after=("teacher", "data"), inputs=lambda: identity_of([start / fmt.MANIFEST])
    )


def _texts(run: RunConfig) -> dict[str, Any]:
    """Return the content of the training and held-out data, and how it is read where that is not as
    usual."""
    train, heldout = run.data.sources, run.data.heldout_source
    found: dict[str, Any] = {
        "train": identity_of([source.path for source in train]),
        "heldout": identity_of([] if heldout is None else [heldout.path]),
    }
    settings = [source.model_dump(exclude={"path"}) for source in run.data.every_source]
    usual = SourceConfig(path=Path()).model_dump(exclude={"path"})
    return found if all(one == usual for one in settings) else {**found, "settings": settings}


def checkpoint_of(run: RunConfig, folder: RunFolder, name: str) -> Callable[[], Path | None] | None:
    """Return a function that returns the folder of the checkpoint that task `name` leaves, or None
    when it is not complete.

    Returns None for a task that leaves no checkpoint.
    """
    if name in STAGES:
        return lambda: finished_checkpoint(folder.stage(name), run.stage(name).train_iters)
    place = {"teacher": folder.teacher, "assemble": folder.assembled}.get(name)
    return None if place is None else lambda: place if is_whole(place) else None


def required_checkpoint(run: RunConfig, folder: RunFolder, name: str) -> Path:
    """Return the checkpoint that the finished task `name` left. Raises CheckpointError when it is
    missing or incomplete; an older one is not accepted."""
    find = checkpoint_of(run, folder, name)
    assert find is not None, f"{name} leaves no checkpoint"
    found = find()
    if found is None:
        place = folder.stage(name) / fmt.CHECKPOINTS if name in STAGES else folder.root
        raise CheckpointError(
            f"the result of step {name} is missing or damaged in {place}; "
            f"`hypenet run {folder.config_file}` makes it again"
        )
    return found


def _only_planned() -> dict[str, Any]:
    raise AssertionError("these steps were made for a plan")


def stage_name(word: str) -> str:
    """Return the training stage meant by a name or by HALO's number; ConfigError lists the
    choices."""
    name = STAGE_ALIASES.get(word, word)
    if name not in STAGE_ALIASES.values():
        raise ConfigError(
            f"--stage {word}: unknown stage; use {', '.join(STAGES[:-1])} or {STAGES[-1]} "
            f"(or {', '.join(STAGE_ALIASES)})"
        )
    return name
