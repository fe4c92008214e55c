"""The settings of layer selection, as frozen pydantic models; schema.py has those of everything
else."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from megatron_hypenet.config.fields import Fraction, Rate, Section, check_batches
from megatron_hypenet.config.model import PositiveInt

MethodName = Literal["halo", "kl", "gates", "uniform"]
SELECTION_METHODS: tuple[str, ...] = get_args(MethodName)
"""The methods of layer selection; each is a file of `stages/selection/`."""


class LayerGatesConfig(Section):
    """How the method `gates` learns; other methods do not read this."""

    train_iters: PositiveInt = Field(
        default=40,
        description="Steps of the gates; the weights are frozen. Those of the bundled "
        "teacher have taken their places after 12 (docs/evidence/selection.md).",
    )
    global_batch_size: PositiveInt = Field(
        default=8, description="Sequences per step over all processes."
    )
    micro_batch_size: PositiveInt = Field(
        default=1,
        description="Sequences per pass on one data-parallel process. A backward pass goes through "
        "the whole model here, with attention and RNN mixer in every layer, so it is smaller than "
        "batch_size.",
    )
    lr: Rate = Field(
        default=0.5,
        description="Step size on the logits of the gates, whose gradient is scaled to a mean "
        "square of about 1 over layers.",
    )
    recall_fraction: Fraction = Field(
        default=0.5,
        description="Share of recall documents among the sequences, where answers alone count; the "
        "others are text. Recall alone keeps layers that look facts up; text alone seldom asks for "
        "what is far back.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_batches(self.micro_batch_size, self.global_batch_size)
        return self


class SelectConfig(Section):
    """Which layers keep softmax attention."""

    method: MethodName = Field(
        default="halo",
        description="How layers are chosen: halo converts one layer at a time and weighs lost "
        "recall against lost accuracy; kl converts one at a time and takes the KL on text; gates "
        "learns a gate for every layer, all together; uniform spaces them evenly and measures "
        "nothing (docs/selection.md says when to use which).",
    )
    num_attention_layers: PositiveInt | None = Field(
        default=None,
        description="Softmax layers to keep; null keeps a quarter (num_layers // 4, at least 1).",
    )
    recall_sequences: PositiveInt = Field(
        default=128, description="Recall documents scored per layer (halo)."
    )
    recall_pairs: PositiveInt = Field(
        default=8,
        description="Key-value pairs in one scored recall document (halo), and the most in one "
        "that gates learn from.",
    )
    heldout_sequences: PositiveInt = Field(
        default=64, description="Held-out sequences scored per layer (halo, kl)."
    )
    seq_length: PositiveInt = Field(
        default=512, description="Tokens per sequence (halo, kl, gates)."
    )
    batch_size: PositiveInt = Field(default=8, description="Sequences per forward pass (halo, kl).")
    importance_cap: Rate = Field(
        default=50.0,
        description="Largest importance a layer can have (halo); the paper caps at 50.",
    )
    gates: LayerGatesConfig = Field(
        default=LayerGatesConfig(), description="How the method gates learns."
    )
