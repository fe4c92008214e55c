"""What a training stage promises the engine: what trains, what the loss is, and what is handed on
under which names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.model.flops import distill_flops, finetune_flops
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.context.layout import split_sequence

Batch = Mapping[str, Tensor]
"""One micro-batch of whole sequences: `tokens` [b, t + 1], int64, from data.blend; with separate
documents also `document_ids` [b, t] (int32) and `token_weights` [b, t] (fp32)."""


@dataclass(frozen=True, slots=True)
class LocalTokens:
    """The part of a micro-batch that this context-parallel rank computes."""

    inputs: Tensor
    """[b, t / context ranks]."""
    labels: Tensor
    """The tokens that follow the inputs, same shape."""
    document_ids: Tensor | None
    """[b, t] of the whole sequence; None when each row is one document."""
    weights: Tensor | None
    """Weight of each label's loss, [b, t / context ranks]; None for one each."""


def local_tokens(batch: Batch) -> LocalTokens:
    """Split `tokens` [b, t + 1] into inputs and the tokens that follow them, and take this rank's
    part of the sequence."""
    group = groups.context_group()
    tokens = batch["tokens"]
    weights = batch.get("token_weights")
    return LocalTokens(
        inputs=split_sequence(tokens[:, :-1], group, dim=1).contiguous(),
        labels=split_sequence(tokens[:, 1:], group, dim=1).contiguous(),
        document_ids=batch.get("document_ids"),
        weights=None if weights is None else split_sequence(weights, group, dim=1),
    )


class StageModule(nn.Module, ABC):
    """The module the engine wraps. Its parameters are exactly what trains; a frozen teacher hangs
    beside it, unregistered.

    Keeping the teacher out of `modules()` keeps it out of the optimizer, the gradient norm, dtype
    casts and every checkpoint.
    """

    name: ClassVar[str]
    """The stage's name in configs, folders and metric tags."""

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__()
        self.model_config = model_config
        """Shape of the student that this stage hands on."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch -> (loss, metrics).

        The loss is a scalar in fp32 (fp64 for fp64 models), a mean over this process's tokens and
        already summed over tensor-parallel ranks; metrics are detached scalars of the same kind, by
        TensorBoard tag. For the layers of one process: under pipeline parallelism the engine's
        schedule runs the parts instead.
        """

    @property
    @abstractmethod
    def layout(self) -> tuple[int, ...]:
        """Layers per pipeline stage."""

    @abstractmethod
    def flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations of one training step per token, over all ranks; see
        model/flops.py."""

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer gets, by local parameter name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def replicated_over_pipeline(self) -> list[nn.Parameter]:
        """Trained parameters that another pipeline stage holds too; their gradients have to be
        summed over both."""
        return []

    @abstractmethod
    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Megatron sharded tensors of what this stage hands on, under the student's final names."""

    def attach_frozen(self, name: str, module: nn.Module) -> None:
        """Hang a frozen module beside the stage as attribute `name`, without registering it."""
        module.requires_grad_(False)
        module.eval()
        self.__dict__[name] = module


class HeadStage(StageModule):
    """A stage that trains a whole student through its output head, perhaps beside a frozen teacher:
    HALO's stages 2 and 3.

    `head_loss` runs where the last layers are; under pipeline parallelism the schedule calls it on
    the last stage."""

    student: HypeNetModel

    def __init__(self, student: HypeNetModel, teacher: HypeNetModel | None = None) -> None:
        super().__init__(student.model_config)
        self.student = student
        self.__dict__["teacher"] = None
        if teacher is not None:
            self.attach_frozen("teacher", teacher)

    @property
    def frozen_teacher(self) -> HypeNetModel | None:
        """The teacher whose final hidden states `head_loss` takes, if there is one."""
        teacher: HypeNetModel | None = self.__dict__["teacher"]
        return teacher

    @property
    def layout(self) -> tuple[int, ...]:
        """Layers per pipeline stage, the same for student and teacher."""
        return self.student.layout

    def flops_per_token(self, seq_length: int) -> float:
        """The student forward and backward, after the teacher forward if there is one."""
        if self.frozen_teacher is None:
            return finetune_flops(self.model_config, seq_length)
        return distill_flops(self.frozen_teacher.model_config, self.model_config, seq_length)

    @abstractmethod
    def head_loss(
        self, tokens: LocalTokens, hidden: Tensor, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) as `forward` gives them, from final hidden states [t, b, h] of student
        and teacher."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens [b, t + 1] -> (loss, metrics)."""
        tokens = local_tokens(batch)
        teacher_hidden = None
        if self.frozen_teacher is not None:
            with torch.no_grad():
                teacher_hidden = self.frozen_teacher.hidden(tokens.inputs, tokens.document_ids)
        return self.head_loss(
            tokens, self.student.hidden(tokens.inputs, tokens.document_ids), teacher_hidden
        )

    def replicated_over_pipeline(self) -> list[nn.Parameter]:
        """The student's tied embedding, on the pipeline stages that share it."""
        return self.student.replicated_over_pipeline()

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """The whole student."""
        return self.student.sharded_state_dict(prefix)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums over tokens are kept: fp32, or fp64 for fp64 models."""
    return torch.float64 if dtype == torch.float64 else torch.float32
