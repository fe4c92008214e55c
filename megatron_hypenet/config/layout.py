"""A run on a number of processes, as the layout rules check it, and small changes to it that may
lift a problem."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_hypenet.config.mixers import MixerSpec
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import STAGES, AlignConfig, ParallelConfig, RunConfig

PROCESSES = "processes"
"""Key of a Change for the number of processes."""

TENSOR = "parallel.tensor_model_parallel_size"
PIPELINE = "parallel.pipeline_model_parallel_size"
CONTEXT = "parallel.context_parallel_size"
SEQUENCE = "parallel.sequence_parallel"
VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"
PIPELINE_LAYOUT = "parallel.pipeline_layout"
ZERO = "parallel.zero_stage"
OFFLOAD = "parallel.offload_optimizer"
IMPL = "model.transformer_impl"
FP8_TEACHER = "fp8.teacher"
FP8_STUDENT = "fp8.student"

Change = Mapping[str, object]
"""Settings to change: dotted key (section.name) or PROCESSES -> value."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A run on a number of processes. Without a model only rules that do not need one apply."""

    model: ModelConfig | None
    run: RunConfig
    world_size: int | None = None
    """None: as many processes as one replica takes."""
    stages: tuple[str, ...] = STAGES
    """Training stages that will run; batch and sequence rules are asked for these only."""

    @property
    def parallel(self) -> ParallelConfig:
        """Return the layout's settings."""
        return self.run.parallel

    @property
    def processes(self) -> int:
        """Return the number of processes that are started."""
        return self.world_size or self.parallel.model_parallel_size

    @property
    def dp_size(self) -> int | None:
        """Return the number of replicas; None when the processes cannot be divided into
        replicas."""
        replicas, left = divmod(self.processes, self.parallel.model_parallel_size)
        return None if left else replicas

    @property
    def tensor_unit(self) -> int:
        """Return the largest tensor-parallel size that the model allows; every allowed size divides
        it."""
        return math.gcd(*self.tensor_sizes.values())

    @property
    def tensor_sizes(self) -> dict[str, int]:
        """Return the sizes of the model, by name, that the tensor-parallel size must divide: those
        of every mixer, vocabulary and MLP."""
        assert self.model is not None, "rules about the model are checked with a model only"
        slices = {
            name: size
            for spec in self.mixers
            for name, size in spec.layout_rules(self.model).tensor_slices.items()
        }
        return {
            **slices,
            "vocab_size": self.model.vocab_size,
            "ffn_hidden_size": self.model.ffn_hidden_size,
        }

    @property
    def mixers(self) -> tuple[MixerSpec, ...]:
        """Return the mixers that the model's layers have, softmax attention first, and the one that
        stage 1 trains."""
        assert self.model is not None, "rules about the model are checked with a model only"
        found = {name: self.model.spec(name) for name in (ATTENTION, *self.model.used_mixers)}
        for settings in map(self.run.stage, self.stages):
            if isinstance(settings, AlignConfig):
                found.setdefault(settings.mixer, settings.spec)
        return tuple(found.values())

    @property
    def fp8_sizes(self) -> dict[str, int]:
        """Return the sizes, by name, of what the linear layers on one tensor-parallel rank read and
        write."""
        assert self.model is not None, "rules about the model are checked with a model only"
        tp = self.parallel.tensor_model_parallel_size
        found = {
            "hidden_size": self.model.hidden_size,
            "ffn_hidden_size / tensor size": self.model.ffn_hidden_size // tp,
        }
        for spec in self.mixers:
            rows = sum(spec.sections(self.model).values())
            found[f"rows of {spec.name}'s input projection / tensor size"] = rows // tp
        found["query_size / tensor size"] = self.model.query_size // tp
        return found

    def changed(self, change: Change) -> Layout:
        """Return this layout with other settings; the result is not validated."""
        run = self.run
        world_size = self.world_size
        for key, value in change.items():
            if key == PROCESSES:
                assert isinstance(value, int)
                world_size = value
                continue
            section, name = key.split(".")
            run = run.model_copy(
                update={section: getattr(run, section).model_copy(update={name: value})}
            )
        return replace(self, run=run, world_size=world_size)

    def with_tensor(self, size: int) -> dict[str, object]:
        """Return the change to another tensor-parallel size; a size of 1 also turns sequence
        parallelism off."""
        off = {SEQUENCE: False} if size == 1 and self.parallel.sequence_parallel else {}
        return {TENSOR: size, **off}

    def with_pipeline(self, size: int) -> dict[str, object]:
        """Return the change to another pipeline size; an explicit layout is removed, because it is
        for the old size, and a size of 1 has no chunks that could take turns."""
        off: dict[str, object] = {}
        if self.parallel.pipeline_layout is not None:
            off[PIPELINE_LAYOUT] = None
        if size == 1 and self.parallel.interleaved:
            off[VIRTUAL] = 1
        return {PIPELINE: size, **off}

    def with_chunks(self, number: int) -> dict[str, object]:
        """Return the change to so many chunks per pipeline stage; an explicit layout is removed."""
        off = {PIPELINE_LAYOUT: None} if self.parallel.pipeline_layout is not None else {}
        return {VIRTUAL: number, **off}

    def on_fitting_processes(self, change: Change) -> dict[str, object]:
        """Return `change` together with the nearest number of processes that its replicas fill; the
        change alone if the number is free."""
        if self.world_size is None:
            return dict(change)
        unit = self.changed(change).parallel.model_parallel_size
        return {**change, PROCESSES: multiples_near(unit, self.world_size)[0]}


def divisors_near(
    value: int, wanted: int, fits: Callable[[int], bool] = lambda _: True
) -> list[int]:
    """Return the divisors of `value` that satisfy `fits`, nearest to `wanted` first."""
    found = [size for size in range(1, value + 1) if value % size == 0 and fits(size)]
    return sorted(found, key=lambda size: (abs(size - wanted), size))


def multiples_near(unit: int, wanted: int) -> list[int]:
    """Return the positive multiples of `unit` just below and just above `wanted` (the next two when
    none is below)."""
    below = wanted // unit * unit
    return [below, below + unit] if below else [unit, 2 * unit]


def even_layout(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return layers per pipeline stage that differ by at most one, the longer stages first."""
    each, more = divmod(num_layers, num_stages)
    return tuple(each + (stage < more) for stage in range(num_stages))


def phrase(changes: Sequence[Change]) -> str:
    """Write changes as advice, each ready to be copied to the command line: `use a=1 or 2`, `use
    a=1, or b=2 with c=null`."""
    keys = {tuple(change) for change in changes}
    if keys == {(PROCESSES,)}:
        return f"start {' or '.join(str(change[PROCESSES]) for change in changes)} processes"
    if len(keys) == 1 and len(only := next(iter(keys))) == 1:
        return f"use {only[0]}={' or '.join(json.dumps(change[only[0]]) for change in changes)}"
    return "use " + ", or ".join(map(_spelled, changes))


def _spelled(change: Change) -> str:
    settings = " with ".join(
        f"{key}={json.dumps(value)}" for key, value in change.items() if key != PROCESSES
    )
    if PROCESSES not in change:
        return settings
    return (
        f"{settings} on {change[PROCESSES]} processes"
        if settings
        else f"{change[PROCESSES]} processes"
    )
