"""HypeNet's RNN mixer: Lightning Attention with fixed ALiBi decays (arXiv 2601.22156).

Unlike a softmax layer it rotates q and k (its receptive field is finite, so positions stay in the
trained range), has as many key and value heads as query heads, and normalises all heads together
before the gate."""

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_hypenet.model.mixers.base import Mixer, register_mixer
from megatron_hypenet.ops import lightning_mix
from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.lightning_attn import lightning_attn, lightning_state
from megatron_hypenet.parallel.context import ChunkExchange, Chunks, exchange_states
from megatron_hypenet.parallel.context.layout import check_document_ids
from megatron_hypenet.parallel.context.state_algebra import (
    Decay,
    add_incoming,
    carry_weights,
    read_factor,
)
from megatron_hypenet.parallel.context.state_exchange import StateTransfer, split_chunks
from megatron_hypenet.parallel.norm import AllHeadsRMSNorm


@register_mixer("lightning_attn")
class LightningAttn(Mixer):
    """Gated linear attention whose heads decay at fixed rates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A plain attribute, not a buffer: casting the module to bf16 must not round the decays.
        first = self.tensor_rank * self.num_local_heads
        self.log_decay = log_decay(self.model.num_attention_heads)[
            first : first + self.num_local_heads
        ]

    def add_modules(self) -> None:
        """Build the norms of q and k, and the norm over all heads."""
        super().add_modules()
        self.o_norm = AllHeadsRMSNorm(
            self.config, self.num_local_heads * self.head_dim, self.tensor_group
        )

    def mix_projected(
        self, projected: Tensor, rotary_pos_emb: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        """Run as one node of the autograd graph where this rank has all heads and kernels for it;
        otherwise call `mix`."""
        group = self.context_group
        split = group.size() > 1
        # under ZeRO-3 a norm may be partitioned until its own module runs
        gathered = self.q_norm.weight.numel() == self.head_dim
        fits = lightning_mix.fits(projected, self.head_dim, split=split)
        if not (self.tensor_size == 1 and gathered and fits):
            return super().mix_projected(projected, rotary_pos_emb, document_ids)
        assert rotary_pos_emb is not None, "the model passes RoPE angles to every layer"
        check_document_ids(document_ids, projected.shape[1], projected.shape[0] * group.size())
        transfer = None
        if split:
            # copied in the first call only, so that later calls wait for nothing
            self.log_decay = self.log_decay.to(projected.device)
            chunks = split_chunks(projected.shape[0], group, document_ids)
            transfer = StateTransfer(group, decay_algebra(self.log_decay, chunks))
            document_ids = chunks.rows
        return lightning_mix.lightning_mix(
            projected,
            self.q_norm.weight,
            self.k_norm.weight,
            self.o_norm.weight,
            rotary_pos_emb,
            self.log_decay,
            scale=1.0 / math.sqrt(self.head_dim),
            eps=self.q_norm.eps,
            document_ids=document_ids,
            transfer=transfer,
        )

    def mix(
        self, parts: dict[str, Tensor], rotary_pos_emb: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        """Run the decayed recurrence over the sequence, then one norm over all heads, then the
        gate."""
        assert rotary_pos_emb is not None, "the model passes RoPE angles to every layer"
        q = self.normalised("q", parts["q"], rotary_pos_emb)
        k = self.normalised("k", parts["k"], rotary_pos_emb)
        # the op's order: [b, t, heads, head_dim]
        q, k, v = (x.transpose(0, 1) for x in (q, k, self.heads(parts["v"])))
        # copied in the first call only, so that later calls wait for nothing
        self.log_decay = self.log_decay.to(q.device)
        scale = 1.0 / math.sqrt(self.head_dim)
        o = context_lightning_attn(
            q,
            k,
            v,
            self.log_decay,
            scale=scale,
            group=self.context_group,
            document_ids=document_ids,
        )
        return self.o_norm(o.transpose(0, 1).flatten(-2), parts["gate"])


def context_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    group: dist.ProcessGroup,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return this rank's outputs of causal Lightning Attention over the whole sequence: o [b,
    t_local, h, v] in q's dtype.

    Args:
        q, k: [b, t_local, h, k], this rank's tokens as `split_sequence` gives them, already rotated
            by their global positions.
        v: [b, t_local, h, v]. log_decay: [h], of this rank's heads. scale: factor of the outputs.
        group: context-parallel ranks. document_ids: [b, t_local * ranks], see `exchange_states`.

    States are exchanged in fp32 (float64 for float64 inputs). Raises ValueError when t_local is odd
    or document_ids has another shape."""
    check_document_ids(document_ids, q.shape[0], q.shape[1] * group.size())
    if group.size() == 1:
        return lightning_attn(q, k, v, log_decay, scale=scale, document_ids=document_ids)[0]
    exchange = LightningExchange(log_decay.to(q.device), scale)
    return exchange_states(exchange, q, k, v, group=group, document_ids=document_ids)


def decay_algebra(log_decay: Tensor, chunks: Chunks) -> Decay:
    """Say how states cross these chunks with heads that decay at rates log_decay [h]."""
    return Decay(carry_weights(log_decay, chunks.tokens, chunks.number, chunks.document_ids))


class LightningExchange(ChunkExchange):
    """The summary of a chunk is its final state; its outputs are those from a zero state plus what
    is read from the incoming one."""

    def __init__(self, log_decay: Tensor, scale: float) -> None:
        self.log_decay = log_decay
        self.scale = scale

    def combine(self, chunks: Chunks) -> Decay:
        """Return powers of the decay, zero across documents."""
        return decay_algebra(self.log_decay, chunks)

    def local_summary(self, chunks: Chunks, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the final states [2 b, h, k, v]; they read k and v only."""
        _, k, v = inputs
        return (lightning_state(k, v, self.log_decay, document_ids=chunks.rows),)

    def local(self, chunks: Chunks, *inputs: Tensor) -> Tensor:
        """Compute outputs [2 b, c, h, v] from zero states."""
        q, k, v = inputs
        return lightning_attn(q, k, v, self.log_decay, scale=self.scale, document_ids=chunks.rows)[
            0
        ]

    def apply(
        self, chunks: Chunks, local: Tensor | None, incoming: Tensor, *inputs: Tensor
    ) -> Tensor:
        """Add scale * gamma^(t + 1) * q_t S."""
        assert local is not None, "the local scan gives outputs"
        factor = read_factor(self.log_decay, self.scale, chunks.tokens, chunks.rows)
        return add_incoming(local, inputs[0], incoming, factor)
