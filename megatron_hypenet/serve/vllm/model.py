"""HypeNet as a model of vLLM: embedding, layers, head, and what the engine asks of a model with
recurrent states."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsMambaPrefixCaching,
)
from vllm.model_executor.models.utils import maybe_prefix

from megatron_hypenet.export.hf_remote.mixer_attn import query_scale
from megatron_hypenet.export.hf_remote.ops_hypenet import rope_tables
from megatron_hypenet.serve.vllm.layers import MLP, Positions
from megatron_hypenet.serve.vllm.states import StateLayer, copy_functions

MIXERS: dict[str, Any] = {
    name: module.MIXER
    for file in sorted(Path(__file__).parent.glob("mixer_*.py"))
    for module in (import_module(f"{__package__}.{file.stem}"),)
    for name in module.HF_NAMES
}
"""All mixers by the entries of `mixer_types` that stand for them."""

_JOINED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""Tensors of a folder that are parts of one parameter here."""


class Layer(nn.Module):
    """Pre-norm residual block: mixer, then MLP."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Build the layer; `prefix` ends with its number, which says what mixer it has."""
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        mixer = MIXERS[config.mixer_types[int(prefix.rpartition(".")[2])]]
        self.self_attn = mixer(vllm_config, f"{prefix}.self_attn")
        self.mlp = MLP(config, vllm_config.quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x: Tensor, residual: Tensor | None, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """(output of the layer before [T, H], sum of those before it) -> the same for the next."""
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, positions)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class Trunk(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Allocate the weights; vLLM loads them."""
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            Layer(vllm_config, f"{prefix}.layers.{layer}")
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states [T, H] after the final norm."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        about = self._positions(positions)
        for layer in self.layers:
            x, residual = layer(x, residual, about)
        return self.norm(x, residual)[0]

    def _positions(self, positions: Tensor) -> Positions:
        """Return positions [T], from 0 in each request."""
        config = self.config
        tables = rope_tables(
            config.head_dim,
            config.rope_theta,
            positions[None],
            torch.float32,
            config.llama3_scaling,
        )
        scale = query_scale(config.attn_logits_scaling, positions[None], torch.float32)
        cos, sin = (table[0, 0][:, None] for table in tables)
        return Positions(cos, sin, None if scale is None else scale[0, 0][:, None])


class HypeNetForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """HypeNet with its output head."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Raise ValueError for a model, or a number of ranks, that cannot be served."""
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        check_ranks(config, vllm_config.parallel_config.tensor_parallel_size)
        self.config = config
        # where CUDA graphs are cut: the requests of a step differ behind it
        cuts = vllm_config.compilation_config.splitting_ops
        if cuts and "vllm::hypenet_mix" not in cuts:
            cuts.append("vllm::hypenet_mix")
        self.model = Trunk(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """input_ids [T] -> [T, H]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states [T, H] of the tokens of a step; there are no other pipeline
        stages."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[rows, H] -> [rows, vocab], on the first rank."""
        return self.logits_processor(self.lm_head, hidden_states)

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the states that a layer keeps per request, on one rank."""
        config = vllm_config.model_config.hf_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        return state_class(config).state_shapes(config, ranks)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[Any, ...]:
        """Return the dtypes of those states."""
        model = vllm_config.model_config
        return state_class(model.hf_config).state_dtypes(model.hf_config, model.dtype)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """Return how the states of layers with the most states are copied."""
        return max(copy_functions().values(), key=len)

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: set[Any]) -> dict[Any, tuple[Any, ...]]:
        """Return how states are copied, by kind of layer."""
        known = copy_functions()
        return {kind: known[kind] for kind in mamba_types}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters from the tensors of a folder; returns the names of those filled.
        ValueError for a tensor that the model does not have."""
        parameters = dict(self.named_parameters(remove_duplicate=False))
        loaded = set()
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            target, part = parameter_of(name)
            if target not in parameters:
                raise ValueError(f"{name}: a HypeNet with these mixers has no such tensor")
            parameter = parameters[target]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, tensor, *part)
            loaded.add(target)
        if self.config.tie_word_embeddings:
            loaded.add("lm_head.weight")
        return loaded


def parameter_of(name: str) -> tuple[str, tuple[Any, ...]]:
    """Return the parameter that a folder's tensor fills, and which part of it (empty: all)."""
    *module, last, kind = name.split(".")
    if last not in _JOINED:
        return name, ()
    joined, part = _JOINED[last]
    return ".".join([*module, joined, kind]), (part,)


def state_class(config: Any) -> type[StateLayer]:
    """Return the class of the states of the model's recurrent layers. ValueError unless all have
    the same."""
    found = {
        MIXERS[name].state_class: name
        for name in config.mixer_types
        if hasattr(MIXERS[name], "state_class")
    }
    if len(found) != 1:
        names = " and ".join(sorted(found.values())) or "none"
        raise ValueError(
            f"vLLM serves a HypeNet with one recurrent mixer, and this one has {names}; "
            "use the exported code with transformers instead"
        )
    return next(iter(found))


def check_ranks(config: Any, ranks: int) -> None:
    """Raise ValueError when heads cannot be split over the tensor-parallel ranks."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    whole = groups % ranks == 0 or ranks % groups == 0
    if heads % ranks or not whole:
        raise ValueError(
            f"{heads} heads with {groups} key/value heads cannot be split over "
            f"{ranks} tensor-parallel ranks; choose --tensor-parallel-size from the divisors of "
            f"{heads} that divide {groups} or are a multiple of it"
        )
