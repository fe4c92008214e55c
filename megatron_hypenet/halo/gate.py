"""The check between training stages: a run whose student fell below a bound of `eval.gate` stops
there, before the next stage is paid for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hypenet.config.schema import GateConfig
from megatron_hypenet.errors import QualityError
from megatron_hypenet.halo.evaluation import Measure
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.model.memory import release_memory


def check(
    stage: str,
    bounds: GateConfig,
    measure: Measure,
    *,
    teacher: Callable[[], HypeNetModel],
    student: Callable[[], HypeNetModel],
    kept: Path,
) -> dict[str, Any]:
    """Measure what `bounds` are about and return it. `teacher` and `student` build the models, one
    after the other; `kept` is the stage's checkpoint.

    Raises QualityError, with what was found and how to go on; NaN keeps no bound."""
    found: dict[str, Any] = {}
    broken: list[str] = []
    model = student()
    if bounds.max_loss_ratio is not None:
        found["heldout_loss"], _ = measure.heldout_scores(model)
    if bounds.min_recall is not None:
        found["recall"] = measure.recall(model, bounds.recall_multiple)
        if not found["recall"] >= bounds.min_recall:
            tokens = bounds.recall_multiple * measure.run.eval.seq_length
            broken.append(
                f"its recall at {tokens:,} tokens is {found['recall']:.1f} %, the bound "
                f"eval.gate.{stage}.min_recall={bounds.min_recall:g}"
            )
    del model
    release_memory()
    if bounds.max_loss_ratio is not None:
        found["teacher_loss"], _ = measure.heldout_scores(teacher())
        release_memory()
        found["loss_ratio"] = found["heldout_loss"] / found["teacher_loss"]
        if not found["loss_ratio"] <= bounds.max_loss_ratio:
            broken.append(
                f"its held-out loss is {found['heldout_loss']:.4f} nats per token, "
                f"{found['loss_ratio']:.3f} times the teacher's {found['teacher_loss']:.4f}, the "
                f"bound eval.gate.{stage}.max_loss_ratio={bounds.max_loss_ratio:g}"
            )
    if broken:
        raise QualityError(
            f"the student after {stage} is below its gate: {'; and '.join(broken)}. "
            f"Its checkpoint stays: {kept}. Train the stage otherwise "
            f"(--redo-from {stage}), or accept the student with another bound (null for none); "
            "the same command then goes on"
        )
    return found
