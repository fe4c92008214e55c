"""The linear layers of a frozen model in FP8: half the memory of bfloat16, and faster products.

Own code and not Transformer Engine's, because a model that is never trained needs little of it: no
transposed copies, no gradients, no state between steps; and a scale for every row and token rounds
less than Transformer Engine's one for a whole tensor. So an FP8 teacher needs no other package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_hypenet.errors import SetupError
from megatron_hypenet.model import inference
from megatron_hypenet.model.memory import release_memory
from megatron_hypenet.ops.fp8_linear import LEAST_CAPABILITY, fp8_linear, quantize_rows
from megatron_hypenet.parallel.cpu import device

if TYPE_CHECKING:
    import torch.distributed as dist

    from megatron_hypenet.model.hypenet import HypeNetModel

_SPLIT: dict[str, Literal["column", "row"]] = {
    "linear_in": "column",
    "linear_proj": "row",
    "linear_fc1": "column",
    "linear_fc2": "row",
}
"""Names of a layer's linear modules, and the dimension that tensor parallelism splits."""


class Fp8Linear(nn.Module):
    """A frozen parallel linear layer without bias: Megatron's calls and communication, weights in
    e4m3 with a scale for each output feature of this rank."""

    def __init__(
        self,
        weight: Tensor,
        split: Literal["column", "row"],
        group: dist.ProcessGroup,
        *,
        sequence_parallel: bool,
    ) -> None:
        """Take this rank's `weight` [rows, columns] in FP8; `split` is as in Megatron's column- and
        row-parallel layers."""
        super().__init__()
        values, scale = quantize_rows(weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.split = split
        self.group = group
        self.sequence_parallel = sequence_parallel

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [s, b, columns] -> ([s, b, rows], no bias), as the layer that this one replaces."""
        if self.split == "column" and self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.group)
        y = fp8_linear(x, self.weight, self.weight_scale)
        if self.split == "row" and self.sequence_parallel:
            y = reduce_scatter_to_sequence_parallel_region(y, group=self.group)
        elif self.split == "row":
            y = reduce_from_tensor_model_parallel_region(y, group=self.group)
        return y, None


@dataclass(frozen=True, slots=True)
class Place:
    """A linear layer of a model, and another form of it."""

    parent: nn.Module
    name: str
    other: nn.Module

    def exchanged(self) -> Place:
        """Put the other form into the model; returns this place with the one that was there."""
        there = getattr(self.parent, self.name)
        setattr(self.parent, self.name, self.other)
        return Place(self.parent, self.name, there)


def quantized_layers(model: HypeNetModel) -> Iterator[Place]:
    """Make an FP8 form of each linear layer between embedding and head on this pipeline stage; the
    model stays as it is."""
    for layer in model.layers:
        for parent in (layer.self_attention, layer.mlp):
            for name, linear in list(parent.named_children()):
                if name in _SPLIT:
                    yield Place(parent, name, _quantized(linear.weight, name, model))


def quantize(model: HypeNetModel) -> None:
    """Put the linear layers of a frozen model in FP8, one after the other, and free their weights;
    embedding, head, norms and attention stay as they are."""
    for place in quantized_layers(model):
        place.exchanged()
    release_memory()


def _quantized(weight: Tensor, name: str, model: HypeNetModel) -> Fp8Linear:
    return Fp8Linear(
        weight,
        _SPLIT[name],
        model.pg_collection.tp,
        sequence_parallel=model.config.sequence_parallel,
    )


@torch.no_grad()
def fp8_divergence(model: HypeNetModel, ids: Iterable[Tensor]) -> tuple[float, float]:
    """Return what FP8 does to a model's predictions on batches of token ids [b, t]: KL(as it is ||
    in FP8) in nats per token, and the share of positions with the same first choice. Any layout;
    every rank gets the same. The model is left as it was."""
    places = list(quantized_layers(model))
    divergence, same, count = 0.0, 0, 0
    for batch in ids:
        before = inference.logits(model, batch)
        places = [place.exchanged() for place in places]
        after = inference.logits(model, batch)
        places = [place.exchanged() for place in places]
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        count += batch.numel()
        for p, q in zip(
            before.flatten(0, 1).split(512), after.flatten(0, 1).split(512), strict=True
        ):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            divergence += float((log_p.exp() * (log_p - log_q)).sum())
    return divergence / count, same / count


def require_fp8_gpu(setting: str) -> None:
    """Raise SetupError where this process's GPU has no FP8 products; `setting` is what asks for
    them."""
    where = device()
    if where.type != "cuda":
        raise SetupError(f"{setting} needs a GPU, and torch sees none here; leave it out")
    capability = torch.cuda.get_device_capability(where)
    if capability < LEAST_CAPABILITY:
        has, needs = (".".join(map(str, found)) for found in (capability, LEAST_CAPABILITY))
        raise SetupError(
            f"{setting} needs a GPU with FP8 products (compute capability {needs} or later, such "
            f"as an H100); {torch.cuda.get_device_name(where)} has {has}; leave it out"
        )
