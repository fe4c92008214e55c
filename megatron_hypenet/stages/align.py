"""HALO stage 1: each RNN mixer learns to reproduce the attention output of its layer, all layers at
once.

The trunk is the frozen teacher: layer l's attention runs on its own input and its output continues
through the trunk, while the RNN mixer of layer l gets the same input, detached. Losses are
therefore layer-local, and nothing after the last mixer is computed.

All layers share one backward, on the sum of their losses: the engine takes one scalar, and ZeRO's
gradient hooks then fire once per micro-batch. This keeps each mixer's own activations until then;
the squared error saves its difference in the model's dtype only.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_hypenet.config.computation import Fp8Config
from megatron_hypenet.config.mixers import MixerSpec
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import StageConfig
from megatron_hypenet.model.flops import BACKWARD, mixer_flops
from megatron_hypenet.model.fp8_layers import quantize
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.model.pipeline_layout import layer_costs
from megatron_hypenet.ops.dtypes import accumulation_dtype
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.base import (
    MicroBatch,
    PipelineRun,
    StageModule,
    finite_or_nan,
    local_tokens,
)
from megatron_hypenet.stages.footprint import COMPUTE_BYTES, Footprint, StageRank
from megatron_hypenet.stages.spec import ModelSource, Passes, StageSpec, register_stage


class AlignStage(StageModule):
    """Mean over layers, tokens and channels of the squared difference between RNN mixer and
    attention outputs."""

    name = "align"
    teacher: HypeNetModel

    def __init__(
        self, teacher: HypeNetModel, mixers: AlignedMixers, *, fp8: Fp8Config | None = None
    ) -> None:
        """`teacher` (best built with trunk_only=True) is changed in place: its attention modules
        are wrapped for good."""
        super().__init__(mixers.model_config, fp8)
        self.mixers = mixers
        self.attach_frozen("teacher", teacher)
        split = teacher.config.sequence_parallel
        own = dict(mixers.items())
        taps = tuple(
            tuple(
                AlignmentTap(layer, teacher.mixer(layer), own[layer], sequence_parallel=split)
                for layer in (block.layer_number - 1 for block in chunk.layers)
            )
            for chunk in teacher.chunks
        )
        for tap in chain.from_iterable(taps):
            teacher.set_mixer(tap.layer, tap)
        self.__dict__["taps"] = taps

    @property
    def layout(self) -> tuple[int, ...]:
        """Return the layers per chunk of the pipeline; each RNN mixer is on the rank of the layer
        whose output it learns."""
        return self.teacher.layout

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Map tokens [b, t + 1] -> mean of the layer losses; metrics hold every layer's own as
        align-layers/NN."""
        tokens = local_tokens(batch)
        with torch.no_grad():
            self.teacher.hidden(tokens.inputs, tokens.document_ids)
        return self.layer_losses()

    def layer_losses(self, chunk: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, metrics) after a pass of a chunk of the teacher: the part of the mean over
        all layers that belongs to the chunk's layers."""
        losses = {tap.layer: tap.take_loss() for tap in self.__dict__["taps"][chunk]}
        # this may run inside the teacher's pass, which has gradients disabled
        with torch.enable_grad():
            loss = torch.stack(list(losses.values())).sum() / self.model_config.num_layers
        return loss, {
            f"align-layers/{layer:02d}": value.detach() for layer, value in losses.items()
        }

    def pipeline_step(self, pipeline: PipelineRun) -> None:
        """Run the teacher's trunk forward only; this rank differentiates its own layers' losses at
        once, and no gradient is sent back."""
        tokens = pipeline.tokens

        def step(index: int, chunk: int) -> Tensor:
            part = tokens[index]
            with pipeline.working():
                output = self.teacher.hidden(part.inputs, part.document_ids, chunk=chunk)
                loss, metrics = self.layer_losses(chunk)
            if pipeline.train:
                loss.backward(gradient=finite_or_nan(loss) / len(tokens))
            pipeline.add(loss, metrics)
            return output

        pipeline.flow(self.teacher, step, lambda index, hidden: None)

    @property
    def teacher_shape(self) -> ModelConfig:
        """Return the shape of the teacher."""
        return self.teacher.model_config

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Return the RNN mixers of all layers, under the names they have in a student."""
        return self.mixers.sharded_state_dict(prefix)


@register_stage
class AlignSpec(StageSpec):
    """An RNN mixer of every layer learns beside the teacher's trunk."""

    name = AlignStage.name
    through_head = False

    def quantities(self, config: StageConfig) -> tuple[str, ...]:
        """Return the name of the alignment error."""
        return ("align-mse",)

    def needs_teacher(self, config: StageConfig) -> bool:
        """Return True: the mixers learn from its attention."""
        return True

    def build(self, source: ModelSource, config: StageConfig) -> AlignStage:
        """Build the trunk, and mixers initialised from its attention."""
        trunk = source.teacher(trunk_only=True)
        mixers = AlignedMixers.from_teacher(trunk, source.mixer, seed=source.seed)
        if source.fp8.teacher:
            quantize(trunk)
        return AlignStage(trunk, mixers, fp8=source.fp8)

    def student_shape(
        self, teacher: ModelConfig, student: ModelConfig, mixer: MixerSpec
    ) -> ModelConfig:
        """Return the shape with an RNN mixer in every layer: which ones will keep attention is not
        known yet."""
        return teacher.converted(mixer)

    def passes(
        self, config: StageConfig, teacher: ModelConfig, student: ModelConfig
    ) -> tuple[Passes, ...]:
        """Return the teacher's trunk up to the last mixer, and every RNN mixer in both directions.

        The mixers' inputs are detached: only the output projection computes the gradient of its
        input; the input projections compute that of their weights alone."""
        return (
            Passes(
                model=teacher,
                projections=1,
                core=1,
                output=1,
                mlp=1,
                head=0,
                last_mlp=False,
                frozen=True,
            ),
            Passes(model=student, projections=2, core=3, output=3, mlp=0, head=0, compared=True),
        )

    def layer_costs(
        self, config: StageConfig, teacher: ModelConfig, student: ModelConfig
    ) -> tuple[list[float], float]:
        """Count the FLOPs of the teacher's layers forward and the mixers in both directions; no
        head."""
        frozen = layer_costs(teacher, config.seq_length)
        mixers = mixer_flops(student, config.seq_length)
        return [
            before + (1 + BACKWARD) * mixer for before, mixer in zip(frozen, mixers, strict=True)
        ], 0.0

    def footprint(self, rank: StageRank, teacher: ModelConfig, student: ModelConfig) -> Footprint:
        """Count the memory of the mixers' training; what each keeps comes with its input and its
        difference from the attention."""
        mixers = [student.spec(student.mixer_types[layer]) for layer in rank.layers]
        inside = sum(mixer.saved_activations(student, rank.tensor, "none") for mixer in mixers)
        return Footprint(
            trained=sum(mixer.num_parameters(student, rank.tensor) for mixer in mixers),
            frozen=rank.parameters(teacher, trunk=True),
            frozen_fp8=rank.linear_parameters(teacher, trunk=True) if rank.fp8.teacher else 0.0,
            activations=rank.tokens * (inside + 2 * rank.stream(student) * len(mixers)),
            work=COMPUTE_BYTES * (rank.tokens * rank.mlp_work(teacher)),
        )


