"""HALO stage 2: the whole student learns the teacher's next-token distribution (forward KL, temperature 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.vocab_loss import linear_kl
from megatron_hypenet.stages.base import Batch, StageModule, inputs_and_labels


class DistillStage(StageModule):
    """KL(teacher || student), mean over all input tokens, from final hidden states and the two head weights.

    Logits exist for `chunk_tokens` tokens at a time only, inside the loss; the teacher's own head never runs.
    """

    name = "distill"
    teacher: HypeNetModel

    def __init__(self, student: HypeNetModel, teacher: HypeNetModel, *, chunk_tokens: int) -> None:
        super().__init__(student.model_config)
        self.student = student
        self.attach_frozen("teacher", teacher)
        self.chunk_tokens = chunk_tokens

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens [b, t + 1] -> the KL of the t next-token distributions; the last token is read by stage 3 only."""
        inputs, _ = inputs_and_labels(batch)
        with torch.no_grad():
            teacher_hidden = self.teacher.hidden(inputs)
        loss = linear_kl(
            self.student.hidden(inputs),
            self.student.head_weight(),
            teacher_hidden,
            self.teacher.head_weight(),
            chunk_tokens=self.chunk_tokens,
            group=groups.tensor_group(),
        )
        return loss, {"distill/kl": loss.detach()}

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """The whole student."""
        return self.student.sharded_state_dict(prefix)
