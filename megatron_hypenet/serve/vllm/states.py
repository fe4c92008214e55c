"""Recurrent states in vLLM: slots of its cache, the requests of a step, and the operation that
mixes their tokens.

vLLM orders the requests of a step: those with one new token first (decodes), then prompts or chunks
of prompts (prefills). Each has one slot per layer; with prefix caching the engine copies states
between slots by itself. A slot that belonged to another request still has its state, so a request
without earlier tokens starts from zeros whatever the slot holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import (
    mamba_get_block_table_tensor,
    split_decodes_and_prefills,
)

_UNUSED_SLOT = 0
"""vLLM gives block 0 to no request; rows that only fill up a CUDA graph write there."""
_KINDS = (MambaAttentionBackendEnum.LINEAR, MambaAttentionBackendEnum.GDN_ATTN)
"""Labels of layers with one and with two states, by which vLLM finds the functions that copy them.
The backends that these names stand for are not used."""


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """A request with several new tokens: rows `start` to `stop` of the step's tokens."""

    request: int
    start: int
    stop: int
    is_new: bool
    """Whether it has no earlier tokens, and so no state."""


@dataclass(frozen=True, kw_only=True)
class Requests:
    """The requests of one step, for the layers of one group of the cache."""

    num_decodes: int
    slots: Tensor
    """[n] int64."""
    new_decodes: Tensor
    """[n] bool: decodes without earlier tokens, prompts of one token."""
    prefills: tuple[Prefill, ...]


class RequestsBuilder(AttentionMetadataBuilder[Requests]):
    """Makes `Requests` of vLLM's description of a step.

    CUDA graphs of whole steps have decodes only and read `slots` and `new_decodes` where they were
    when the graph was captured, so these lie in buffers that stay."""

    reorder_batch_threshold: int | None = 1
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        """Take the arguments as vLLM gives them."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        rows = max(
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self._slots = torch.zeros(rows, dtype=torch.int64, device=device)
        self._new = torch.zeros(rows, dtype=torch.bool, device=device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Requests:
        """Describe the requests of a step."""
        step = common_attn_metadata
        n = step.num_reqs
        blocks = mamba_get_block_table_tensor(
            step.block_table_tensor,
            step.seq_lens,
            self.kv_cache_spec,
            self.vllm_config.cache_config.mamba_cache_mode,
        )[:n, 0]
        lengths = step.seq_lens[:n]
        slots, new = self._slots[:n], self._new[:n]
        slots.copy_(torch.where(lengths > 0, blocks, _UNUSED_SLOT))
        new.copy_(lengths == 1)
        num_decodes, num_prefills, _, _ = split_decodes_and_prefills(step, decode_threshold=1)
        prefills: list[Prefill] = []
        if num_prefills:
            bounds = step.query_start_loc_cpu.tolist()
            totals = _total_tokens(step)
            prefills = [
                Prefill(
                    request=i,
                    start=bounds[i],
                    stop=bounds[i + 1],
                    is_new=totals[i] == bounds[i + 1] - bounds[i],
                )
                for i in range(num_decodes, n)
                if bounds[i] < bounds[i + 1]
            ]
        return Requests(
            num_decodes=num_decodes, slots=slots, new_decodes=new, prefills=tuple(prefills)
        )


def _total_tokens(step: CommonAttentionMetadata) -> list[int]:
    """Return the number of earlier and new tokens of each request; exact for prefills."""
    known = step.seq_lens_cpu_upper_bound
    return (step.seq_lens if known is None else known).tolist()


class StateBackend(AttentionBackend):
    """How vLLM finds the builder; there is no attention kernel behind it."""

    @staticmethod
    def get_name() -> str:
        """Return the name in vLLM's log."""
        return "HYPENET_STATE"

    @staticmethod
    def get_impl_cls() -> Any:
        """Return None: the layers compute by themselves."""
        return None

    @staticmethod
    def get_builder_cls() -> type[RequestsBuilder]:
        """Return the class that describes a step."""
        return RequestsBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """Return True: the layer's cache has states, not keys and values."""
        return True


