"""Which layers keep softmax attention: the choice by importance, and its file `mixers.json`.

No tensor library is imported here: ranking needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.config.mixers import mixer_specs
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.errors import ConfigError, DataError
from megatron_hypenet.stages.selection.method import LayerScores, RankSettings, selection_method
from megatron_hypenet.untrusted.files import FileKind, shown
from megatron_hypenet.untrusted.json_text import read_typed

_MIXERS = FileKind(error=DataError, advice="write the file with `hypenet select rank`")


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The mixer of every layer, and the importances that decided it."""

    mixer_types: tuple[str, ...]
    attention_layers: tuple[int, ...]
    importance: tuple[float, ...]

    def to_json(self) -> dict[str, list[Any]]:
        """Return the content of `mixers.json`."""
        return {
            "mixer_types": list(self.mixer_types),
            "attention_layers": list(self.attention_layers),
        }


def rank(scores: LayerScores, settings: RankSettings, mixer: str) -> Selection:
    """Keep attention in the most important layers, with the RNN mixer `mixer` in the others; on a
    tie the lower layer index wins.

    Raises ConfigError unless 1 <= num_attention <= number of layers, and for another number of
    attention layers than the scores are good for.
    """
    num_layers, num_attention = scores.num_layers, settings.num_attention
    if not 1 <= num_attention <= num_layers:
        raise ConfigError(
            f"layer selection: num_attention={num_attention} is out of range for {num_layers} "
            "scored layers; "
            f"use 1 to {num_layers} (the paper keeps a quarter: {max(1, num_layers // 4)})"
        )
    if scores.num_attention not in (None, num_attention):
        raise ConfigError(
            f"layer selection: these scores, of method {scores.method}, are of a choice of "
            f"{scores.num_attention} attention layers, and num_attention={num_attention} asks for "
            f"another number; use {scores.num_attention}, or measure with "
            f"select.num_attention_layers={num_attention}"
        )
    values = selection_method(scores.method).importance(scores, settings)
    chosen = sorted(range(num_layers), key=lambda layer: (-values[layer], layer))[:num_attention]
    return selection_of(chosen, num_layers, mixer, values)


def selection_of(
    attention_layers: Sequence[int], num_layers: int, mixer: str, values: Sequence[float] = ()
) -> Selection:
    """Return the selection that keeps attention in the given layers and has the RNN mixer `mixer`
    in the others."""
    kept = frozenset(attention_layers)
    types = tuple(ATTENTION if layer in kept else mixer for layer in range(num_layers))
    return Selection(
        mixer_types=types, attention_layers=tuple(sorted(kept)), importance=tuple(values)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mixers:
    """The required keys of `mixers.json`; others are allowed."""

    mixer_types: list[str]
    attention_layers: list[int]


def load_selection(path: Path, *, num_layers: int) -> Selection:
    """Read `mixers.json`; the two keys must agree with each other and with the model's depth.
    Raises DataError."""
    found = read_typed(_MIXERS, path, _Mixers)
    types = found.mixer_types
    layers = found.attention_layers
    if len(types) != num_layers:
        raise DataError(
            f"{path}: {len(types)} mixer_types, but the teacher has {num_layers} layers; "
            "rank the scores of this teacher"
        )
    if unknown := sorted(set(types) - set(mixer_specs())):
        _MIXERS.refuse(
            path,
            f"mixer_types names unknown mixers {shown(unknown)}; known mixers: "
            + ", ".join(sorted(mixer_specs())),
        )
    if [layer for layer, kind in enumerate(types) if kind == ATTENTION] != sorted(layers):
        _MIXERS.refuse(
            path, f"attention_layers {shown(layers)} and mixer_types {shown(types)} disagree"
        )
    return Selection(
        mixer_types=tuple(types), attention_layers=tuple(sorted(layers)), importance=()
    )
