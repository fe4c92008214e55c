"""Megatron's decoder layer with norms that also compute the residual sums beside them.

In Megatron's own layer each of these sums is a kernel of its own, forward and backward: five more
reads and writes of [s, b, h]."""

from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class PreNormLayer(TransformerLayer):
    """Norm, mixer, sum, norm, MLP, sum; without biases and dropout, which no model here has."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> ([s, b, h], the `context` that came in); whatever else
        Megatron's block passes goes to the mixer.

        Megatron's own forward runs where norms are recomputed in backward, and at the end of a
        trunk, which has no MLP."""
        if self.config.recompute_granularity == "selective" or isinstance(self.mlp, IdentityOp):
            return super().forward(hidden_states, **kwargs)
        # one name for all of them, so that a used tensor is freed
        x, residual = self.input_layernorm(hidden_states, prenorm=True)
        x, _ = self.self_attention(x, **kwargs)
        x, residual = self.pre_mlp_layernorm(x, residual=residual, prenorm=True)
        x, _ = self.mlp(x)
        return residual + x, kwargs.get("context")
