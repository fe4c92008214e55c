"""HALO stage 2: the whole student learns the teacher's next-token distribution (forward KL,
temperature 1)."""

from __future__ import annotations

from torch import Tensor

from megatron_hypenet.config.schema import HeadStageConfig, StageConfig
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.vocab_loss import linear_kl
from megatron_hypenet.stages.base import LocalTokens
from megatron_hypenet.stages.head import HeadSpec, HeadStage
from megatron_hypenet.stages.spec import ModelSource, register_stage


class DistillStage(HeadStage):
    """KL(teacher || student), mean over the input tokens that count, from final hidden states and
    the two head weights.

    Logits exist for `chunk_tokens` tokens at a time only, inside the loss; the teacher's own head
    never runs.
    """

    name = "distill"

    def __init__(
        self, student: HypeNetModel, teacher: HypeNetModel, *, chunk_tokens: int | None
    ) -> None:
        super().__init__(student, teacher)
        self.chunk_tokens = chunk_tokens

    def head_loss(
        self, tokens: LocalTokens, hidden: Tensor, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the KL of the next-token distributions at every input token, or at those before an
        answer's; labels are not used."""
        assert self.frozen_teacher is not None and teacher_hidden is not None, (
            "distillation has a teacher"
        )
        loss = linear_kl(
            hidden,
            self.student.head_weight(),
            teacher_hidden,
            self.frozen_teacher.head_weight(),
            chunk_tokens=self.chunk_tokens,
            group=groups.tensor_group(),
            sequence_parallel=self.student.config.sequence_parallel,
            token_weights=None if tokens.answer_weights is None else tokens.answer_weights.t(),
        )
        return loss, {"train/kl": loss.detach()}


@register_stage
class DistillSpec(HeadSpec):
    """The student learns beside its teacher."""

    name = DistillStage.name
    needs_teacher = True
    loss = "kl"
    mfu = 0.49

    def build(self, source: ModelSource, config: StageConfig) -> DistillStage:
        """Build the student that trains, then the teacher."""
        assert isinstance(config, HeadStageConfig), "distillation runs through the head"
        student = source.student(recompute=config.recompute)
        return DistillStage(student, source.teacher(), chunk_tokens=config.vocab_chunk_tokens)
