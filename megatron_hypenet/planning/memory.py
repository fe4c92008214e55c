"""GPU memory of one training process, by what holds it, from shapes and layout alone: does it fit,
before anyone sees it fail.

Counted is the fullest moment of a step in bfloat16 with this package's CUDA kernels: the static
part, what forward keeps for backward, and the larger of the loss and one layer's backward. Not
counted: the CUDA context, NCCL's buffers, and gaps between allocations (`reserve`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig, Recompute, StageConfig
from megatron_hypenet.engine.deepspeed.config import BUCKET_NUMBERS
from megatron_hypenet.model.pipeline_layout import layers_of_stage, pipeline_layout
from megatron_hypenet.parallel.vocab_loss.gradients import CHUNKS_PER_PRODUCT, chunk_size
from megatron_hypenet.planning.layer_placement import placed

NARROW = 2
WIDE = 4
"""Bytes of a bf16 and of an fp32 number."""
STATE = 3 * WIDE
"""Bytes per weight of AdamW's fp32 master and two moments."""
LIVE_WEIGHTS = 10**9
"""Gathered weights that ZeRO-3 lets live at one time (DeepSpeed's stage3_max_live_parameters)."""
CONTEXT_BYTES = 2**30
GAPS = 0.03
"""What a CUDA context with NCCL takes, and the share of memory that falls between allocations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on one GPU."""

    weights: float
    """In bf16, of what trains."""
    gradients: float
    """fp32 sums, and buckets on their way to other ranks."""
    optimizer: float
    """fp32 masters and moments."""
    teacher: float
    """Frozen weights."""
    activations: float
    """What forward keeps for backward, and hidden states of a teacher that wait for their loss."""
    work: float
    """The larger of: the loss with its chunk of logits and the gradient of the head; one layer's
    backward."""

    @property
    def total(self) -> float:
        """Together: what torch calls the peak of allocated memory."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.teacher
            + self.activations
            + self.work
        )

    @property
    def needed(self) -> float:
        """Memory a GPU must have."""
        return self.total * (1 + GAPS) + CONTEXT_BYTES


@dataclass(frozen=True, slots=True)
class _Rank:
    """One pipeline stage of a training stage on a layout."""

    name: str
    config: StageConfig
    parallel: ParallelConfig
    data_ranks: int
    layout: tuple[int, ...]
    index: int

    @property
    def tensor(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == len(self.layout) - 1

    @property
    def layers(self) -> range:
        return layers_of_stage(self.layout, self.index)

    @property
    def tokens(self) -> int:
        """Of one micro-batch, on one context-parallel rank."""
        return (
            self.config.micro_batch_size
            * self.config.seq_length
            // self.parallel.context_parallel_size
        )

    @property
    def in_flight(self) -> int:
        """Micro-batches whose activations are alive at one time: with one forward, one backward, as
        many as stages follow."""
        return min(len(self.layout) - self.index, self.config.num_micro_batches(self.data_ranks))

    @property
    def recompute(self) -> Recompute:
        return self.config.recompute if isinstance(self.config, HeadStageConfig) else "none"

    def stream(self, model: ModelConfig) -> float:
        """Numbers of the residual stream per token."""
        return model.hidden_size / (self.tensor if self.parallel.sequence_parallel else 1)


def stage_memory(
    name: str,
    teacher: ModelConfig,
    student: ModelConfig,
    config: StageConfig,
    parallel: ParallelConfig,
    *,
    data_ranks: int,
) -> list[StageMemory]:
    """Memory of training stage `name` on every pipeline stage, for a bfloat16 model on CUDA.

    For align `student` has an RNN mixer in every layer (`ModelConfig.converted`). `data_ranks` are
    the replicas: processes over tensor * pipeline * context. Raises LayoutError for a layout
    without enough layers."""
    settled = placed(name, config, parallel, None if name == "finetune" else teacher, student)
    layout = pipeline_layout(student, settled)
    ranks = [
        _Rank(name, config, settled, data_ranks, layout, index) for index in range(len(layout))
    ]
    return [
        _align(rank, teacher, student) if name == "align" else _head_stage(rank, teacher, student)
        for rank in ranks
    ]


def _align(rank: _Rank, teacher: ModelConfig, student: ModelConfig) -> StageMemory:
    mixers = [student.spec(student.mixer_types[layer]) for layer in rank.layers]
    trained = sum(mixer.num_parameters(student, rank.tensor) for mixer in mixers)
    inside = sum(mixer.saved_activations(student, rank.tensor, "none") for mixer in mixers)
    # each one's input and its difference from the attention
    kept = inside + 2 * rank.stream(student) * len(mixers)
    return StageMemory(
        **_states(rank, trained),
        teacher=NARROW * _parameters(rank, teacher, trunk=True),
        activations=NARROW * rank.tokens * kept,
        work=NARROW * (rank.tokens * _mlp_work(rank, teacher)),
    )


def _head_stage(rank: _Rank, teacher: ModelConfig, student: ModelConfig) -> StageMemory:
    distils = rank.name == "distill"
    kept = (
        sum(_kept_numbers(rank, student, layer, rank.recompute) for layer in rank.layers)
        * rank.in_flight
    )
    waiting = 0.0
    # with several pipeline stages the teacher has seen all micro-batches before the student begins
    if distils and rank.last:
        waiting = rank.stream(teacher) * (
            rank.config.num_micro_batches(rank.data_ranks) if len(rank.layout) > 1 else 1
        )
    words = student.vocab_size / rank.tensor
    again = {
        "none": 0.0,
        "selective": student.ffn_hidden_size / rank.tensor + 2 * student.hidden_size,
        "full": 0.0,
    }[rank.recompute]
    if rank.recompute == "full":
        again = max(_kept_numbers(rank, student, layer, "none") for layer in rank.layers)
    matrix = 2 * student.ffn_hidden_size * student.hidden_size / rank.tensor
    tied = student.share_embeddings_and_output_weights and rank.first
    backward = NARROW * (
        rank.tokens * (_mlp_work(rank, student) + again)
        + matrix
        + (words * student.hidden_size if tied else 0.0)
    )
    return StageMemory(
        **_states(rank, _parameters(rank, student)),
        teacher=NARROW * _parameters(rank, teacher) if distils else 0.0,
        activations=NARROW * rank.tokens * (kept + waiting),
        work=max(
            backward, _loss(rank, student, logit_sets=2 if distils else 1) if rank.last else 0.0
        ),
    )


def _states(rank: _Rank, trained: float) -> dict[str, float]:
    """Weights, gradients and optimizer state of `trained` weights, as DeepSpeed holds them under
    each ZeRO stage."""
    shards = rank.data_ranks * rank.parallel.context_parallel_size
    zero = rank.parallel.zero_stage
    weights, gradients = NARROW * trained, WIDE * trained
    optimizer = 0.0 if rank.parallel.offload_optimizer else STATE * trained / shards
    if zero >= 2:
        wide_copy = WIDE if rank.parallel.gradient_exchange == "float32" else 0
        gradients = gradients / shards + min(BUCKET_NUMBERS, trained) * (NARROW + wide_copy)
    if zero == 3:
        weights = weights / shards + NARROW * min(LIVE_WEIGHTS, trained)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def _parameters(rank: _Rank, model: ModelConfig, *, trunk: bool = False) -> float:
    """Weights of a model on one rank; a `trunk` ends before the last layer's MLP."""
    hidden = model.hidden_size
    mlp = 3 * model.hidden_size * model.ffn_hidden_size + model.hidden_size
    mixers = sum(
        model.spec(model.mixer_types[layer]).num_parameters(model, rank.tensor)
        for layer in rank.layers
    )
    own = (hidden + mlp) * len(rank.layers)
    if trunk and rank.last:
        own -= mlp
    tables = int(rank.first)
    if rank.last and not trunk:
        own += hidden
        tables += not (rank.first and model.share_embeddings_and_output_weights)
    return mixers + (own + tables * model.vocab_size * hidden) / rank.tensor


