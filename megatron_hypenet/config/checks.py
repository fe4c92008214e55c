"""Rules that span the model, the run and the number of processes. Each is checked without a GPU,
before anything heavy starts.

Every finding names its rule, the values, and two settings that would lift it, each of them tried;
all are listed in one LayoutError.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hypenet.config.layout import Change, Layout, phrase
from megatron_hypenet.config.layout_rules import RULES, Finding
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import STAGES, ParallelConfig, RunConfig
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
    the model is known, its layer selection. Raises LayoutError or ConfigError."""
    check_layout(model_config, run_config, world_size)
    if model_config is not None:
        check_model_fits_selection(model_config, run_config)


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
    """Return warnings about layouts that are allowed but probably a mistake: training stages with
    too few micro-batches to keep the pipeline busy."""
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
    return warnings


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
