"""HALO stage 2: the whole student learns the teacher's next-token distribution (temperature 1), by
forward KL or another divergence."""

from __future__ import annotations

from torch import Tensor

from megatron_hypenet.config.computation import Fp8Config
from megatron_hypenet.config.schema import HeadStageConfig, StageConfig
from megatron_hypenet.model.fp8_layers import quantize
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel.vocab_loss.objectives import Objective, objective_of
from megatron_hypenet.stages.base import LocalTokens
from megatron_hypenet.stages.head import FORWARD_KL, HeadSpec, HeadStage, divergences
from megatron_hypenet.stages.spec import ModelSource, register_stage


class DistillStage(HeadStage):
    """The divergence of the student from its teacher, mean over the input tokens that count."""

    name = "distill"

    def __init__(
        self,
        student: HypeNetModel,
        teacher: HypeNetModel,
        *,
        chunk_tokens: int | None,
        objective: Objective = FORWARD_KL,
        fp8: Fp8Config | None = None,
    ) -> None:
        super().__init__(student, teacher, chunk_tokens=chunk_tokens, objective=objective, fp8=fp8)

    def head_loss(
        self, tokens: LocalTokens, hidden: Tensor, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `divergence`."""
        return self.divergence(tokens, hidden, teacher_hidden)


@register_stage
class DistillSpec(HeadSpec):
    """The student learns beside its teacher."""

    name = DistillStage.name
    mfu = 0.49

    def quantities(self, config: StageConfig) -> tuple[str, ...]:
        """Return the names of the objective's value and of forward KL."""
        return divergences(config)

    def needs_teacher(self, config: StageConfig) -> bool:
        """Return True: the student learns from its logits."""
        return True

    def num_losses(self, config: StageConfig) -> int:
        """Return 1, the objective."""
        return 1

    def build(self, source: ModelSource, config: StageConfig) -> DistillStage:
        """Build the student that trains, then the teacher."""
        assert isinstance(config, HeadStageConfig), "distillation runs through the head"
        student = source.student(recompute=config.recompute)
        teacher = source.teacher()
        if source.fp8.teacher:
            quantize(teacher)
        return DistillStage(
            student,
            teacher,
            chunk_tokens=config.vocab_chunk_tokens,
            objective=objective_of(config.objective),
            fp8=source.fp8,
        )