def _kept_numbers(rank: _Rank, model: ModelConfig, layer: int, recompute: Recompute) -> float:
    """Numbers per token that one layer keeps for backward."""
    stream = rank.stream(model)
    inner = model.ffn_hidden_size / rank.tensor
    if recompute == "full":
        return stream
    kept = model.spec(model.mixer_types[layer]).saved_activations(model, rank.tensor, recompute)
    if recompute == "selective":
        return 2 * stream + kept + 2 * inner
    return 4 * stream + kept + 3 * inner


def _mlp_work(rank: _Rank, model: ModelConfig) -> float:
    """Numbers per token that are alive while the backward of an MLP runs, which holds more than a
    mixer's."""
    return 3 * model.ffn_hidden_size / rank.tensor + 3 * model.hidden_size


def _loss(rank: _Rank, student: ModelConfig, *, logit_sets: int) -> float:
    """Bytes of the loss: the head's gradient in fp32, a chunk of logits and their gradients (later
    a bf16 copy), gradient of hidden."""
    words = ceil(student.vocab_size / rank.tensor)
    limit = rank.config.vocab_chunk_tokens if isinstance(rank.config, HeadStageConfig) else None
    per_token = words * (logit_sets * WIDE + CHUNKS_PER_PRODUCT * NARROW)
    chunk = chunk_size(rank.tokens, limit, per_token, torch.device("cuda")) * per_token
    head = words * student.hidden_size
    return WIDE * head + max(chunk, NARROW * head) + NARROW * rank.tokens * student.hidden_size
