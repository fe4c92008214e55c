"""The mixer contract and its registry.

A mixer is what a Megatron `TransformerLayer` calls as `self_attention`: hidden states [s, b, h] in
(after the input norm), the same shape out, before the residual. Its specification
(`config/mixers/`), registered under the same name, lists its parameters: one fused input projection
made of named sections, an output projection, and others. Subclasses say how the heads mix
tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from megatron_hypenet.config.mixers.base import OUTPUT, SECTION, ParamSpec, mixer_spec
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.model.linear_layers import MixerSubmodules, save_original_inputs
from megatron_hypenet.model.transfer import fresh_parameter, repeat_groups
from megatron_hypenet.ops.rope import apply_rope
from megatron_hypenet.parallel.fused_sections import split_factory
from megatron_hypenet.parallel.norm import RMSNorm, sum_gradient
from megatron_hypenet.parallel.recompute import DropOutput


class Mixer(MegatronModule, ABC):
    """Base of all mixers: builds what the specification of its name lists, and leaves to a subclass
    how the heads mix tokens (`mix`) and which norms and other submodules it has (`add_modules`)."""

    name: ClassVar[str]

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerSubmodules,
        layer_number: int,
        model: ModelConfig,
        pg_collection: ProcessGroupCollection | None = None,
        # cp_comm_type, name, pp_layer_offset: versions of Megatron-core differ in what they pass
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "Megatron passes pg_collection to every layer"
        self.layer_number = layer_number  # global, from 1
        self.model = model
        self.spec = model.spec(self.name)
        self.param_specs = {parameter.name: parameter for parameter in self.spec.parameters(model)}
        self.tensor_group = pg_collection.tp
        self.context_group = pg_collection.cp
        self.tensor_size, self.tensor_rank = self.tensor_group.size(), self.tensor_group.rank()
        self.head_dim = model.kv_channels
        self.num_local_heads = model.num_attention_heads // self.tensor_size
        sections = self.spec.sections(model)
        self.local_sections = {name: rows // self.tensor_size for name, rows in sections.items()}
        self.linear_in = build_module(
            submodules.linear_in,
            model.hidden_size,
            sum(sections.values()),
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tensor_group,
        )
        hidden_size, width = self.param_specs[OUTPUT].shape
        self.linear_proj = build_module(
            submodules.linear_proj,
            width,
            hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tensor_group,
        )
        self.add_modules()
        for parameter in self.param_specs.values():
            if "." not in parameter.name:
                self._add_parameter(parameter)

    def add_modules(self) -> None:
        """Build the norms of q and k, where the specification has them; subclasses add submodules
        of their own."""
        for letter in ("q", "k"):
            if f"{letter}_norm.weight" in self.param_specs:
                norm = RMSNorm(
                    self.config, self.head_dim, self.model.layernorm_epsilon, per_head=True
                )
                self.add_module(f"{letter}_norm", norm)

    def _add_parameter(self, parameter: ParamSpec) -> None:
        """Add a parameter without a submodule, drawn by its name; ZeRO-3 gathers it for this
        module's call."""
        drawn = self._drawn(parameter, seed=torch.initial_seed() % 2**31)
        dtype = self.config.params_dtype
        if parameter.dtype == "float32":
            dtype = torch.promote_types(dtype, torch.float32)
        weight = torch.nn.Parameter(drawn.to(self.linear_in.weight.device, dtype))
        if parameter.tp_dim is not None:
            # Read by DeepSpeed's gradient norm and by the sharded checkpoint.
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim = parameter.tp_dim  # type: ignore[attr-defined]
            weight.partition_stride = 1  # type: ignore[attr-defined]
        self.register_parameter(parameter.name, weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `to`, `bfloat16` and similar calls, which change only the device of parameters that
        stay in float32."""
        own: dict[str, torch.nn.Parameter] = self._parameters  # type: ignore[has-type]
        order = list(own)
        kept = {name: own.pop(name) for name in order if self._stays_float32(name)}
        super()._apply(fn, recurse)
        for parameter in kept.values():
            changed = fn(parameter.data)
            if changed.dtype.itemsize < torch.float32.itemsize:
                changed = parameter.data.to(changed.device)
            parameter.data = changed
        both = {**own, **kept}
        own.clear()
        own.update({name: both[name] for name in order})
        return self

    def _stays_float32(self, name: str) -> bool:
        return name in self.param_specs and self.param_specs[name].dtype == "float32"

    def weight(self, name: str) -> Tensor:
        """Return a parameter of this module for use in its computation: where every tensor-parallel
        rank holds all of it but uses it for its own heads only, its gradient is summed over the
        ranks."""
        parameter: Tensor = getattr(self, name)
        if self.param_specs[name].tp_dim is None and self.tensor_size > 1:
            return sum_gradient(parameter, self.tensor_group)
        return parameter

    @abstractmethod
    def mix(
        self, parts: dict[str, Tensor], rotary_pos_emb: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        """Map sections [s, b, local rows] -> the input of `linear_proj`, [s, b, local heads *
        head_dim].

        s are this context-parallel rank's tokens; document_ids [b, s * context ranks] cover the
        whole sequence, or are None."""

    def mix_projected(
        self, projected: Tensor, rotary_pos_emb: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        """Map all sections [s, b, local rows], biases added, -> the result of `mix`."""
        parts = dict(
            zip(
                self.local_sections,
                projected.split(list(self.local_sections.values()), dim=-1),
                strict=True,
            )
        )
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
        """hidden_states [s, b, h] -> ([s, b, h], no bias). Mixers are causal by construction;
        `attention_mask` is ignored.

        `packed_seq_params` is Megatron's name for the description of packed documents; here it
        carries the document ids."""
        projected, _ = self.linear_in(hidden_states)
        if self.model.add_qkv_bias:
            projected = projected + self._bias()

        def mixed(projected: Tensor) -> Tensor:
            return self.mix_projected(projected, rotary_pos_emb, packed_seq_params)

        if not self._recomputes():
            output, _ = self.linear_proj(mixed(projected))
            return output, None
        drop = DropOutput()
        output, _ = self.linear_proj(drop.checkpoint(mixed, projected))
        drop.discard_output_and_register_recompute(output)
        return output, None

    def _bias(self) -> Tensor:
        """Return the biases of this rank's sections, zeros for those without: [local rows]."""
        dtype, device = self.config.params_dtype, self.linear_in.weight.device
        return torch.cat(
            [
                self.weight(name)
                if (name := f"{section}_bias") in self.param_specs
                else torch.zeros(rows, dtype=dtype, device=device)
                for section, rows in self.local_sections.items()
            ]
        )

    def _recomputes(self) -> bool:
        """Return whether backward recomputes everything between the projections (Megatron's
        "core_attn"), for mixers where this costs little.

        Softmax attention is the expensive part of its layer, and keeps little besides q, k, v and
        the output."""
        return (
            self.spec.recurrent
            and self.config.recompute_granularity == "selective"
            and "core_attn" in self.config.recompute_modules
        )

    def set_for_recompute_input_layernorm(self) -> None:
        """Prepare FP8 layers for selective recomputation (Megatron's layer calls this)."""
        save_original_inputs(self.linear_in, self.linear_proj)

    def heads(self, x: Tensor) -> Tensor:
        """[s, b, heads * head_dim] -> [s, b, heads, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def normalised(self, letter: str, x: Tensor, angles: Tensor | None) -> Tensor:
        """Return the section x [s, b, heads * head_dim] of q or k, which `letter` says, as heads
        [s, b, heads, head_dim]: after the norm of its name, where the mixer has one, and RoPE,
        where there are angles [s, 1, 1, head_dim]."""
        heads = self.heads(x)
        norm = getattr(self, f"{letter}_norm", None)
        if norm is not None:
            normal: Tensor = norm(heads, angles)
            return normal
        return heads if angles is None else apply_rope(heads, angles)

    def section_weight(self, name: str) -> Tensor:
        """Return this rank's rows of one section of the input projection, a view [rows,
        hidden_size]."""
        start = 0
        for section, rows in self.local_sections.items():
            if section == name:
                return self.linear_in.weight[start : start + rows]
            start += rows
        raise KeyError(name)

    @torch.no_grad()
    def init_from_attention(self, attention: "Mixer", *, seed: int) -> Self:
        """Apply HALO's weight transfer (arXiv 2601.22156): every parameter with a source is copied
        from the softmax layer that this mixer replaces, key and value rows (and biases) repeated
        for each query head of their group; the others are drawn by name and `seed`, the same on
        every layout.
        Returns itself. TypeError where this is softmax attention, or the other is not."""
        if not self.spec.recurrent:
            raise TypeError(f"{type(self).__name__} does not take over attention weights")
        if attention.spec.recurrent:
            raise TypeError(
                "weights are transferred from softmax attention, "
                f"not from {type(attention).__name__}"
            )
        for parameter in self.param_specs.values():
            target = self.local_tensor(parameter.name)
            if not parameter.source:
                target.copy_(self._drawn(parameter, seed=seed))
                continue
            copied = attention.local_tensor(parameter.source)
            if parameter.shape[0] > attention.param_specs[parameter.source].shape[0]:
                copied = repeat_groups(copied, self.head_dim, self.model.heads_per_group)
            target.copy_(copied)
        return self

    def local_tensor(self, name: str) -> Tensor:
        """Return this rank's part of a parameter of the specification: a parameter, or a view of
        the input projection."""
        if name.startswith(SECTION):
            return self.section_weight(name.removeprefix(SECTION))
        return self.get_parameter(name)

    def _drawn(self, parameter: ParamSpec, *, seed: int) -> Tensor:
        """Draw this rank's part of a fresh parameter."""
        key = f"decoder.layers.{self.layer_number - 1}.self_attention.{parameter.name}"
        whole = fresh_parameter(key, parameter, seed=seed)
        if parameter.tp_dim is None:
            return whole
        return whole.chunk(self.tensor_size, dim=parameter.tp_dim)[self.tensor_rank]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return Megatron's sharded state, with the fused projection as one logical tensor per
        section."""
        state: ShardedStateDict = {}
        for child, module in self.named_children():
            state.update(
                sharded_state_dict_default(
                    module,
                    f"{prefix}{child}.",
                    sharded_offsets,
                    metadata,
                    tp_group=self.tensor_group,
                )
            )
        key = f"{prefix}linear_in.weight"
        state[key] = split_factory(state[key], self.local_sections)
        own = dict(self.named_parameters(recurse=False))
        split = {name: dim for name in own if (dim := self.param_specs[name].tp_dim) is not None}
        state.update(make_sharded_tensors_for_checkpoint(own, prefix, split, sharded_offsets))
        return without_extra_state(state)


def without_extra_state(state: ShardedStateDict) -> ShardedStateDict:
    """Leave out the `_extra_state` objects of Megatron's and Transformer Engine's layers: stored as
    pickles, and empty but for FP8's delayed scales, which the next step finds again."""
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


_REGISTRY: dict[str, type[Mixer]] = {}


def register_mixer(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Register the module of the mixer that has a specification `name`, as a class decorator."""

    def register(cls: type[Mixer]) -> type[Mixer]:
        assert name not in _REGISTRY, f"mixer {name!r} is registered twice"
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def registered_mixers() -> dict[str, type[Mixer]]:
    """Return all known mixers by name."""
    return dict(_REGISTRY)


def mixer_class(name: str) -> type[Mixer]:
    """Return the mixer registered as `name`; ConfigError, which lists the known ones, where no
    specification has that name."""
    return _REGISTRY[mixer_spec(name).name]
