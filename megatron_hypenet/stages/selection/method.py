"""The interface of a method of layer selection, and the registry of methods.

A method measures every layer once (`measure`), which is kept as a scores file, and turns the scores
into an importance of each layer's attention (`importance`), which is cheap: the layers of the
highest importance keep attention. No tensor library is imported here or by a method's file, because
ranking and planning need none.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.selection import SELECTION_METHODS, SelectConfig

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_hypenet.model.hypenet import HypeNetModel
    from megatron_hypenet.stages.aligned_mixers import AlignedMixers

Content = dict[str, Any]
"""Content of a scores file, or a part of it."""

RECALL, HELDOUT, TRAINING = "recall", "heldout", "training"
"""Kinds of data that a method may read: recall documents over held-out text, held-out text, and
training text with recall documents over it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerScores:
    """What a method measured of every layer, in layer order."""

    method: str
    num_layers: int
    values: Mapping[str, tuple[float, ...]]
    """By metric; a method says which it has, and what they are."""
    num_attention: int | None = None
    """The number of attention layers that the scores are good for; None for any."""
    tokens: int | None = None
    """Tokens that models read for them; None where this is not known."""
    seconds: float | None = None
    """Time that they took, over all attempts; None where this is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSettings:
    """What ranking depends on besides the scores."""

    num_attention: int
    """Layers that keep attention."""
    importance_cap: float = 50.0
    """Upper bound of a quotient of scores; the paper's code has 50."""


class Samples(Protocol):
    """Training sequences as a pure function of the sample index, with the positions that count."""

    def batch(self, sample_start: int, count: int, seq_length: int, /) -> Tensor:
        """Return samples sample_start .. + count - 1: int64 [count, seq_length + 1]."""

    def predicted(self, sample_start: int, count: int, seq_length: int, /) -> Tensor:
        """Return the positions of these samples whose next token counts, bool [count, seq_length]:
        answers in recall documents, and in text all, or those of its mask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionWork:
    """What a method measures with; every process has one and calls the same."""

    settings: SelectConfig
    num_layers: int
    num_attention: int
    known: Mapping[str, Any]
    """What an interrupted attempt with the same settings saved; empty at first."""
    save: Callable[[Content], None]
    """Keeps what was measured so far, for `known`."""
    progress: Callable[[int, int], None]
    """(parts done, number of parts): called often, so that a hang can be told from work."""
    models: Callable[[], tuple[HypeNetModel, AlignedMixers]]
    """Loads the teacher and the aligned mixers of its layers."""
    evaluate: Callable[[HypeNetModel], dict[str, float]]
    """Measures recall and commonsense of a model, in %."""
    heldout: Callable[[], Tensor]
    """Returns held-out sequences, int64 [count, seq_length + 1]."""
    samples: Callable[[], Samples]
    """Returns training text and recall documents in the shares that the method asks for."""


class SelectionMethod(ABC):
    """A way to say which layers keep softmax attention."""

    name: ClassVar[str]
    """The method's name in configs and scores files."""
    metrics: ClassVar[tuple[str, ...]]
    """What a scores file has of every layer."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """The kinds of data that it reads."""
    about: ClassVar[str]
    """What its importances are, in sentences for a report."""
    axis: ClassVar[str]
    """What its importances are, in a few words for a chart."""

    @abstractmethod
    def measure(self, work: SelectionWork) -> Content:
        """Measure every layer; returns the entries `layers` and `tokens` of the scores file, and
        others of the method's own. On every process of any layout, with the same result. What was
        handed to `work.save` before the end must not pass for a whole scores file."""

    @abstractmethod
    def importance(self, scores: LayerScores, settings: RankSettings) -> tuple[float, ...]:
        """Return the importance of each layer's attention, in layer order; finite."""

    @abstractmethod
    def flops(self, settings: SelectConfig, teacher: ModelConfig, converted: ModelConfig) -> float:
        """Count the operations of `measure`; `converted` is the teacher with an RNN mixer in every
        layer."""


_REGISTRY: dict[str, SelectionMethod] = {}


def register_method(cls: type[SelectionMethod]) -> type[SelectionMethod]:
    """Register a method under its name, as a class decorator."""
    assert cls.name in SELECTION_METHODS and cls.name not in _REGISTRY, (
        f"{cls.name} is unknown or twice there"
    )
    _REGISTRY[cls.name] = cls()
    return cls


def selection_method(name: str) -> SelectionMethod:
    """Return the method of that name, one of SELECTION_METHODS; its file is imported at the first
    call."""
    if name not in SELECTION_METHODS:
        raise KeyError(f"no method {name!r}; methods are {', '.join(SELECTION_METHODS)}")
    if name not in _REGISTRY:
        importlib.import_module(f"megatron_hypenet.stages.selection.{name}")
    return _REGISTRY[name]
