"""The gated delta rule in vLLM, for the mixers that have it: their states, and the rule over the
tokens of requests. It runs in torch on every device."""

from __future__ import annotations

import math

from torch import Tensor

from megatron_hypenet.export.hf_remote.delta_hypenet import delta_chunks, delta_step
from megatron_hypenet.serve.vllm.states import StateLayer, read_states, write_states


class DeltaState(StateLayer):
    """S'_t = Diag(exp g_t) S_(t-1), S_t = S'_t + beta_t k_t (v_t - k_t^T S'_t)^T, o_t = q_t S_t /
    sqrt(d). Inputs are q, k, v [T, h, d], g [T, h, 1 or d] and beta [T, h], all in fp32."""

    def decode(self, inputs: list[Tensor], slots: Tensor, new: Tensor) -> Tensor:
        """Apply the delta rule to one token per request, as the base class says."""
        q, k, v, log_decay, beta = (x.unsqueeze(2) for x in inputs)
        cache = self.kv_cache[0]
        o, after = delta_step(q, k, v, log_decay, beta, read_states(cache, slots, new))
        write_states(cache, slots, after)
        return o.squeeze(2) / math.sqrt(q.shape[-1])

    def prefill(self, inputs: list[Tensor], slot: Tensor, new: bool) -> Tensor:
        """Apply the delta rule to the tokens of one request, as the base class says."""
        q, k, v, log_decay, beta = (x.transpose(0, 1)[None] for x in inputs)
        cache = self.kv_cache[0]
        o, after = delta_chunks(q, k, v, log_decay, beta, read_states(cache, slot, new))
        write_states(cache, slot, after)
        return o[0].transpose(0, 1) / math.sqrt(q.shape[-1])
