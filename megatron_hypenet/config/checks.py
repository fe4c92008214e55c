"""Rules that span the model, the run and the number of processes. Each is checked without a GPU, before anything heavy starts.

Every finding names the rule, the values and settings that would be valid; all findings are listed in one LayoutError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import STAGES, ParallelConfig, RunConfig, StageConfig
from megatron_hypenet.errors import ConfigError, LayoutError

TRAINING_VERBS = ("train", "run", "demo")


def check_layout(model_config: ModelConfig, run_config: RunConfig, world_size: int, stages: Iterable[str] = STAGES) -> None:
    """Raise LayoutError listing every rule that this model and run break on `world_size` processes.

    `stages` are the stages that will run; the batch and sequence rules are checked for these only.
    """
    parallel = run_config.parallel
    problems = [*_model_problems(model_config, parallel), *_world_problems(parallel, world_size)]
    if world_size % parallel.model_parallel_size == 0:
        dp_size = world_size // parallel.model_parallel_size
        for name in stages:
            problems += _stage_problems(name, run_config.stage(name), parallel, dp_size)
    if problems:
        raise LayoutError(_listing(problems))


def refuse_unbuilt_axes(parallel: ParallelConfig, verb: str) -> None:
    """Raise LayoutError when `verb` cannot yet work with a tensor-, pipeline- or context-parallel size above 1."""
    sizes = {
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "parallel.context_parallel_size": parallel.context_parallel_size,
    }
    asked = [f"{key}={size}" for key, size in sizes.items() if size > 1]
    if asked:
        instead = "; data parallelism spreads work, and parallel.zero_stage=2 or 3 fits larger models" if verb in TRAINING_VERBS else ""
        raise LayoutError(f"{', '.join(asked)} is not available yet for hypenet {verb}; use 1{instead}")


def check_model_fits_selection(model_config: ModelConfig, run_config: RunConfig) -> None:
    """Raise ConfigError when layer selection is asked to keep more softmax layers than the model has."""
    wanted = run_config.select.num_attention_layers
    if wanted is not None and wanted > model_config.num_layers:
        raise ConfigError(
            f"select.num_attention_layers={wanted} exceeds the model's num_layers={model_config.num_layers}; "
            f"use at most {model_config.num_layers}, or null for {max(1, model_config.num_layers // 4)}"
        )


def divisors_near(value: int, wanted: int, fits: Callable[[int], bool] = lambda _: True) -> list[int]:
    """Up to two divisors of `value` that satisfy `fits`, nearest to `wanted`, ascending."""
    found = [size for size in range(1, value + 1) if value % size == 0 and fits(size)]
    return sorted(sorted(found, key=lambda size: (abs(size - wanted), size))[:2])


def multiples_near(unit: int, wanted: int) -> list[int]:
    """The positive multiples of `unit` just below and just above `wanted` (the next two when none is below)."""
    below = wanted // unit * unit
    return [below, below + unit] if below else [unit, 2 * unit]


def _model_problems(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    problems = []
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "vocab_size": model.vocab_size,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    broken = {key: size for key, size in sizes.items() if size % tp}
    if broken:
        # divisors of the groups divide the heads too, so the groups bound the search
        valid = divisors_near(model.num_query_groups, tp, lambda size: not any(value % size for value in sizes.values()))
        named = ", ".join(f"model {key}={size}" for key, size in broken.items())
        problems.append(f"parallel.tensor_model_parallel_size={tp} does not divide {named}; use {_either(valid)}")
    if parallel.sequence_parallel and tp == 1:
        problems.append(
            "parallel.sequence_parallel=true splits over tensor-parallel processes and needs "
            "parallel.tensor_model_parallel_size > 1; use a size of 2 or more, or sequence_parallel=false"
        )
    if pp > model.num_layers:
        problems.append(
            f"parallel.pipeline_model_parallel_size={pp} exceeds the model's num_layers={model.num_layers}; "
            f"use {_either(divisors_near(model.num_layers, pp))}"
        )
    if pp > 1 and parallel.zero_stage > 1:
        problems.append(
            f"parallel.zero_stage={parallel.zero_stage} with parallel.pipeline_model_parallel_size={pp}: pipeline parallelism "
            "accumulates gradients that ZeRO 2 and 3 would have given away; use zero_stage 0 or 1, or a pipeline size of 1"
        )
    return problems


def _world_problems(parallel: ParallelConfig, world_size: int) -> list[str]:
    size = parallel.model_parallel_size
    if world_size % size == 0:
        return []
    near = " or ".join(map(str, multiples_near(size, world_size)))
    return [
        f"{world_size} processes cannot be divided into replicas of {size} (tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size}); start {near} processes, or use sizes "
        f"whose product is {' or '.join(map(str, divisors_near(world_size, size)))}"
    ]


def _stage_problems(name: str, stage: StageConfig, parallel: ParallelConfig, dp_size: int) -> list[str]:
    problems = []
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    segment = 1
    if cp > 1:
        segment, why = 2 * cp, f"2 * parallel.context_parallel_size={cp} (each process holds two chunks)"
    if parallel.sequence_parallel and tp > 1:
        both = cp * tp
        why = f"context_parallel_size={cp} * tensor_model_parallel_size={tp} (sequence_parallel)" if segment == 1 else f"{why} and {both}"
        segment = math.lcm(segment, both)
    if stage.seq_length % segment:
        problems.append(
            f"{name}.seq_length={stage.seq_length} is not a multiple of {segment}, {why}; "
            f"use {_either(multiples_near(segment, stage.seq_length))}"
        )
    unit = stage.micro_batch_size * dp_size
    if stage.global_batch_size % unit:
        problems.append(
            f"{name}.global_batch_size={stage.global_batch_size} is not a multiple of micro_batch_size={stage.micro_batch_size} * "
            f"{dp_size} data-parallel processes = {unit}; use {_either(multiples_near(unit, stage.global_batch_size))}"
        )
    return problems


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))


def _listing(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems with the parallel layout\n" + "\n".join(f"  {problem}" for problem in problems)
