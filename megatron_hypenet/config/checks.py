"""Rules that span the model, the run and the number of processes. Each is checked without a GPU,
before anything heavy starts.

Every finding names its rule, the values, and two settings that would lift it, each of them tried;
all are listed in one LayoutError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hypenet.config.layout import Change, Layout, phrase
from megatron_hypenet.config.layout_rules import RULES, Finding
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import (
    STAGES,
    FinetuneConfig,
    HeadStageConfig,
    ParallelConfig,
    RunConfig,
)
from megatron_hypenet.errors import ConfigError, LayoutError

WAYS_OUT = 2
"""Number of settings that would lift a problem and are named."""

Findings = dict[tuple[str, str], Finding]
"""(name of the rule, training stage or "") -> finding."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A broken rule, with settings that lift it."""

    rule: str
    says: str
    ways_out: tuple[Change, ...]

    def __str__(self) -> str:
        return f"{self.rule}: {self.says}; {phrase(self.ways_out)}"


def check_layout(
    model_config: ModelConfig | None,
    run_config: RunConfig,
    world_size: int | None,
    stages: Iterable[str] = STAGES,
) -> None:
    """Raise LayoutError listing every rule that this model and run break on `world_size` processes.

    Without a model the rules about it are skipped; without a number of processes there are as many
    as one replica takes. `stages` are the stages that will run; the batch and sequence rules are
    checked for these only.
    """
    _raise(layout_problems(Layout(model_config, run_config, world_size, tuple(stages))))


def check_run(
    model_config: ModelConfig | None, run_config: RunConfig, world_size: int | None
) -> None:
    """Check what spans a whole run: its layout for all stages, as `check_layout` does, and, where
    the model is known, its layer selection and objectives. Raises LayoutError or ConfigError."""
    check_layout(model_config, run_config, world_size)
    if model_config is not None:
        check_model_fits_selection(model_config, run_config)
        check_model_fits_objectives(model_config, run_config)


def check_model_layout(
    model_config: ModelConfig, parallel: ParallelConfig, world_size: int | None
) -> None:
    """Check a layout as `check_layout` does for a model that is only evaluated: no stage trains,
    and evaluation pads sequences to what the layout splits."""
    only: dict[str, Any] = {
        "parallel": parallel
    }  # the only section that the rules read where no stage runs
    _raise(
        layout_problems(
            Layout(model_config, RunConfig.model_construct(**only), world_size, stages=())
        )
    )


def _raise(problems: Sequence[Problem]) -> None:
    if len(problems) == 1:
        raise LayoutError(str(problems[0]))
    if problems:
        raise LayoutError(
            f"{len(problems)} problems with the parallel layout\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


def layout_problems(layout: Layout) -> list[Problem]:
    """Return every broken rule, each with two ways out that were tried: they lift it, and where
    possible break nothing else."""
    found = _broken(layout)
    return [
        Problem(key[0], finding.says, _ways_out(layout, key, found))
        for key, finding in found.items()
    ]


def layout_warnings(layout: Layout) -> list[str]:
    """Return warnings about what is allowed but probably a mistake: training stages with too few
    micro-batches to keep the pipeline busy, or longer than what the teacher beside them can
    read."""
    stages = layout.parallel.pipeline_model_parallel_size
    dp_size = layout.dp_size
    warnings = []
    for name in layout.stages if dp_size else ():
        count = layout.run.stage(name).num_micro_batches(dp_size or 1)
        if count < stages:
            idle = (stages - 1) / (count + stages - 1)
            warnings.append(
                f"{name}: {count} micro-batches per step on {stages} pipeline stages leave each "
                f"stage idle for {idle:.0%} of the time; "
                f"a smaller {name}.micro_batch_size or a larger {name}.global_batch_size gives more"
            )
    return warnings + _teacher_warnings(layout)


def _teacher_warnings(layout: Layout) -> list[str]:
    known = layout.model.max_position_embeddings if layout.model is not None else math.inf
    stages = {name: layout.run.stage(name) for name in layout.stages}
    return [
        f"{name}: the teacher reads {name}.seq_length={stage.seq_length} tokens, but its config "
        f"claims {known}; beyond that the student learns its mistakes: take a smaller "
        f"{name}.teacher_weight, shorter sequences, or a teacher with a longer context"
        for name, stage in stages.items()
        if isinstance(stage, FinetuneConfig)
        if stage.teacher_weight > 0 and stage.seq_length > known
    ]


def check_model_fits_selection(model_config: ModelConfig, run_config: RunConfig) -> None:
    """Raise ConfigError when layer selection is asked to keep more softmax layers than the model
    has."""
    wanted = run_config.select.num_attention_layers
    if wanted is not None and wanted > model_config.num_layers:
        raise ConfigError(
            f"select.num_attention_layers={wanted} exceeds the model's "
            f"num_layers={model_config.num_layers}; "
            f"use at most {model_config.num_layers}, "
            f"or null for {max(1, model_config.num_layers // 4)}"
        )


def check_model_fits_objectives(model_config: ModelConfig, run_config: RunConfig) -> None:
    """Raise ConfigError when an objective counts as many tokens one by one as the vocabulary
    has: nothing would be left for all others."""
    for name in STAGES:
        stage = run_config.stage(name)
        k = stage.objective.k if isinstance(stage, HeadStageConfig) else None
        if k is not None and k >= model_config.vocab_size:
            raise ConfigError(
                f"{name}.objective.k={k} is not below the model's "
                f"vocab_size={model_config.vocab_size}; use fewer tokens, or kind=forward_kl, "
                "which counts all of them"
            )


def _broken(layout: Layout) -> Findings:
    return {
        (name, finding.where): finding for name, rule in RULES.items() for finding in rule(layout)
    }


def _ways_out(layout: Layout, key: tuple[str, str], found: Findings) -> tuple[Change, ...]:
    """Return the first proposals that lift the problem; those that break no other rule come
    first."""
    clean: list[Change] = []
    other: list[Change] = []
    for change in found[key].proposals:
        after = _broken(layout.changed(change))
        if key in after or change in clean or change in other:
            continue
        (other if after.keys() - found.keys() else clean).append(change)
        if len(clean) == WAYS_OUT:
            break
    return tuple([*clean, *other][:WAYS_OUT])
