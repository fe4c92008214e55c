"""HALO stage 3: the whole student on long sequences with plain next-token cross entropy; no teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.vocab_loss import linear_cross_entropy
from megatron_hypenet.stages.base import Batch, StageModule, inputs_and_labels


class FinetuneStage(StageModule):
    """Next-token cross entropy, mean over tokens, with the head matmul inside the chunked loss."""

    name = "finetune"

    def __init__(self, student: HypeNetModel, *, chunk_tokens: int) -> None:
        super().__init__(student.model_config)
        self.student = student
        self.chunk_tokens = chunk_tokens

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens [b, t + 1] -> mean cross entropy of the t tokens after the first."""
        inputs, labels = inputs_and_labels(batch)
        hidden = self.student.hidden(inputs)  # [t, b, h], so labels go by token first too
        loss = linear_cross_entropy(
            hidden, self.student.head_weight(), labels.t(), chunk_tokens=self.chunk_tokens, group=groups.tensor_group()
        )
        return loss, {"finetune/lm_loss": loss.detach()}

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """The whole student."""
        return self.student.sharded_state_dict(prefix)
