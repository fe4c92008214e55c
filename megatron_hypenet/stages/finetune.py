"""HALO stage 3: the whole student on long sequences with plain next-token cross entropy; no
teacher."""

from __future__ import annotations

from torch import Tensor

from megatron_hypenet.config.schema import HeadStageConfig, StageConfig
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.vocab_loss import linear_cross_entropy
from megatron_hypenet.stages.base import LocalTokens
from megatron_hypenet.stages.head import HeadSpec, HeadStage
from megatron_hypenet.stages.spec import ModelSource, register_stage


class FinetuneStage(HeadStage):
    """Next-token cross entropy, mean over tokens, with the head matmul inside the chunked loss."""

    name = "finetune"

    def __init__(self, student: HypeNetModel, *, chunk_tokens: int | None) -> None:
        super().__init__(student)
        self.chunk_tokens = chunk_tokens

    def head_loss(
        self, tokens: LocalTokens, hidden: Tensor, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean cross entropy of the tokens that follow the inputs; hidden states are [t,
        b, h], so labels are [t, b] too."""
        loss = linear_cross_entropy(
            hidden,
            self.student.head_weight(),
            tokens.labels.t(),
            chunk_tokens=self.chunk_tokens,
            group=groups.tensor_group(),
            sequence_parallel=self.student.config.sequence_parallel,
            token_weights=None if tokens.weights is None else tokens.weights.t(),
        )
        return loss, {"train/lm-loss": loss.detach()}


@register_stage
class FinetuneSpec(HeadSpec):
    """The student learns alone."""

    name = FinetuneStage.name
    needs_teacher = False
    loss = "lm-loss"
    mfu = 0.53

    def build(self, source: ModelSource, config: StageConfig) -> FinetuneStage:
        """Build the student that trains."""
        assert isinstance(config, HeadStageConfig), "finetuning runs through the head"
        student = source.student(recompute=config.recompute)
        return FinetuneStage(student, chunk_tokens=config.vocab_chunk_tokens)
