"""HALO stage 3: the whole student on long sequences with next-token cross entropy; beside it, where
the settings give it a weight, a divergence from the teacher on the same sequences."""

from __future__ import annotations

from torch import Tensor

from megatron_hypenet.config.computation import Fp8Config
from megatron_hypenet.config.schema import FinetuneConfig, HeadStageConfig, StageConfig
from megatron_hypenet.model.fp8_layers import quantize
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.vocab_loss import linear_cross_entropy
from megatron_hypenet.parallel.vocab_loss.objectives import Objective, objective_of
from megatron_hypenet.stages.base import LocalTokens
from megatron_hypenet.stages.head import FORWARD_KL, HeadSpec, HeadStage, divergences
from megatron_hypenet.stages.spec import ModelSource, register_stage

LM_LOSS = "lm-loss"
MIXED = "mixed-loss"
"""Names of what is minimised, without and with a teacher."""


class FinetuneStage(HeadStage):
    """(1 - w) * cross entropy + w * divergence from the teacher; without a teacher w is 0.

    Each is a mean over the tokens that count, with the head's product inside its chunked loss."""

    name = "finetune"

    def __init__(
        self,
        student: HypeNetModel,
        teacher: HypeNetModel | None = None,
        *,
        chunk_tokens: int | None,
        teacher_weight: float = 0.0,
        objective: Objective = FORWARD_KL,
        fp8: Fp8Config | None = None,
    ) -> None:
        assert (teacher is None) == (teacher_weight == 0), "a teacher has a weight"
        super().__init__(student, teacher, chunk_tokens=chunk_tokens, objective=objective, fp8=fp8)
        self.teacher_weight = teacher_weight

    def head_loss(
        self, tokens: LocalTokens, hidden: Tensor, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean cross entropy of the tokens that follow the inputs (hidden states are [t,
        b, h], so labels are [t, b] too), or its sum with the divergence, and each by itself."""
        loss = linear_cross_entropy(
            hidden,
            self.student.head_weight(),
            tokens.labels.t(),
            chunk_tokens=self.chunk_tokens,
            group=groups.tensor_group(),
            sequence_parallel=self.student.config.sequence_parallel,
            token_weights=None if tokens.weights is None else tokens.weights.t(),
        )
        metrics = {f"train/{LM_LOSS}": loss.detach()}
        if self.frozen_teacher is None:
            return loss, metrics
        divergence, beside = self.divergence(tokens, hidden, teacher_hidden)
        mixed = (1 - self.teacher_weight) * loss + self.teacher_weight * divergence
        return mixed, {**metrics, **beside, f"train/{MIXED}": mixed.detach()}


def teacher_weight(config: StageConfig) -> float:
    """Return the weight of the divergence from the teacher; settings without one have no
    teacher."""
    return config.teacher_weight if isinstance(config, FinetuneConfig) else 0.0


@register_stage
class FinetuneSpec(HeadSpec):
    """The student learns alone, or beside its teacher."""

    name = FinetuneStage.name
    mfu = 0.53

    def quantities(self, config: StageConfig) -> tuple[str, ...]:
        """Return the name of the cross entropy; with a teacher, of the weighted sum before it and
        of the divergence behind it."""
        return (MIXED, LM_LOSS, *divergences(config)) if self.needs_teacher(config) else (LM_LOSS,)

    def needs_teacher(self, config: StageConfig) -> bool:
        """Return whether the divergence has a weight."""
        return teacher_weight(config) > 0

    def num_losses(self, config: StageConfig) -> int:
        """Return 2 with a teacher: cross entropy and divergence."""
        return 2 if self.needs_teacher(config) else 1

    def build(self, source: ModelSource, config: StageConfig) -> FinetuneStage:
        """Build the student that trains, then the teacher if there is one."""
        assert isinstance(config, HeadStageConfig), "finetuning runs through the head"
        student = source.student(recompute=config.recompute)
        teacher = source.teacher() if self.needs_teacher(config) else None
        if teacher is not None and source.fp8.teacher:
            quantize(teacher)
        return FinetuneStage(
            student,
            teacher,
            chunk_tokens=config.vocab_chunk_tokens,
            teacher_weight=teacher_weight(config),
            objective=objective_of(config.objective),
            fp8=source.fp8,
        )
