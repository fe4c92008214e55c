"""The specification of a mixer, without tensors: settings, parameters, FLOPs, memory, names.

A specification is the only source for code that has to know a mixer without building it: counts of
parameters and FLOPs, memory plans, checkpoint names, the Hugging Face mapping, fresh weights, the
transfer of attention weights, layout rules. The Megatron module of the same name (`model/mixers/`)
takes its shapes from here. A mixer is registered where it is defined, and importing `config.mixers`
imports every file of the package.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_hypenet.errors import ConfigError
from megatron_hypenet.untrusted.files import findings

if TYPE_CHECKING:
    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.config.schema import Recompute

SECTION = "linear_in.weight."
"""Prefix of the parameters that are row sections of the fused input projection."""
OUTPUT = "linear_proj.weight"
"""Name of the output projection, which every mixer has."""


@dataclass(frozen=True, slots=True)
class Init:
    """How a fresh parameter is drawn: a distribution, then a function of every element."""

    distribution: Literal["constant", "normal", "uniform", "log_uniform"]
    first: float
    """The constant; the mean; the lower bound."""
    second: float = 0.0
    """Unused for a constant; the standard deviation; the upper bound."""
    then: Literal["identity", "log", "inverse_softplus"] = "identity"


ONES = Init("constant", 1.0)
ZEROS = Init("constant", 0.0)


@dataclass(frozen=True, slots=True)
class Reshape:
    """The Hugging Face tensor has the same elements in the same order under another shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """One parameter of a mixer, by its name below `self_attention.` in a checkpoint.

    Names that begin with `linear_in.weight.` are row sections of the fused input projection, in
    this order. Other dotted names belong to submodules that the Megatron module builds (norms);
    names without a dot are parameters that the base class creates from this description.
    """

    name: str
    shape: tuple[int, ...]
    """Shape over all tensor-parallel ranks."""
    tp_dim: int | None
    """Dimension that is split over tensor-parallel ranks; None: every rank has all of it."""
    init: Init
    """How it is drawn where nothing is copied; by name and seed, so equal on every layout."""
    hf_names: tuple[str, ...]
    """Hugging Face names below `self_attn.`; several are concatenated along dimension 0."""
    hf_transform: Reshape | None = None
    """How the one Hugging Face tensor differs from ours; None: not at all."""
    dtype: Literal["model", "float32"] = "model"
    """"float32": never rounded to a narrower compute dtype, in training, checkpoints and exported
    folders."""
    source: str = ""
    """Name of the attention parameter that weight transfer copies; key and value rows are
    repeated for the heads of their group where this parameter has more rows. "": drawn."""

    @property
    def numel(self) -> int:
        """Return the number of elements over all tensor-parallel ranks."""
        return math.prod(self.shape)

    def local_shape(self, tensor_ranks: int) -> tuple[int, ...]:
        """Return the shape on each of `tensor_ranks` tensor-parallel ranks."""
        return tuple(
            size // tensor_ranks if dim == self.tp_dim else size
            for dim, size in enumerate(self.shape)
        )


@dataclass(frozen=True, slots=True)
class MixerFlops:
    """Floating-point operations of a mixer's forward pass, per token."""

    projections: float
    """The input projection."""
    core: float
    """The operations between the projections, which mix the tokens."""
    output: float
    """The output projection."""

    @property
    def total(self) -> float:
        """Return the sum for the whole mixer."""
        return self.projections + self.core + self.output


