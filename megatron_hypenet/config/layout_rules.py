"""The rules of parallel layouts, one function each: how a layout breaks the rule, and settings that
may lift the problem, best first.

A rule may propose many settings; config/checks.py applies every proposal, keeps those that lift the
problem, and prefers those that break nothing else. docs/errors.md explains each rule under its name
in RULES. One file, because a rule is read beside the others that its proposals may break.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_hypenet.config.layout import (
    CONTEXT,
    FP8_STUDENT,
    FP8_TEACHER,
    IMPL,
    OFFLOAD,
    PIPELINE,
    PIPELINE_LAYOUT,
    PROCESSES,
    SEQUENCE,
    VIRTUAL,
    ZERO,
    Change,
    Layout,
    divisors_near,
    even_layout,
    multiples_near,
)
from megatron_hypenet.config.schema import HeadStageConfig

NEAREST = 8
"""Number of neighbouring sizes that a rule proposes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule."""

    where: str
    """Training stage that breaks it, or "" for the run as a whole."""
    says: str
    proposals: tuple[Change, ...]


Rule = Callable[[Layout], Iterator[Finding]]


def tensor_slices(layout: Layout) -> Iterator[Finding]:
    """Require that every tensor-parallel process holds whole heads and equal slices of vocabulary
    and MLP."""
    model = layout.model
    tp = layout.parallel.tensor_model_parallel_size
    if model is None:
        return
    broken = ", ".join(f"{name}={size}" for name, size in layout.tensor_sizes.items() if size % tp)
    if broken:
        valid = [
            layout.with_tensor(size) for size in divisors_near(layout.tensor_unit, tp)[:NEAREST]
        ]
        moved = {**layout.with_tensor(1), CONTEXT: tp * layout.parallel.context_parallel_size}
        proposals = (*valid, moved, *map(layout.on_fitting_processes, valid))
        yield Finding(
            "",
            f"parallel.tensor_model_parallel_size={tp} does not divide the model's {broken}",
            proposals,
        )


def sequence_parallel(layout: Layout) -> Iterator[Finding]:
    """Require several tensor-parallel processes for sequence parallelism, which spreads norms and
    residuals over them."""
    parallel = layout.parallel
    if not parallel.sequence_parallel or parallel.tensor_model_parallel_size > 1:
        return
    sizes = (
        (2, 4, 8)
        if layout.model is None
        else [size for size in divisors_near(layout.tensor_unit, 2) if size > 1][:NEAREST]
    )
    larger: list[Change] = [layout.with_tensor(size) for size in sizes]
    says = (
        "parallel.sequence_parallel=true with parallel.tensor_model_parallel_size=1: "
        "there is nothing to spread over"
    )
    instead: Change = {SEQUENCE: False, CONTEXT: 2 * parallel.context_parallel_size}
    proposals: tuple[Change, ...] = (
        {SEQUENCE: False},
        *larger,
        *map(layout.on_fitting_processes, (*larger, instead)),
    )
    yield Finding("", says, proposals)


def pipeline_layers(layout: Layout) -> Iterator[Finding]:
    """Require that every pipeline stage has at least one layer, and each of its chunks."""
    model = layout.model
    parallel = layout.parallel
    pp = parallel.pipeline_model_parallel_size
    if model is None or pp == 1 or parallel.num_chunks <= model.num_layers:
        return
    count = model.num_layers
    most = max(1, count // parallel.virtual_pipeline_model_parallel_size)
    smaller: list[Change] = [
        layout.with_pipeline(size) for size in range(most, max(0, most - NEAREST), -1)
    ]
    single: Change = {
        **layout.with_pipeline(1),
        CONTEXT: pp * parallel.context_parallel_size,
    }
    says = f"{PIPELINE}={pp} exceeds the model's num_layers={count}"
    if parallel.interleaved:
        says = (
            f"{PIPELINE}={pp} * {VIRTUAL}={parallel.virtual_pipeline_model_parallel_size} chunks "
            f"exceed the model's num_layers={count}"
        )
        if pp <= count:
            smaller = [layout.with_chunks(count // pp), layout.with_chunks(1), *smaller]
    yield Finding("", says, (*smaller, single, *map(layout.on_fitting_processes, smaller)))


def pipeline_layout(layout: Layout) -> Iterator[Finding]:
    """Require that a written layout has one positive number per pipeline stage, or per chunk, and
    places every layer of the model once."""
    parallel = layout.parallel
    asked = parallel.pipeline_layout
    stages = parallel.num_chunks
    if asked is None:
        return
    total = layout.model.num_layers if layout.model else max(sum(asked), stages)
    faults = []
    if len(asked) != stages:
        chunks = (
            f" * {VIRTUAL}={parallel.virtual_pipeline_model_parallel_size}"
            if parallel.interleaved
            else ""
        )
        faults.append(
            f"has {len(asked)} entries for {PIPELINE}={parallel.pipeline_model_parallel_size}"
            f"{chunks}"
        )
    if layout.model and sum(asked) != total:
        faults.append(f"places {sum(asked)} layers of the model's num_layers={total}")
    if 0 in asked:
        part = "chunk" if parallel.interleaved else "stage"
        faults.append(f"leaves {part} {asked.index(0)} without layers")
    if faults:
        even: list[Change] = (
            [{PIPELINE_LAYOUT: even_layout(total, stages)}] if 1 < stages <= total else []
        )
        as_written: Change = {PIPELINE: len(asked)}
        if parallel.interleaved:
            as_written = {PIPELINE: len(asked), VIRTUAL: 1}
        proposals = (
            *even,
            {PIPELINE_LAYOUT: None},
            as_written,
            layout.on_fitting_processes(as_written),
            layout.with_pipeline(1),
        )
        yield Finding(
            "", f"parallel.pipeline_layout={list(asked)} {' and '.join(faults)}", proposals
        )


def interleaved_stages(layout: Layout) -> Iterator[Finding]:
    """Require several pipeline stages where stages have several chunks: with one, nothing takes
    turns."""
    parallel = layout.parallel
    if not parallel.interleaved or parallel.pipeline_model_parallel_size > 1:
        return
    more: list[Change] = [layout.with_pipeline(size) for size in (2, 4, 8)]
    yield Finding(
        "",
        f"{VIRTUAL}={parallel.virtual_pipeline_model_parallel_size} with {PIPELINE}=1: there are "
        "no pipeline stages whose chunks could take turns",
        (layout.with_chunks(1), *more, *map(layout.on_fitting_processes, more)),
    )


def interleaved_micro_batches(layout: Layout) -> Iterator[Finding]:
    """Require micro-batches in multiples of the pipeline size where stages have several chunks: as
    many go through a chunk before its stage turns to the next."""
    parallel = layout.parallel
    pp = parallel.pipeline_model_parallel_size
    dp_size = layout.dp_size
    if not parallel.interleaved or dp_size is None:
        return
    for name in layout.stages:
        stage = layout.run.stage(name)
        unit = stage.micro_batch_size * dp_size
        count, left = divmod(stage.global_batch_size, unit)
        if left or count % pp == 0:  # another rule reports what is left
            continue
        share = count * stage.micro_batch_size
        micro = [
            {f"{name}.micro_batch_size": size}
            for size in divisors_near(share, stage.micro_batch_size)
            if share // size % pp == 0
        ][:1]
        batch = [
            {f"{name}.global_batch_size": size}
            for size in multiples_near(unit * pp, stage.global_batch_size)
        ]
        yield Finding(
            name,
            f"{name} has {count} micro-batch{'es' if count > 1 else ''} per step, no multiple of "
            f"{PIPELINE}={pp}, as "
            f"{VIRTUAL}={parallel.virtual_pipeline_model_parallel_size} needs",
            (*micro, *batch, layout.with_chunks(1)),
        )


def pipeline_zero(layout: Layout) -> Iterator[Finding]:
    """Require ZeRO 0 or 1 with pipeline parallelism, which accumulates whole gradients over
    micro-batches; ZeRO 2 and 3 would reduce and free them before."""
    pp = layout.parallel.pipeline_model_parallel_size
    zero = layout.parallel.zero_stage
    if pp > 1 and zero > 1:
        yield Finding(
            "",
            f"parallel.zero_stage={zero} with parallel.pipeline_model_parallel_size={pp}: "
            "pipeline parallelism accumulates gradients "
            "that ZeRO 2 and 3 would have given away",
            ({ZERO: 1}, layout.with_pipeline(1), {ZERO: 0}),
        )


def pipeline_offload(layout: Layout) -> Iterator[Finding]:
    """Find pipeline schedules with offloading: DeepSpeed moves gradients to the CPU in its own
    backward pass, which the schedules do not call."""
    pp = layout.parallel.pipeline_model_parallel_size
    if pp > 1 and layout.parallel.offload_optimizer:
        yield Finding(
            "",
            f"parallel.offload_optimizer=true with parallel.pipeline_model_parallel_size={pp}: "
            "the optimizer is offloaded without "
            "pipeline parallelism only",
            (
                {OFFLOAD: False},
                layout.with_pipeline(1),
                layout.on_fitting_processes(layout.with_pipeline(1)),
            ),
        )


def whole_replicas(layout: Layout) -> Iterator[Finding]:
    """Require that the processes form whole replicas of tensor x pipeline x context size; the
    number of replicas is the data-parallel size."""
    if layout.dp_size is not None:
        return
    parallel = layout.parallel
    processes = layout.processes
    tp = parallel.tensor_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    counts: list[Change] = [
        {PROCESSES: count} for count in multiples_near(parallel.model_parallel_size, processes)
    ]
    smaller: list[Change] = [
        layout.with_tensor(size)
        for size in divisors_near(tp, tp, lambda size: processes % (size * pp * cp) == 0)
    ]
    smaller += [
        layout.with_pipeline(size)
        for size in divisors_near(pp, pp, lambda size: processes % (tp * size * cp) == 0)
    ]
    smaller += [
        {CONTEXT: size}
        for size in divisors_near(cp, cp, lambda size: processes % (tp * pp * size) == 0)
    ]
    says = (
        f"{processes} processes cannot be divided into replicas of {tp * pp * cp} (tensor {tp} x "
        f"pipeline {pp} x context {cp})"
    )
    yield Finding("", says, (counts[0], *smaller, counts[1]))


def sequence_split(layout: Layout) -> Iterator[Finding]:
    """Require lengths that can be cut into 2 chunks per context-parallel process, and each part
    again over tensor ranks under sequence parallelism."""
    parallel = layout.parallel
    tp = parallel.tensor_model_parallel_size
    cp = parallel.context_parallel_size
    unit = 1
    why = []
    if cp > 1:
        unit = 2 * cp
        why.append(f"2 * parallel.context_parallel_size={cp} (two chunks per process)")
    if parallel.sequence_parallel and tp > 1:
        unit = math.lcm(unit, cp * tp)
        why.append(
            f"context size {cp} * parallel.tensor_model_parallel_size={tp} "
            "(parallel.sequence_parallel)"
        )
    for name in layout.stages:
        length = layout.run.stage(name).seq_length
        if length % unit:
            key = f"{name}.seq_length"
            proposals = tuple({key: near} for near in multiples_near(unit, length))
            yield Finding(
                name,
                f"{key}={length} is not a multiple of {unit}: {' and of '.join(why)}",
                proposals,
            )


def chunk_halo(layout: Layout) -> Iterator[Finding]:
    """Require that what a mixer reads before a context-parallel chunk (a short convolution's
    window) lies within the one chunk before."""
    cp = layout.parallel.context_parallel_size
    if layout.model is None or cp == 1:
        return
    halo = max(spec.layout_rules(layout.model).halo_tokens for spec in layout.mixers)
    for name in layout.stages:
        length = layout.run.stage(name).seq_length
        if length // (2 * cp) < halo:
            key = f"{name}.seq_length"
            fewer = [{CONTEXT: size} for size in range(cp - 1, 0, -1)][:NEAREST]
            says = (
                f"{key}={length} gives chunks of {length // (2 * cp)} tokens over "
                f"parallel.context_parallel_size={cp}, and a mixer "
                f"reads {halo} tokens before each chunk"
            )
            yield Finding(
                name, says, ({key: 2 * cp * halo}, *fewer, *map(layout.on_fitting_processes, fewer))
            )


def global_batch(layout: Layout) -> Iterator[Finding]:
    """Require that every data-parallel process runs the same number of whole micro-batches per
    optimizer step."""
    dp_size = layout.dp_size
    if dp_size is None:  # another rule reports this
        return
    for name in layout.stages:
        stage = layout.run.stage(name)
        unit = stage.micro_batch_size * dp_size
        if stage.global_batch_size % unit == 0:
            continue
        share, left = divmod(stage.global_batch_size, dp_size)
        micro = (
            []
            if left
            else [
                {f"{name}.micro_batch_size": size}
                for size in divisors_near(share, stage.micro_batch_size)[:1]
            ]
        )
        batch = [
            {f"{name}.global_batch_size": size}
            for size in multiples_near(unit, stage.global_batch_size)
        ]
        yield Finding(
            name,
            f"{name}.global_batch_size={stage.global_batch_size} is not a multiple of "
            f"{name}.micro_batch_size={stage.micro_batch_size} * {dp_size} data-parallel processes "
            f"= {unit}",
            (*micro, *batch),
        )


FP8_UNIT = 16
BLOCK_UNIT = 128
"""What sizes in FP8 are multiples of: for matrix products, and for blocks with a scale each."""


def transformer_engine_zero(layout: Layout) -> Iterator[Finding]:
    """Require ZeRO 0 to 2 with Transformer Engine, whose layers keep references to weights that
    ZeRO-3 frees after use."""
    run = layout.run
    if run.model.transformer_impl == "transformer_engine" and run.parallel.zero_stage == 3:
        lifted: Change = {IMPL: "local", FP8_STUDENT: None}
        yield Finding(
            "",
            "parallel.zero_stage=3 with model.transformer_impl=transformer_engine: its layers keep "
            "weights that ZeRO-3 takes away",
            ({ZERO: 2}, {ZERO: 1}, lifted),
        )


def fp8_sizes(layout: Layout) -> Iterator[Finding]:
    """Require layers whose sizes on one rank suit products in FP8: multiples of 16, of 128 with
    blockwise scales."""
    fp8 = layout.run.fp8
    if layout.model is None or not fp8.used:
        return
    unit = BLOCK_UNIT if fp8.student == "blockwise" else FP8_UNIT
    broken = ", ".join(f"{name} {size}" for name, size in layout.fp8_sizes.items() if size % unit)
    if broken:
        asked = " and ".join(
            f"{key}={value}"
            for key, value in ((FP8_TEACHER, fp8.teacher), (FP8_STUDENT, fp8.student))
            if value
        )
        off: Change = {FP8_TEACHER: False, FP8_STUDENT: None}
        smaller = [
            layout.with_tensor(size)
            for size in divisors_near(layout.parallel.tensor_model_parallel_size, 1)
        ]
        yield Finding(
            "",
            f"{asked} needs sizes that are multiples of {unit}; this model has {broken}",
            ({FP8_STUDENT: "current"}, *smaller, *map(layout.on_fitting_processes, smaller), off),
        )


def fp8_tokens(layout: Layout) -> Iterator[Finding]:
    """Require that a rank's tokens of a micro-batch suit products in FP8, which the gradient of a
    weight sums over: multiples of 16, of 128 with blockwise scales."""
    fp8 = layout.run.fp8
    if fp8.student is None:
        return
    parallel = layout.parallel
    unit = BLOCK_UNIT if fp8.student == "blockwise" else FP8_UNIT
    parts = parallel.context_parallel_size * (
        parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    )
    for name in layout.stages:
        stage = layout.run.stage(name)
        if not isinstance(stage, HeadStageConfig):
            continue
        tokens = stage.micro_batch_size * stage.seq_length
        if tokens % (unit * parts):
            key = f"{name}.seq_length"
            near = multiples_near(math.lcm(unit * parts, parallel.sequence_unit), stage.seq_length)
            yield Finding(
                name,
                f"{name}.micro_batch_size={stage.micro_batch_size} * {key}={stage.seq_length} "
                f"tokens over {parts} ranks are no multiple of {unit}, as "
                f"{FP8_STUDENT}={fp8.student} needs",
                (*({key: length} for length in near), {FP8_STUDENT: None}),
            )


def fp8_recompute(layout: Layout) -> Iterator[Finding]:
    """Require scales that need no history where norms are recomputed: a second pass would change
    delayed scales again."""
    if layout.run.fp8.student != "delayed":
        return
    for name in layout.stages:
        stage = layout.run.stage(name)
        if isinstance(stage, HeadStageConfig) and stage.recompute == "selective":
            key = f"{name}.recompute"
            yield Finding(
                name,
                f"{key}=selective with {FP8_STUDENT}=delayed: recomputation would change the "
                "scales a second time",
                ({FP8_STUDENT: "current"}, {key: "none"}, {key: "full"}),
            )


RULES: dict[str, Rule] = {
    "tensor-slices": tensor_slices,
    "sequence-parallel": sequence_parallel,
    "pipeline-layers": pipeline_layers,
    "pipeline-layout": pipeline_layout,
    "interleaved-stages": interleaved_stages,
    "interleaved-micro-batches": interleaved_micro_batches,
    "pipeline-zero": pipeline_zero,
    "pipeline-offload": pipeline_offload,
    "whole-replicas": whole_replicas,
    "sequence-split": sequence_split,
    "chunk-halo": chunk_halo,
    "global-batch": global_batch,
    "transformer-engine-zero": transformer_engine_zero,
    "fp8-sizes": fp8_sizes,
    "fp8-tokens": fp8_tokens,
    "fp8-recompute": fp8_recompute,
}
"""Every rule under the name that messages and docs/errors.md give it."""
