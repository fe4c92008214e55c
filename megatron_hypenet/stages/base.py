"""The interface of a training stage for the engine: trained parameters, loss, and what the stage
saves under which names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from megatron_hypenet.config.computation import Fp8Config
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import StageConfig
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.context.layout import split_sequence
from megatron_hypenet.stages.spec import stage_spec


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Whole sequences of one micro-batch, from data.blend."""

    tokens: Tensor
    """[b, t + 1], int64."""
    document_ids: Tensor | None = None
    """[b, t], int32; None when each row is one document."""
    token_weights: Tensor | None = None
    """Weight of each label's loss, [b, t], fp32; None for one each. There with `document_ids` and
    `answer_weights`."""
    answer_weights: Tensor | None = None
    """Weight of each position in a loss beside a teacher, which needs no label of the same
    document, [b, t], fp32; None for one each. There when only a part of the data is to be
    predicted."""


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
    answer_weights: Tensor | None = None
    """Weight of each position in a loss beside a teacher, same shape; None for one each."""


def local_tokens(batch: MicroBatch) -> LocalTokens:
    """Split `tokens` [b, t + 1] into inputs and the tokens that follow them, and take this rank's
    part of the sequence."""
    group = groups.context_group()
    tokens = batch.tokens

    def mine(weights: Tensor | None) -> Tensor | None:
        return None if weights is None else split_sequence(weights, group, dim=1)

    return LocalTokens(
        inputs=split_sequence(tokens[:, :-1], group, dim=1).contiguous(),
        labels=split_sequence(tokens[:, 1:], group, dim=1).contiguous(),
        document_ids=batch.document_ids,
        weights=mine(batch.token_weights),
        answer_weights=mine(batch.answer_weights),
    )


class PipelineRun(Protocol):
    """The micro-batches of one step in a pipeline of several stages, for
    `StageModule.pipeline_step`; training/schedule.py implements it."""

    tokens: Sequence[LocalTokens]
    """This rank's part of every micro-batch."""
    train: bool
    """Whether gradients are wanted."""

    def flow(
        self,
        model: HypeNetModel,
        step: Callable[[int, int], Tensor],
        finish: Callable[[int, Tensor], Tensor | None],
        *,
        train: bool = False,
    ) -> None:
        """Send every micro-batch through `model`: `step(i, c)` runs chunk c of this rank's layers,
        `finish(i, hidden)` gets the final hidden states on the last stage, and gives the loss with
        `train` (parallel/pipeline.py)."""

    def working(self) -> AbstractContextManager[None]:
        """Measure a block as this rank's own work, without waiting for other ranks."""

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Count what this rank has of a micro-batch's loss and metrics, or what one of its chunks
        has."""


class StageModule(nn.Module, ABC):
    """The module that the engine wraps. Its parameters are exactly those that train; a frozen
    teacher is an attribute that is not registered as a submodule.

    Keeping the teacher out of `modules()` keeps it out of the optimizer, the gradient norm, dtype
    casts and every checkpoint.
    """

    name: ClassVar[str]
    """The stage's name in configs and folders."""

    def __init__(self, model_config: ModelConfig, fp8: Fp8Config | None = None) -> None:
        super().__init__()
        self.model_config = model_config
        """Shape of the student that this stage saves."""
        self.fp8 = fp8 or Fp8Config()
        """What is computed in FP8."""

    @abstractmethod
    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run one micro-batch -> (loss, metrics).

        The loss is a scalar in fp32 (fp64 for fp64 models), a mean over this process's tokens and
        already summed over tensor-parallel ranks; metrics are detached scalars of the same kind, by
        TensorBoard tag. This is for one pipeline stage; with several, `pipeline_step` runs instead.
        """

    @property
    @abstractmethod
    def layout(self) -> tuple[int, ...]:
        """Return the layers per chunk of the pipeline, in order: per stage, unless interleaved."""

    @property
    def teacher_shape(self) -> ModelConfig:
        """Return the shape of the teacher; the student's own where there is none."""
        return self.model_config

    @property
    def replayable(self) -> bool:
        """Return whether the same micro-batch gives the same loss and gradients again, so that a
        CUDA graph can hold it."""
        return True

    def flops_per_token(self, config: StageConfig) -> float:
        """Count the floating-point operations of one training step per token, over all ranks; see
        model/flops.py."""
        spec = stage_spec(self.name)
        return spec.flops(config, self.teacher_shape, self.model_config)

    def fp8_flops_per_token(self, config: StageConfig) -> float:
        """Count those of `flops_per_token` that are computed in FP8."""
        spec = stage_spec(self.name)
        return spec.fp8_flops(config, self.teacher_shape, self.model_config, self.fp8)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters for the optimizer, by local name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def replicated_over_pipeline(self) -> list[nn.Parameter]:
        """Return trained parameters that another pipeline stage holds too; their gradients have to
        be summed over both."""
        return []

    @abstractmethod
    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Return Megatron sharded tensors that this stage saves, under the student's final
        names."""

    def pipeline_step(self, pipeline: PipelineRun) -> None:
        """Run the micro-batches of `pipeline` through several pipeline stages, and add this rank's
        losses and metrics to it."""
        raise NotImplementedError(f"no pipeline schedule for {type(self).__name__}")

    def attach_frozen(self, name: str, module: nn.Module) -> None:
        """Freeze a module and make it the attribute `name`, without registering it as a
        submodule."""
        module.requires_grad_(False)
        module.eval()
        self.__dict__[name] = module


def finite_or_nan(loss: Tensor) -> Tensor:
    """Return 1 for a finite loss, else NaN: a factor that makes every gradient of a bad loss NaN.

    Choosing between two values would copy them to the device and wait for it; a product stays
    there.

    Some bad losses have finite gradients (an infinite sum of finite terms). This way the gradient
    norm, which DeepSpeed reduces over all processes and checks before it updates, alone decides
    about a step.
    """
    return loss.detach() * 0 + 1