@dataclass(frozen=True, slots=True, kw_only=True)
class HfKeys:
    """How a Hugging Face config.json describes a mixer."""

    name: str
    """Entry of `mixer_types`, as it is written."""
    spellings: tuple[str, ...] = ()
    """Further entries that are read as this mixer."""
    prefix: str
    """Keys that begin with this belong to the mixer; an unknown one that is set is refused."""
    switches: Mapping[str, Any] = field(default_factory=dict)
    """Keys and the one value each may have; an absent key has it."""
    sizes: Mapping[str, str] = field(default_factory=dict)
    """Keys whose value must be that of another key of config.json, where they are given."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Keys that hold a setting of the specification, with that setting's name."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys in `settings` that config.json leaves out, where the published code's default
    differs from the setting's."""
    ignored: tuple[str, ...] = ()
    """Keys of the mixer that change nothing."""

    @property
    def known(self) -> frozenset[str]:
        """Return all keys of the mixer, but for sizes that follow from settings
        (`MixerSpec.hf_sizes`)."""
        return frozenset({**self.switches, **self.sizes, **self.settings}).union(self.ignored)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRules:
    """The requirements of a mixer on a parallel layout."""

    tensor_slices: Mapping[str, int]
    """Sizes, by name, that the tensor-parallel size must divide."""
    halo_tokens: int = 0
    """Tokens before a context-parallel chunk that the chunk reads; chunks are at least as long."""


class MixerSpec(BaseModel, ABC):
    """A mixer's settings (the pydantic fields of a subclass) and all that follows from them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    """The mixer's name in `mixer_types`; `register_mixer_spec` sets it."""
    recurrent: ClassVar[bool] = True
    """Its state does not grow with the context, and it can take over attention weights."""
    is_default: ClassVar[bool] = False
    """Chosen by a run that names no mixer; true for one recurrent mixer."""
    kernel_families: ClassVar[tuple[str, ...]] = ()
    """Kernel families that only layers with this mixer run."""
    core_traffic: ClassVar[float] = 500.0
    """Bytes per query channel and token that forward and backward of the operations between the
    projections move, as far as time goes: their measured seconds on an H100 times its 3.0e12 bytes
    per second. The default is that of operations that are not fused. Softmax attention's own
    products are counted apart."""
    hf_keys: ClassVar[HfKeys]

    @abstractmethod
    def parameters(self, model: ModelConfig) -> tuple[ParamSpec, ...]:
        """Return all parameters, in the order in which a Hugging Face folder lists them."""

    @abstractmethod
    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        """Count the FLOPs per token between the projections, at the given sequence length."""

    @abstractmethod
    def saved_activations(
        self, model: ModelConfig, tensor_ranks: int, recompute: Recompute
    ) -> float:
        """Count the elements per token that one rank keeps for backward, from the projected
        sections to the input of the output projection, with this package's kernels; `recompute` is
        "none" or "selective" ("full" keeps nothing inside a layer)."""

    @abstractmethod
    def layout_rules(self, model: ModelConfig) -> LayoutRules:
        """Return the mixer's requirements on a parallel layout."""

    def hf_sizes(self) -> Mapping[str, str]:
        """Return the keys of config.json whose value must be that of another key, with that key; a
        mixer whose settings decide overrides this."""
        return self.hf_keys.sizes

    def flops(self, model: ModelConfig, seq_length: int) -> MixerFlops:
        """Count the FLOPs of a forward pass per token; 2 per weight of a projection."""
        widths = {parameter.name: parameter.numel for parameter in self.parameters(model)}
        output = widths.pop(OUTPUT)
        projections = sum(size for name, size in widths.items() if name.startswith(SECTION))
        core = self.core_flops(model, seq_length)
        return MixerFlops(2.0 * projections, core, 2.0 * output)

    def sections(self, model: ModelConfig) -> dict[str, int]:
        """Return the rows of the fused input projection over all ranks, by section, in order."""
        return {
            parameter.name.removeprefix(SECTION): parameter.shape[0]
            for parameter in self.parameters(model)
            if parameter.name.startswith(SECTION)
        }

    def num_parameters(self, model: ModelConfig, tensor_ranks: int = 1) -> int:
        """Count the elements of all parameters, on one of `tensor_ranks` tensor-parallel ranks."""
        return sum(
            math.prod(parameter.local_shape(tensor_ranks)) for parameter in self.parameters(model)
        )


