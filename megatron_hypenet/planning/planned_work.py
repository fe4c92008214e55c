"""Count the work of each step of a run: operations, evaluations and saves, as `Clock` of eta.py and
the estimate of hours take it. Operations are counted as in model/flops.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import GATES, STAGES, RunConfig
from megatron_hypenet.model.flops import forward_flops
from megatron_hypenet.planning.layout_search import teacher_and_student
from megatron_hypenet.stages.selection.method import selection_method
from megatron_hypenet.stages.spec import stage_spec
from megatron_hypenet.training.tags import LM_LOSS


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """The work of a step."""

    flops: float = 0.0
    """Operations without those of evaluations; 0 for steps that move files."""
    evaluations: int = 0
    """Held-out evaluations inside a training stage."""
    evaluation_flops: float = 0.0
    """Operations of each of them."""
    saves: int = 0
    parts: tuple[float, ...] = ()
    """Work of the parts that it reports, where they differ."""


def planned_work(run: RunConfig, teacher: ModelConfig, steps: Sequence[str]) -> dict[str, Planned]:
    """Return the work of each of `steps` (names) in this order, in floating-point operations."""
    # which layers will keep attention is not known yet; that a quarter does decides the work
    _, student = teacher_and_student(teacher, run.align.spec)
    select = selection_method(run.select.method).flops(
        run.select, teacher, teacher.converted(run.align.spec)
    )
    students = sum(stage_spec(name).through_head for name in STAGES)
    reported = (teacher, teacher.converted(run.align.spec), *[student] * students)
    report = tuple(flops for model in reported for flops in _row_flops(run, model))
    quick = _quick_flops(run, teacher)
    planned = {
        "probe": Planned(flops=sum(quick), parts=quick),
        "select": Planned(flops=select),
        "report": Planned(flops=sum(report), parts=report),
    }
    for name in STAGES:
        stage = run.stage(name)
        spec = stage_spec(name)
        trained = spec.student_shape(teacher, student, run.align.spec)
        per_token = spec.flops(stage, teacher, trained)
        evaluation = sum(_quick_flops(run, student)) if spec.through_head else 0.0
        if spec.loss(stage) != LM_LOSS:  # that one is measured with the others of a student
            tokens = run.eval.quick_sequences * min(stage.seq_length, run.eval.seq_length)
            evaluation += tokens * spec.forward_flops(stage, teacher, trained)
        planned[name] = Planned(
            flops=stage.train_iters * stage.tokens_per_step * per_token,
            # the last step is always evaluated
            evaluations=-(-stage.train_iters // run.eval_every(stage)),
            evaluation_flops=evaluation,
            saves=max(1, -(-stage.train_iters // stage.save_interval)),
        )
    for gate, before in GATES.items():
        planned[gate] = Planned(flops=_gate_flops(run, teacher, before))
    return {name: planned.get(name, Planned()) for name in steps}


def _gate_flops(run: RunConfig, teacher: ModelConfig, stage: str) -> float:
    """Return the operations of the check after a training stage."""
    settings, bounds = run.eval, run.eval.gate.after(stage)
    flops = 0.0
    if bounds.max_loss_ratio is not None:  # teacher and student
        tokens = 2 * settings.heldout_sequences * settings.seq_length
        flops += tokens * forward_flops(teacher, settings.seq_length)
    if bounds.min_recall is not None:
        length = bounds.recall_multiple * settings.seq_length
        flops += settings.recall_sequences * length * forward_flops(teacher, length)
    return flops


def _row_flops(run: RunConfig, model: ModelConfig) -> list[float]:
    """Count the work of the parts of one `Measure.row`: text at the report's length, then recall
    and text at each multiple of it."""
    settings = run.eval
    lengths = [settings.seq_length, *(m * settings.seq_length for m in settings.length_multiples)]
    counts = [settings.heldout_sequences]
    for multiple in settings.length_multiples:
        # the text of the first part once more, in fewer sequences
        again = max(1, settings.heldout_sequences // multiple) if multiple != 1 else 0
        counts.append(settings.recall_sequences + again)
    return [
        count * length * forward_flops(model, length)
        for count, length in zip(counts, lengths, strict=True)
    ]


def _quick_flops(run: RunConfig, model: ModelConfig) -> tuple[float, float]:
    """Count the work of the parts of one `Measure.quick`: held-out text, and recall documents at
    the shortest length."""
    settings = run.eval
    first, second = (
        settings.quick_sequences * length * forward_flops(model, length)
        for length in (settings.seq_length, min(settings.length_multiples) * settings.seq_length)
    )
    return first, second
