"""The memory of a training stage on one pipeline stage, computed from shapes and layout alone.

Elements of weights and activations are counted here, model by model and layer by layer; each
stage's specification adds up what it needs, and planning/memory.py turns the sums into bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_hypenet.config.computation import Fp8Config
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig, Recompute, StageConfig
from megatron_hypenet.model.pipeline_layout import chunks_of_stage

COMPUTE_BYTES = 2
ACCUMULATION_BYTES = 4
"""Bytes of an element in the compute dtype (bf16) and in the accumulation dtype (fp32)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The needs of a stage besides the gradients and the optimizer state of its trained weights."""

    trained: float
    """Weights that train, in elements."""
    frozen: float = 0.0
    """Weights of a frozen teacher, in elements."""
    frozen_fp8: float = 0.0
    """Elements of `frozen` in FP8, a byte each; their scales take a thousandth of that."""
    activations: float
    """Elements of saved activations, and of a teacher's hidden states that are kept until their
    loss."""
    work: float
    """Bytes of the larger of: the loss with its chunk of logits and the gradient of the head; one
    layer's backward."""


@dataclass(frozen=True, slots=True)
class StageRank:
    """One pipeline stage of a training stage on a layout."""

    config: StageConfig
    parallel: ParallelConfig
    data_ranks: int
    layout: tuple[int, ...]
    """Layers per chunk of the pipeline, in order."""
    index: int
    fp8: Fp8Config = Fp8Config()

    @property
    def tensor(self) -> int:
        """Return the number of tensor-parallel ranks."""
        return self.parallel.tensor_model_parallel_size

    @property
    def stages(self) -> int:
        """Return the number of pipeline stages."""
        return len(self.layout) // self.parallel.virtual_pipeline_model_parallel_size

    @property
    def first(self) -> bool:
        """Return whether the embedding is here."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Return whether the output head is here."""
        return self.index == self.stages - 1

    @property
    def layers(self) -> list[int]:
        """Return the global indices of the layers that are here."""
        chunks = chunks_of_stage(self.layout, self.index, self.stages)
        return [layer for layers in chunks for layer in layers]

    @property
    def tokens(self) -> int:
        """Return the tokens of one micro-batch on one context-parallel rank."""
        return (
            self.config.micro_batch_size
            * self.config.seq_length
            // self.parallel.context_parallel_size
        )

    @property
    def micro_batches(self) -> int:
        """Return the micro-batches of a step on one replica."""
        return self.config.num_micro_batches(self.data_ranks)

    @property
    def in_flight(self) -> float:
        """Return the number of micro-batches whose activations are held at one time: under 1F1B,
        one for this stage and for each that follows. Interleaved, a stage begins more passes before
        the first comes back, each of a part of its layers."""
        chunks = self.parallel.virtual_pipeline_model_parallel_size
        following = self.stages - self.index - 1
        if chunks == 1:
            return min(1 + following, self.micro_batches)
        begun = 1 + 2 * following + (chunks - 1) * self.stages
        return min(begun, chunks * self.micro_batches) / chunks

    @property
    def recompute(self) -> Recompute:
        """Return the stage's `recompute` setting."""
        return self.config.recompute if isinstance(self.config, HeadStageConfig) else "none"

    def stream(self, model: ModelConfig) -> float:
        """Return the elements of the residual stream per token."""
        return model.hidden_size / (self.tensor if self.parallel.sequence_parallel else 1)

    def parameters(self, model: ModelConfig, *, trunk: bool = False) -> float:
        """Return the number of weights of a model here; a `trunk` ends before the last layer's
        MLP."""
        hidden = model.hidden_size
        mlp = 3 * model.hidden_size * model.ffn_hidden_size + model.hidden_size
        kinds = Counter(model.mixer_types[layer] for layer in self.layers)
        mixers = sum(
            count * model.spec(kind).num_parameters(model, self.tensor)
            for kind, count in kinds.items()
        )
        own = (hidden + mlp) * len(self.layers)
        if trunk and self.last:
            own -= mlp
        tables = int(self.first)
        if self.last and not trunk:
            own += hidden
            tables += not (self.first and model.share_embeddings_and_output_weights)
        return mixers + (own + tables * model.vocab_size * hidden) / self.tensor

    def linear_parameters(self, model: ModelConfig, *, trunk: bool = False) -> float:
        """Return how many of `parameters` belong to the layers' linear modules, which FP8 can
        hold."""
        mlp = 3 * model.hidden_size * model.ffn_hidden_size
        total = float(mlp * (len(self.layers) - (trunk and self.last)))
        for layer in self.layers:
            # two operations per weight and token
            work = model.spec(model.mixer_types[layer]).flops(model, seq_length=1)
            total += (work.projections + work.output) / 2
        return total / self.tensor

    def held_in_fp8(self, model: ModelConfig) -> float:
        """Return how many elements more a student holds until backward when it trains in FP8, where
        the inputs of its linear modules are saved in one byte (fewer elements, so this may be
        negative) and both forms of its weights, as they are and transposed, are kept beside them.

        Under full recomputation that is one layer's at a time; under selective the inputs are kept
        as they are."""
        if self.fp8.student is None or self.recompute == "full":
            return 0.0
        weights = 2 * self.linear_parameters(model) / COMPUTE_BYTES
        if self.recompute == "selective":
            return weights
        inner = (model.query_size + model.ffn_hidden_size) / self.tensor
        inputs = len(self.layers) * (2 * self.stream(model) + inner)
        return weights - self.tokens * self.in_flight * inputs / COMPUTE_BYTES

    def saved_activations(self, model: ModelConfig, layer: int, recompute: Recompute) -> float:
        """Return the elements per token that one layer keeps for backward."""
        stream = self.stream(model)
        inner = model.ffn_hidden_size / self.tensor
        if recompute == "full":
            return stream
        kept = model.spec(model.mixer_types[layer]).saved_activations(model, self.tensor, recompute)
        if recompute == "selective":
            return 2 * stream + kept + 2 * inner
        return 4 * stream + kept + 3 * inner

    def mlp_work(self, model: ModelConfig) -> float:
        """Return the elements per token that are held while the backward of an MLP runs, which
        needs more than a mixer's."""
        return 3 * model.ffn_hidden_size / self.tensor + 3 * model.hidden_size