class AlignmentTap(nn.Module):
    """Replaces a teacher layer's attention: returns the attention's output and stores the RNN
    mixer's loss against it."""

    def __init__(
        self, layer: int, attention: nn.Module, mixer: nn.Module, *, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.layer = layer
        """Global layer index, from 0."""
        self.sequence_parallel = sequence_parallel
        self.__dict__["attention"] = attention
        self.__dict__["mixer"] = mixer
        self._loss: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Take Megatron's call of a mixer: hidden_states [s, b, h] -> (output [s, b, h], bias); the
        attention runs without grad, the mixer with."""
        attention, mixer = self.__dict__["attention"], self.__dict__["mixer"]
        output, bias = attention(hidden_states, *args, **kwargs)
        with torch.enable_grad():
            imitated, _ = mixer(hidden_states.detach(), *args, **kwargs)
            self._loss = mean_squared_error(
                imitated, output, sequence_parallel=self.sequence_parallel
            )
        return output, bias

    def take_loss(self) -> Tensor:
        """Return the loss of the last forward pass; the reference is dropped so that its graph is
        freed by the backward pass."""
        assert self._loss is not None, "take_loss needs a forward pass first"
        loss = self._loss
        self._loss = None
        return loss


def mean_squared_error(
    prediction: Tensor, target: Tensor, *, sequence_parallel: bool = False
) -> Tensor:
    """Return the mean over all tokens and channels of (prediction - target)^2, summed in fp32;
    scalar.

    Under sequence parallelism [s, b, h] are this rank's tokens: sums are added over the ranks and
    divided by all tokens, so that the value is the same on every rank, while each rank's gradient
    is that of its own tokens.
    """
    total = _SquaredErrorSum.apply(prediction, target)
    if sequence_parallel:
        # sums the value; the gradient passes as it is
        total = reduce_from_tensor_model_parallel_region(total)
        return total / (prediction.numel() * groups.tensor_group().size())
    return total / prediction.numel()


class _SquaredErrorSum(torch.autograd.Function):
    """sum((a - b)^2) in fp32 that saves one tensor of a's dtype, where autograd would save fp32
    copies; in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        difference = prediction.to(accumulation_dtype(prediction.dtype), copy=True).sub_(target)
        ctx.save_for_backward(difference.to(prediction.dtype))
        return torch.linalg.vector_norm(difference, dim=-1).square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (difference,) = ctx.saved_tensors
        # The factor has a dimension so that it stays fp32: rounded to bf16, it would scale the
        # whole gradient.
        return torch.mul(difference, (2 * grad)[None], out=torch.empty_like(difference)), None