def attention_parameters(
    model: ModelConfig, *, kv_size: int, qk_norm: bool = True
) -> tuple[ParamSpec, ...]:
    """Return the parameters of the teacher's attention, with `kv_size` rows of k and of v; weight
    transfer copies them to a mixer that has them. With `qk_norm` also norms of q and k, which are
    fresh where the teacher has none."""
    drawn = Init("normal", 0.0, model.init_method_std)
    hidden = model.hidden_size
    rows = {"q": model.query_size, "k": kv_size, "v": kv_size}

    def section(letter: str) -> ParamSpec:
        return ParamSpec(
            name=SECTION + letter, shape=(rows[letter], hidden), tp_dim=0, init=drawn,
            hf_names=(f"{letter}_proj.weight",), source=SECTION + letter,
        )  # fmt: skip

    def bias(letter: str) -> ParamSpec:
        name = f"{letter}_bias"
        return ParamSpec(
            name=name, shape=(rows[letter],), tp_dim=0, init=ZEROS,
            hf_names=(f"{letter}_proj.bias",), source=name,
        )  # fmt: skip

    def norm(letter: str) -> ParamSpec:
        name = f"{letter}_norm.weight"
        return ParamSpec(
            name=name, shape=(model.kv_channels,), tp_dim=None, init=ONES, hf_names=(name,),
            source=name if model.qk_layernorm else "",
        )  # fmt: skip

    output = ParamSpec(
        name=OUTPUT, shape=(hidden, model.query_size), tp_dim=1, init=drawn,
        hf_names=("o_proj.weight",), source=OUTPUT,
    )  # fmt: skip
    norms = (norm("q"), norm("k")) if qk_norm else ()
    biases = tuple(map(bias, "qkv")) if model.add_qkv_bias else ()
    return (section("q"), *norms, output, section("k"), section("v"), *biases)


def gate_parameter(model: ModelConfig, hf_name: str) -> ParamSpec:
    """Return the projection of the output gate, which no teacher has."""
    return ParamSpec(
        name=SECTION + "gate", shape=(model.query_size, model.hidden_size), tp_dim=0,
        init=Init("normal", 0.0, model.init_method_std), hf_names=(hf_name,),
    )  # fmt: skip


_REGISTRY: dict[str, type[MixerSpec]] = {}
Spec = TypeVar("Spec", bound=MixerSpec)


def register_mixer_spec(name: str) -> Callable[[type[Spec]], type[Spec]]:
    """Register a specification under `name`, as a class decorator."""

    def register(cls: type[Spec]) -> type[Spec]:
        assert name not in _REGISTRY, f"the specification of mixer {name!r} is registered twice"
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def mixer_specs() -> dict[str, type[MixerSpec]]:
    """Return all known specifications by name."""
    return dict(_REGISTRY)


def mixer_spec(name: str) -> type[MixerSpec]:
    """Return the specification registered as `name`; ConfigError lists the known ones."""
    try:
        return _REGISTRY[name]
    except KeyError:
        known = ", ".join(sorted(_REGISTRY))
        raise ConfigError(f"mixer_types: unknown mixer {name!r}; known mixers: {known}") from None


def with_settings(name: str, settings: object, *, strict: bool = False) -> MixerSpec:
    """Return the specification `name` with these settings; ValueError says which of them are wrong.
    With `strict` they have JSON's types, so text is not accepted for a switch."""
    try:
        return mixer_spec(name).model_validate(settings, strict=strict)
    except ValidationError as error:
        problems = (f"{name}.{line}" for line in findings(error, whole="settings"))
        raise ValueError("; ".join(problems)) from error


def default_mixer() -> MixerSpec:
    """Return the RNN mixer of a run that names none, with its default settings."""
    (found,) = (spec for spec in _REGISTRY.values() if spec.is_default)
    return found()
