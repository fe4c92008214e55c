"""HypeNet's RNN mixer: Lightning Attention with fixed ALiBi decays (arXiv 2601.22156).

Unlike a softmax layer it rotates q and k (its receptive field is finite, so positions stay in the trained range), has as many key and
value heads as query heads, and normalises all heads together before the gate."""

import math
from typing import Any, Self

import torch
from torch import Tensor

from megatron_hypenet.config.model import LIGHTNING_MIXER, ModelConfig
from megatron_hypenet.model.mixers.base import Mixer, register_mixer
from megatron_hypenet.model.mixers.softmax import SoftmaxAttn
from megatron_hypenet.model.transfer import named_normal, repeat_groups
from megatron_hypenet.ops import lightning_mix
from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.parallel.context import context_lightning_attn
from megatron_hypenet.parallel.context.layout import check_document_ids
from megatron_hypenet.parallel.norm import AllHeadsRMSNorm


@register_mixer(LIGHTNING_MIXER)
class LightningAttn(Mixer):
    """Gated linear attention whose heads forget at fixed rates."""

    recurrent = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.o_norm = AllHeadsRMSNorm(self.config, self.num_local_heads * self.head_dim, self.tensor_group)
        # A plain attribute, not a buffer: casting the module to bf16 must not round the decays.
        first = self.tensor_rank * self.num_local_heads
        self.log_decay = log_decay(self.model.num_attention_heads)[first : first + self.num_local_heads]

    @classmethod
    def sections(cls, model: ModelConfig) -> dict[str, int]:
        """q, k, v and gate, each for all heads."""
        return dict.fromkeys(("q", "k", "v", "gate"), model.query_size)

    @classmethod
    def num_parameters(cls, model: ModelConfig) -> int:
        """The base plus `o_norm`."""
        return super().num_parameters(model) + model.query_size

    @classmethod
    def kept_numbers(cls, model: ModelConfig, tensor_ranks: int, *, dropped: bool) -> float:
        """The four sections; unless dropped also rotated q and k, o, and the gated norm of o, which over several ranks is three steps."""
        inside = 0 if dropped else 4 if tensor_ranks == 1 else 6
        return (4 + inside) * model.query_size / tensor_ranks

    @classmethod
    def mix_flops_per_token(cls, model: ModelConfig, seq_length: int) -> float:
        """Per head: state update and read, 4 d^2, and half a 64-token chunk of two products, 2 * 64 * d."""
        d = model.kv_channels
        return model.num_attention_heads * (4.0 * d * d + 2.0 * 64 * d)

    def mix_projected(self, projected: Tensor, rotary_pos_emb: Tensor | None, document_ids: Tensor | None) -> Tensor:
        """One node of the graph where this rank has all heads, the whole sequence, and kernels for it; else step by step."""
        alone = self.tensor_size == 1 and self.context_group.size() == 1
        gathered = self.q_norm.weight.numel() == self.head_dim  # ZeRO-3 may hold norms in pieces until their own module runs
        if not (alone and gathered and lightning_mix.fits(projected, self.head_dim)):
            return super().mix_projected(projected, rotary_pos_emb, document_ids)
        assert rotary_pos_emb is not None, "the model passes RoPE angles to every layer"
        check_document_ids(document_ids, projected.shape[1], projected.shape[0])
        return lightning_mix.lightning_mix(
            projected, self.q_norm.weight, self.k_norm.weight, self.o_norm.weight, rotary_pos_emb, self.log_decay,
            scale=1.0 / math.sqrt(self.head_dim), eps=self.q_norm.eps, document_ids=document_ids,
        )  # fmt: skip

    def mix(self, parts: dict[str, Tensor], rotary_pos_emb: Tensor | None, document_ids: Tensor | None) -> Tensor:
        """The decayed recurrence over the sequence, then one norm over all heads, then the gate."""
        assert rotary_pos_emb is not None, "the model passes RoPE angles to every layer"
        q, k = self.q_norm(self.heads(parts["q"]), rotary_pos_emb), self.k_norm(self.heads(parts["k"]), rotary_pos_emb)
        q, k, v = (x.transpose(0, 1) for x in (q, k, self.heads(parts["v"])))  # the op's order: [b, t, heads, head_dim]
        self.log_decay = self.log_decay.to(q.device)  # once: later calls find it there, and nothing waits for a copy
        scale = 1.0 / math.sqrt(self.head_dim)
        o = context_lightning_attn(q, k, v, self.log_decay, scale=scale, group=self.context_group, document_ids=document_ids)
        return self.o_norm(o.transpose(0, 1).flatten(-2), parts["gate"])

    @torch.no_grad()
    def init_from_attention(self, attention: Mixer, *, seed: int) -> Self:
        """HALO's weight transfer: q, o and the q/k norms copied, k and v repeated for each query head of their group, the gate drawn
        from N(0, init_method_std) by name and seed (the same on every layout), `o_norm` ones."""
        if not isinstance(attention, SoftmaxAttn):
            raise TypeError(f"weights are transferred from softmax attention, not from {type(attention).__name__}")
        per_group = self.model.heads_per_group
        self.section_weight("q").copy_(attention.section_weight("q"))
        for name in ("k", "v"):
            self.section_weight(name).copy_(repeat_groups(attention.section_weight(name), self.head_dim, per_group))
        gate = named_normal(
            f"decoder.layers.{self.layer_number - 1}.self_attention.linear_in.weight.gate",
            (self.model.query_size, self.model.hidden_size),
            std=self.model.init_method_std,
            seed=seed,
        )
        self.section_weight("gate").copy_(gate.chunk(self.tensor_size)[self.tensor_rank])
        self.q_norm.weight.copy_(attention.q_norm.weight)
        self.k_norm.weight.copy_(attention.k_norm.weight)
        self.o_norm.weight.fill_(1.0)
        self.linear_proj.weight.copy_(attention.linear_proj.weight)
        return self
