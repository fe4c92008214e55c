"""Estimate the time of an optimizer step from shapes, layout and the rates of a machine.

A step's time is that of the slowest pipeline stage: products and attention by their operations,
everything else by the bytes it moves, collectives by bytes and latency, AdamW by the bytes of its
state. Assumptions:

- products, memory traffic and attention do not overlap; collectives of tensor, sequence and context
  parallelism are not hidden, nor is the exchange of gradients, which ends a step
- pipelines run one micro-batch forward, one backward (1F1B), and all stages wait for the slowest;
  with several chunks per stage the schedule is followed pass by pass (model/pipeline_schedule.py).
  What one chunk sends to the next is not hidden
- every GPU of a group is on one host while the group has at most as many ranks as a host has GPUs
  (tensor ranks are neighbours, then context, then data, then pipeline)
- loading of data, saves and evaluations are left out

`tools/bench/step_time.py` sets estimates beside what was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig, StageConfig
from megatron_hypenet.model.flops import head_flops, mlp_flops
from megatron_hypenet.model.pipeline_layout import pipeline_layout
from megatron_hypenet.model.pipeline_schedule import step_length
from megatron_hypenet.planning.layer_placement import placed
from megatron_hypenet.planning.machine import Machine
from megatron_hypenet.stages.footprint import ACCUMULATION_BYTES, COMPUTE_BYTES, StageRank
from megatron_hypenet.stages.spec import Passes, stage_spec

MLP_TRAFFIC = 8 * COMPUTE_BYTES / 3
"""Bytes per inner channel and forward pass of an MLP between its products: forward reads two and
writes one, backward reads three and writes two."""
STREAM_TRAFFIC = 18 * COMPUTE_BYTES / 3
"""Bytes per hidden channel and forward pass of a layer's norms and residual sums."""
LOGIT_TRAFFIC = 9.6 / 3
"""Bytes per logit and forward pass of the loss."""
COMPARISON_TRAFFIC = 40.0
"""Bytes per hidden channel of a layer's output that is compared with another model's, in both
directions: products and sums in fp32, which are not fused."""
GRADIENT_TRAFFIC = 10.0
"""Bytes per weight and micro-batch: a bf16 gradient is read and added to its fp32 sum."""
OPTIMIZER_TRAFFIC = 29.0
"""Bytes per weight of AdamW: fp32 gradient, master and two moments read, the three and the bf16
weight written, the gradient set to zero."""
BACKWARD_SHARE = 2.0
"""Memory traffic of a backward pass in forward passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one step by what they are spent on."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    """Norms, gates, RNN mixers, SwiGLU and loss: bound by the bytes that they move."""
    gaps: float = 0.0
    """Small kernels that are not counted, and time between kernels."""
    launch: float = 0.0
    """Time in which the GPU waits for the host."""
    tensor: float = 0.0
    """Collectives of tensor and sequence parallelism."""
    context: float = 0.0
    """Exchange of keys, values and states."""
    gather: float = 0.0
    """Weights under ZeRO-3."""
    pipeline: float = 0.0
    """Hidden states sent to the next chunk of the pipeline, and their gradients back."""
    bubble: float = 0.0
    """Time in which a pipeline stage waits for the others."""
    data: float = 0.0
    """Exchange of gradients and weights of the replicas."""
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of a step."""
        return sum(getattr(self, field.name) for field in fields(self))

    def shares(self, least: float = 0.1) -> str:
        """Return the parts that take at least this share of the step, the largest first."""
        parts = sorted(((getattr(self, f.name), f.name) for f in fields(self)), reverse=True)
        shares = [(name, value / self.total) for value, name in parts]
        return ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= least)

    def scaled(self, factor: float) -> StepTime:
        """Return all parts times `factor`."""
        return StepTime(**{f.name: factor * getattr(self, f.name) for f in fields(self)})

    def __add__(self, other: StepTime) -> StepTime:
        """Return the sums of all parts."""
        return StepTime(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def step_time(
    name: str,
    teacher: ModelConfig,
    student: ModelConfig,
    config: StageConfig,
    parallel: ParallelConfig,
    *,
    data_ranks: int,
    machine: Machine,
) -> StepTime:
    """Return the time of a step of training stage `name` in bf16 on CUDA with this package's
    kernels; arguments as of `planning.memory.stage_memory`. Raises LayoutError for a layout without
    enough layers."""
    settled = placed(name, config, parallel, teacher, student)
    layout = pipeline_layout(student, settled)
    num_stages = settled.pipeline_model_parallel_size
    ranks = [StageRank(config, settled, data_ranks, layout, index) for index in range(num_stages)]
    # each chunk as a stage of its own
    apart = settled.model_copy(
        update={
            "pipeline_model_parallel_size": len(layout),
            "virtual_pipeline_model_parallel_size": 1,
        }
    )
    chunks = [StageRank(config, apart, data_ranks, layout, index) for index in range(len(layout))]
    parts = [_micro_batch(name, teacher, student, chunk, machine) for chunk in chunks]
    stages = [sum(parts[stage::num_stages], StepTime()) for stage in range(num_stages)]
    slowest = max(stages, key=lambda part: part.total)
    micro_batches = ranks[0].micro_batches
    end = max(
        (_step_end(name, teacher, student, rank, machine) for rank in ranks),
        key=lambda part: part.total,
    )
    idle = (num_stages - 1) * slowest.total
    if settled.interleaved:
        length = step_length([part.total for part in parts], num_stages, micro_batches)
        idle = length - micro_batches * slowest.total
    return slowest.scaled(micro_batches) + StepTime(bubble=idle) + end


def _micro_batch(
    name: str, teacher: ModelConfig, student: ModelConfig, rank: StageRank, machine: Machine
) -> StepTime:
    """Return the time of one micro-batch, forward and backward, on one pipeline stage."""
    found = StepTime()
    for passes in stage_spec(name).passes(rank.config, teacher, student):
        recompute = rank.recompute if passes.recomputes else "none"
        for part in _layers(passes, rank, machine, recompute):
            found = found + part
        if rank.last and passes.head:
            found = found + _head(passes, rank, machine)
    if rank.stages > 1:
        found = found + StepTime(pipeline=_pipeline_exchange(name, teacher, student, rank, machine))
    several = rank.tensor * rank.parallel.context_parallel_size * rank.stages > 1
    if rank.data_ranks > 1 or several:
        slower = machine.shared_clock - 1
        found = found + StepTime(products=slower * found.products)
    trained = stage_spec(name).footprint(rank, teacher, student).trained
    found = found + StepTime(memory=trained * GRADIENT_TRAFFIC / machine.memory)
    if several or rank.parallel.zero_stage == 3:
        # such steps are not CUDA graphs; kernels of large layers hide their launches
        floor = machine.launch * len(rank.layers) * 3
        found = found + StepTime(launch=max(0.0, floor - found.total))
    return found


def _layers(
    passes: Passes, rank: StageRank, machine: Machine, recompute: str
) -> Iterator[StepTime]:
    """Yield the time of all layers of one kind of one model on one pipeline stage."""
    model = passes.model
    trains = passes.core > 1
    last = model.num_layers - 1
    kinds = Counter(
        (model.mixer_types[layer], passes.mlp if layer < last or passes.last_mlp else 0)
        for layer in rank.layers
    )
    gathered = _gathered(model, rank, machine, trains=trains)
    for (mixer, mlp), count in kinds.items():
        yield _layer(passes, mixer, mlp, rank, machine, recompute).scaled(count)
        yield StepTime(gather=count * gathered)


def _layer(
    passes: Passes, mixer: str, mlp: int, rank: StageRank, machine: Machine, recompute: str
) -> StepTime:
    """Return the time of one layer with `mixer` and `mlp` passes of an MLP. Matrices are split over
    tensor ranks, so that each rank computes as much as for `tokens / tensor` tokens."""
    model = passes.model
    spec = model.spec(mixer)
    work = spec.flops(model, rank.config.seq_length)
    trains = passes.core > 1
    again = int(recompute == "full")
    inner = model.ffn_hidden_size / rank.tensor
    sections = sum(spec.sections(model).values()) / rank.tensor
    mlp_work = (mlp + again * (mlp > 0)) * mlp_flops(model)
    products = (
        ((passes.projections + again) * work.projections, sections),
        ((passes.output + again) * work.output, model.query_size / rank.tensor),
        (mlp_work * 2 / 3, 2 * inner),
        (mlp_work / 3, inner),
    )
    product_seconds = sum(
        flops * _per_flop(rank.tokens, model.hidden_size, size, machine) for flops, size in products
    )
    attention = 0.0
    if mixer == ATTENTION:
        backward = BACKWARD_SHARE * trains / machine.attention_backward
        edge = 1 + machine.attention_edge / rank.config.seq_length
        attention = edge * work.core * ((1 + again) / machine.attention_forward + backward)
    # selective recomputation repeats only what moves bytes
    repeated = int(recompute != "none")
    moved = (1 + BACKWARD_SHARE * trains + repeated) / 3 * spec.core_traffic * model.query_size
    if passes.compared:
        moved += COMPARISON_TRAFFIC * model.hidden_size
    if mlp:
        split = rank.parallel.sequence_parallel or rank.tensor == 1
        stream = model.hidden_size * (1 if split else rank.tensor)
        moved += (mlp + repeated) * (MLP_TRAFFIC * model.ffn_hidden_size + STREAM_TRAFFIC * stream)
    each = rank.tokens / rank.tensor
    return StepTime(
        products=each * product_seconds,
        attention=each * attention,
        memory=each * moved / machine.memory,
        gaps=(1 + trains + again) * machine.gap,
        tensor=_tensor_exchange(
            model, rank, machine, blocks=1 + (mlp > 0), forward=1 + again, backward=trains
        ),
        context=_context_exchange(model, mixer, rank, machine, trains=trains, again=again),
    )


def _per_flop(tokens: float, rows: float, columns: float, machine: Machine) -> float:
    """Return the seconds of one operation in a product of tokens x rows by rows x columns."""
    edges = machine.product_edge * (1 / tokens + 1 / rows + 1 / columns)
    return (1 + edges) / machine.products


def _head(passes: Passes, rank: StageRank, machine: Machine) -> StepTime:
    model = passes.model
    each = rank.tokens / rank.tensor
    seconds = _per_flop(rank.tokens, model.hidden_size, model.vocab_size / rank.tensor, machine)
    moved = passes.head * LOGIT_TRAFFIC + passes.logit_traffic
    return StepTime(
        products=each * passes.head * head_flops(model) * seconds,
        memory=each * moved * model.vocab_size / machine.memory,
    )


def _link(ranks: int, within: int, machine: Machine) -> tuple[float, float]:
    """Return bytes per second and latency of a collective over `ranks`, every `within`-th GPU.

    Between hosts a ring crosses the network once for all its members on a host, so that they share
    as many network adapters."""
    if ranks * within <= machine.gpus_per_host:
        return machine.host_link, machine.host_latency
    members = max(1, machine.gpus_per_host // within)
    return min(machine.host_link, members * machine.network), machine.network_latency


def _tensor_exchange(
    model: ModelConfig,
    rank: StageRank,
    machine: Machine,
    *,
    blocks: int,
    forward: int,
    backward: bool,
) -> float:
    """Return the seconds of a layer's collectives: in each direction an all-gather and a
    reduce-scatter (or an all-reduce, which sends as much) around each of `blocks`, mixer and MLP;
    under sequence parallelism backward gathers the inputs once more."""
    if rank.tensor == 1:
        return 0.0
    bandwidth, latency = _link(rank.tensor, 1, machine)
    moved = COMPUTE_BYTES * rank.tokens * model.hidden_size * (rank.tensor - 1) / rank.tensor
    times = 2 * forward + (2 + rank.parallel.sequence_parallel) * backward
    return blocks * times * (moved / bandwidth + latency)


def _context_exchange(
    model: ModelConfig, mixer: str, rank: StageRank, machine: Machine, *, trains: bool, again: int
) -> float:
    """Return the seconds of a layer's exchange over context-parallel ranks: keys and values of
    softmax attention, and their gradients; states of RNN mixers."""
    ranks = rank.parallel.context_parallel_size
    if ranks == 1:
        return 0.0
    bandwidth, latency = _link(ranks, rank.tensor, machine)
    heads = model.num_attention_heads / rank.tensor
    if mixer == ATTENTION:
        moved = COMPUTE_BYTES * 2 * model.kv_size / rank.tensor * rank.tokens * (ranks - 1)
    else:
        moved = ACCUMULATION_BYTES * 2 * heads * model.kv_channels**2 * (ranks - 1)
    forward = 1 + again
    # gradients of keys and values go back in fp32
    backward = 2 * trains if mixer == ATTENTION else trains
    return (forward + backward) * moved / bandwidth + (forward + trains) * latency


def _pipeline_exchange(
    name: str, teacher: ModelConfig, student: ModelConfig, rank: StageRank, machine: Machine
) -> float:
    """Return the seconds in which a chunk of the pipeline sends a micro-batch's hidden states to
    the next one, for each model that runs, and its gradients to the one before."""
    within = rank.tensor * rank.parallel.context_parallel_size * rank.data_ranks
    bandwidth, latency = _link(2, within, machine)
    seconds = 0.0
    for passes in stage_spec(name).passes(rank.config, teacher, student):
        moved = COMPUTE_BYTES * rank.tokens * rank.stream(passes.model)
        # only a model whose loss is behind its last layer sends gradients
        ways = (not rank.last) + (passes.head > 1 and not rank.first)
        seconds += ways * (moved / bandwidth + latency)
    return seconds


def _gathered(model: ModelConfig, rank: StageRank, machine: Machine, *, trains: bool) -> float:
    """Return the seconds of a layer's weights under ZeRO-3, gathered in each direction, and of its
    gradients; a frozen model is not sharded."""
    if rank.parallel.zero_stage < 3 or not trains:
        return 0.0
    ranks = rank.data_ranks * rank.parallel.context_parallel_size
    bandwidth, latency = _link(ranks, rank.tensor, machine)
    weights = rank.parameters(model) / len(rank.layers) * (ranks - 1) / ranks
    moved = weights * (2 * COMPUTE_BYTES + _gradient_bytes(rank))
    return moved / bandwidth + 3 * latency + 2 * machine.gathered_layer


def _gradient_bytes(rank: StageRank) -> int:
    exchanged = rank.parallel.gradient_exchange
    return ACCUMULATION_BYTES if exchanged == "float32" else COMPUTE_BYTES


def _step_end(
    name: str, teacher: ModelConfig, student: ModelConfig, rank: StageRank, machine: Machine
) -> StepTime:
    """Return the time after the last micro-batch: gradients are added over the replicas, AdamW
    runs, weights are gathered."""
    trained = stage_spec(name).footprint(rank, teacher, student).trained
    ranks = rank.data_ranks * rank.parallel.context_parallel_size
    zero = rank.parallel.zero_stage
    own = trained / ranks if zero else trained
    data = 0.0
    if ranks > 1 and zero < 3:
        bandwidth, latency = _link(ranks, rank.tensor, machine)
        gradients = _gradient_bytes(rank) * (1 if zero else 2)
        moved = trained * (gradients + (COMPUTE_BYTES if zero else 0)) * (ranks - 1) / ranks
        data = moved / bandwidth + 2 * latency
    return StepTime(data=data, optimizer=own * OPTIMIZER_TRAFFIC / machine.memory)
