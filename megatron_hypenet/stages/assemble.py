"""Plan the student that stage 2 trains from the teacher, the aligned mixers and a selection: the
source of every tensor.

This decides only names and fresh tensors, and reads or writes nothing; halo/build_stage.py moves
the data. Kept layers take the teacher's attention and get a new random output gate; every other
layer takes its aligned RNN mixer; all other tensors are the teacher's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_hypenet.config.mixers import ParamSpec
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import CheckpointError

_MIXER_KEY = re.compile(r"decoder\.layers\.(\d+)\.self_attention\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AssemblyPlan:
    """The source of every tensor of the student, by canonical name."""

    from_teacher: tuple[str, ...]
    from_aligned: tuple[str, ...]
    fresh: Mapping[str, ParamSpec]
    """Parameters of kept attention layers that the teacher does not have (output gates)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors of the student."""
        return (*self.from_teacher, *self.from_aligned, *self.fresh)


def plan_assembly(
    student: ModelConfig, teacher_names: Iterable[str], aligned_names: Iterable[str]
) -> AssemblyPlan:
    """Decide the source of every student tensor.

    Raises CheckpointError when the teacher lacks the attention of a kept layer or the alignment
    lacks the mixer of a converted one.
    """
    kept = frozenset(student.attention_layers)
    converted = frozenset(range(student.num_layers)) - kept
    from_teacher = tuple(
        name for name in teacher_names if (layer := mixer_layer(name)) is None or layer in kept
    )
    from_aligned = tuple(name for name in aligned_names if mixer_layer(name) in converted)
    _require_layers("teacher", kept, from_teacher)
    _require_layers("aligned mixers", converted, from_aligned)
    known = frozenset(from_teacher)
    fresh = {
        name: parameter
        for layer in sorted(kept)
        for parameter in student.spec(ATTENTION).parameters(student)
        if (name := f"decoder.layers.{layer}.self_attention.{parameter.name}") not in known
        and not parameter.source
    }
    return AssemblyPlan(from_teacher=from_teacher, from_aligned=from_aligned, fresh=fresh)


def mixer_layer(name: str) -> int | None:
    """Return the global layer index of a mixer tensor; None for tensors outside the mixers."""
    match = _MIXER_KEY.match(name)
    return int(match.group(1)) if match else None


def _require_layers(source: str, layers: frozenset[int], names: Iterable[str]) -> None:
    missing = sorted(layers - {mixer_layer(name) for name in names})
    if missing:
        raise CheckpointError(
            f"assemble: the {source} hold no mixer tensors of layers "
            f"{', '.join(map(str, missing))}; "
            "they belong to another model or to an unfinished stage"
        )
