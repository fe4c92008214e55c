"""The mixer contract and its registry.

A mixer is what a Megatron `TransformerLayer` calls as `self_attention`: hidden states [s, b, h] in (after the input norm), the same
shape out, before the residual. Every mixer has one fused input projection made of named sections, per-head norms of q and k, and an
output projection; subclasses say which sections there are and how the heads mix tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import ConfigError
from megatron_hypenet.parallel.fused_sections import split_factory
from megatron_hypenet.parallel.norm import RMSNorm
from megatron_hypenet.parallel.recompute import DropOutput


@dataclass
class MixerSubmodules:
    """Which parallel linear layers a mixer is built from (Megatron's own, or Transformer Engine's)."""

    linear_in: Any = ColumnParallelLinear
    linear_proj: Any = RowParallelLinear


class Mixer(MegatronModule, ABC):
    """Base of all mixers. Subclasses define `sections`, `mix_flops_per_token`, and `mix`."""

    name: ClassVar[str]
    recurrent: ClassVar[bool]
    """True for RNN mixers: their state does not grow with the context, and they can take over an attention layer's weights."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerSubmodules,
        layer_number: int,
        model: ModelConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,  # cp_comm_type, name, pp_layer_offset: versions of Megatron-core differ in what they pass
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "Megatron passes pg_collection to every layer"
        self.layer_number = layer_number  # global, from 1
        self.model = model
        self.tensor_group = pg_collection.tp
        self.context_group = pg_collection.cp
        self.tensor_size, self.tensor_rank = self.tensor_group.size(), self.tensor_group.rank()
        self.head_dim = model.kv_channels
        self.num_local_heads = model.num_attention_heads // self.tensor_size
        self.local_sections = {name: rows // self.tensor_size for name, rows in self.sections(model).items()}
        self.linear_in = build_module(
            submodules.linear_in,
            model.hidden_size,
            sum(self.sections(model).values()),
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tensor_group,
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            model.query_size,
            model.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tensor_group,
        )
        self.q_norm = RMSNorm(config, self.head_dim, model.layernorm_epsilon, per_head=True)
        self.k_norm = RMSNorm(config, self.head_dim, model.layernorm_epsilon, per_head=True)

    @classmethod
    @abstractmethod
    def sections(cls, model: ModelConfig) -> dict[str, int]:
        """Rows of the fused input projection over all ranks, by section name, in order."""

    @classmethod
    def num_parameters(cls, model: ModelConfig) -> int:
        """Parameters of one such mixer over all ranks."""
        return model.hidden_size * (sum(cls.sections(model).values()) + model.query_size) + 2 * model.kv_channels

    @classmethod
    @abstractmethod
    def kept_numbers(cls, model: ModelConfig, tensor_ranks: int, *, dropped: bool) -> float:
        """Numbers per token that one rank keeps for backward, from the projected sections to what `linear_proj` takes, with this package's
        kernels; `dropped`: under selective recomputation."""

    @classmethod
    @abstractmethod
    def mix_flops_per_token(cls, model: ModelConfig, seq_length: int) -> float:
        """Floating-point operations of the forward pass per token beside the projections, at the given length."""

    @classmethod
    def flops_per_token(cls, model: ModelConfig, seq_length: int) -> float:
        """Floating-point operations of the whole mixer's forward pass per token."""
        projections = 2.0 * model.hidden_size * (sum(cls.sections(model).values()) + model.query_size)
        return projections + cls.mix_flops_per_token(model, seq_length)

    @abstractmethod
    def mix(self, parts: dict[str, Tensor], rotary_pos_emb: Tensor | None, document_ids: Tensor | None) -> Tensor:
        """Sections [s, b, local rows] -> what `linear_proj` takes, [s, b, local heads * head_dim].

        s are this context-parallel rank's tokens; document_ids [b, s * context ranks] those of the whole sequence, or None."""

    def mix_projected(self, projected: Tensor, rotary_pos_emb: Tensor | None, document_ids: Tensor | None) -> Tensor:
        """All sections [s, b, local rows] as `linear_in` gives them -> what `mix` gives."""
        parts = dict(zip(self.local_sections, projected.split(list(self.local_sections.values()), dim=-1), strict=True))
        return self.mix(parts, rotary_pos_emb, document_ids)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [s, b, h] -> ([s, b, h], no bias). Causal by construction: `attention_mask` has no say.

        `packed_seq_params` is Megatron's name for what tells packed documents apart; here it carries the document ids."""
        projected, _ = self.linear_in(hidden_states)

        def mixed(projected: Tensor) -> Tensor:
            return self.mix_projected(projected, rotary_pos_emb, packed_seq_params)

        if not self._recomputes():
            output, _ = self.linear_proj(mixed(projected))
            return output, None
        drop = DropOutput()
        output, _ = self.linear_proj(drop.checkpoint(mixed, projected))
        drop.discard_output_and_register_recompute(output)
        return output, None

    def _recomputes(self) -> bool:
        """Whether backward computes everything between the projections again: Megatron's "core_attn", where that costs little.

        Softmax attention is the expensive part of its layer, and keeps little besides q, k, v and the output."""
        return self.recurrent and self.config.recompute_granularity == "selective" and "core_attn" in self.config.recompute_modules

    def heads(self, x: Tensor) -> Tensor:
        """[s, b, heads * head_dim] -> [s, b, heads, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def section_weight(self, name: str) -> Tensor:
        """This rank's rows of one section of the input projection, a view [rows, hidden_size]."""
        start = 0
        for section, rows in self.local_sections.items():
            if section == name:
                return self.linear_in.weight[start : start + rows]
            start += rows
        raise KeyError(name)

    @torch.no_grad()
    def init_from_attention(self, attention: "Mixer", *, seed: int) -> Self:
        """Take over the weights of the softmax layer this mixer replaces; only recurrent mixers can. Returns itself."""
        raise TypeError(f"{type(self).__name__} does not take over attention weights")

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Megatron's sharded state, with the fused projection as one logical tensor per section."""
        state: ShardedStateDict = {}
        for child, module in self.named_children():
            state.update(sharded_state_dict_default(module, f"{prefix}{child}.", sharded_offsets, metadata, tp_group=self.tensor_group))
        key = f"{prefix}linear_in.weight"
        state[key] = split_factory(state[key], self.local_sections)
        return without_extra_state(state)


def without_extra_state(state: ShardedStateDict) -> ShardedStateDict:
    """Leave out the `_extra_state` objects of Megatron's linear layers: empty without FP8, and stored as pickles."""
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


_REGISTRY: dict[str, type[Mixer]] = {}


def register_mixer(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: make a mixer known to `mixer_types` under `name`."""

    def register(cls: type[Mixer]) -> type[Mixer]:
        assert name not in _REGISTRY, f"mixer {name!r} is registered twice"
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def registered_mixers() -> dict[str, type[Mixer]]:
    """All known mixers by name."""
    return dict(_REGISTRY)


def mixer_class(name: str) -> type[Mixer]:
    """The mixer registered as `name`; ConfigError lists the known ones."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise ConfigError(f"mixer_types: unknown mixer {name!r}; known mixers: {', '.join(sorted(_REGISTRY))}") from None