class StateLayer(nn.Module, MambaBase):
    """Base of recurrent mixers: their place in the cache, and the walk over the requests of a
    step."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Register the layer; `prefix`: its name in vLLM's tables."""
        super().__init__()
        self.prefix = prefix
        self.kv_cache: tuple[Tensor, ...] = (torch.tensor([]),)
        model = vllm_config.model_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        self._shapes = self.state_shapes(model.hf_config, ranks)
        self._dtypes = self.state_dtypes(model.hf_config, model.dtype)
        table = vllm_config.compilation_config.static_forward_context
        if prefix in table:
            raise ValueError(f"two layers are called {prefix}")
        table[prefix] = self

    @classmethod
    def state_shapes(cls, config: Any, tensor_ranks: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of a request's states on one of `tensor_ranks` ranks: a matrix per
        head."""
        return ((config.num_attention_heads // tensor_ranks, config.head_dim, config.head_dim),)

    @classmethod
    def state_dtypes(cls, config: Any, model_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the states; matrices are summed up in fp32 in every model."""
        return (torch.float32,)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Return `state_shapes` as vLLM asks for it."""
        return self._shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the states as vLLM asks for them."""
        return self._dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Return the label by which vLLM groups layers."""
        return _KINDS[len(self._shapes) - 1]

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return the builder of `Requests`."""
        return StateBackend

    def decode(self, inputs: list[Tensor], slots: Tensor, new: Tensor) -> Tensor:
        """Process one token of each of n requests: inputs [n, ...] -> [n, h, d]. Reads and writes
        the states in `slots` [n]; where `new` [n], the state before is zero."""
        raise NotImplementedError

    def prefill(self, inputs: list[Tensor], slot: Tensor, new: bool) -> Tensor:
        """Process tokens of one request: inputs [t, ...] -> [t, h, d], with the state in `slot`
        [1]."""
        raise NotImplementedError

    def mixed(self, inputs: list[Tensor], output: Tensor) -> Tensor:
        """Fill `output` [T, h, d] from inputs [T, ...] and return it; an operation of its own for
        compilers and CUDA graphs."""
        torch.ops.vllm.hypenet_mix(inputs, output, self.prefix)
        return output

    def over_requests(self, inputs: list[Tensor], output: Tensor, requests: Requests) -> None:
        """Compute `mixed` for the requests of one step; rows behind them are left as they are."""
        if n := requests.num_decodes:
            rows = [x[:n] for x in inputs]
            output[:n] = self.decode(rows, requests.slots[:n], requests.new_decodes[:n])
        for one in requests.prefills:
            part = slice(one.start, one.stop)
            slot = requests.slots[one.request : one.request + 1]
            output[part] = self.prefill([x[part] for x in inputs], slot, one.is_new)


def read_states(cache: Tensor, slots: Tensor, new: Tensor | bool) -> Tensor:
    """Return copies of the states [n, ...] in `slots` [n]; zeros where `new` (a bool, or [n])."""
    if new is True:
        return cache.new_zeros(len(slots), *cache.shape[1:])
    states = cache.index_select(0, slots)
    if isinstance(new, Tensor):
        states = states.masked_fill(new.view(-1, *[1] * (states.dim() - 1)), 0)
    return states


def write_states(cache: Tensor, slots: Tensor, states: Tensor) -> None:
    """Put states [n, ...] into `slots` [n]."""
    cache.index_copy_(0, slots, states.to(cache.dtype))


def copy_functions() -> dict[MambaAttentionBackendEnum, tuple[Any, ...]]:
    """Return how vLLM copies the states of a layer, for prefix caching: each as a whole."""
    return {kind: (get_temporal_copy_spec,) * (1 + i) for i, kind in enumerate(_KINDS)}


def _mix(inputs: list[Tensor], output: Tensor, layer_name: str) -> None:
    context = get_forward_context()
    if context.attn_metadata is None:
        output.zero_()  # vLLM tries a step out, to see how much memory it takes
        return
    layer = context.no_compile_layers[layer_name]
    layer.over_requests(inputs, output, context.attn_metadata[layer_name])


def _mix_fake(inputs: list[Tensor], output: Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op(
    op_name="hypenet_mix", op_func=_mix, mutates_args=["output"], fake_impl=_mix_fake
)
