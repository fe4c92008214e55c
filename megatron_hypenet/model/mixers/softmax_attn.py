"""Softmax attention: a student's NoPE, gated layer, and with other switches its teacher's layer.

Source: arXiv 2601.22156 (HyPE: no RoPE, output gate, logit scaling at inference); Qwen3, Llama and
Qwen2 for grouped heads, with per-head norms or without."""

import math
from typing import Any, Literal

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.model import LogitsScaling
from megatron_hypenet.model.linear_layers import MixerSubmodules
from megatron_hypenet.model.mixers.base import Mixer, register_mixer
from megatron_hypenet.ops.logits_scale import logits_scale
from megatron_hypenet.ops.sigmoid_gate import sigmoid_gate
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.context import context_softmax_attn, local_positions


@register_mixer(ATTENTION)
class SoftmaxAttn(Mixer):
    """Causal grouped-query attention; `attn_use_rope`, `attn_use_output_gate` and
    `attn_logits_scaling` come from the model config.

    Where `core_attention` is given it attends over whole sequences; context-parallel ranks and
    separate documents stay with this package's operation, which needs no padding between
    documents."""

    def __init__(
        self, config: TransformerConfig, submodules: MixerSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.logits_scaling: LogitsScaling = self.model.attn_logits_scaling
        self.method: Literal["all_gather", "ring"] = (
            "ring" if self.config.cp_comm_type == "p2p" else "all_gather"
        )
        rope = self.model.rope_scaling if self.model.attn_use_rope else None
        attention_scale = 1.0 if rope is None else rope.attention_scale
        self.scale = attention_scale / math.sqrt(self.head_dim)
        self.core_attention = None
        if submodules.core_attention is not None and self.context_group.size() == 1:
            self.core_attention = submodules.core_attention(
                config=config,
                layer_number=self.layer_number,
                attn_mask_type=AttnMaskType.causal,
                attention_type="self",
                softmax_scale=self.scale,
                pg_collection=groups.collection(),
            )

    def mix(
        self, parts: dict[str, Tensor], rotary_pos_emb: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        """Attend to all earlier positions, then apply the gate."""
        angles = rotary_pos_emb if self.model.attn_use_rope else None
        q = self.normalised("q", parts["q"], angles)
        k = self.normalised("k", parts["k"], angles)
        v = self.heads(parts["v"])
        if self.logits_scaling is not None:
            scale = logits_scale(
                self.logits_scaling,
                local_positions(q.shape[0], self.context_group, q.device),
                q.dtype,
            )
            assert scale is not None
            q = q * scale[:, None, None, None]
        if self.core_attention is not None and document_ids is None:
            o = self.core_attention(q, k, v, None, AttnMaskType.causal)
        else:
            # the op's order: [b, t, heads, head_dim]
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            o = context_softmax_attn(
                q,
                k,
                v,
                scale=self.scale,
                group=self.context_group,
                document_ids=document_ids,
                method=self.method,
            )
            o = o.transpose(0, 1).flatten(-2)
        return sigmoid_gate(o, parts["gate"]) if "gate" in parts else o
