"""Lightning Attention: `lightning_attn` chooses the form; `naive` is the definition, `chunked` the
torch form.

All share one contract: q, k [b, t, h, k], v [b, t, h, v], log_decay [h] (fp32 or wider), state [b,
h, k, v] -> (o, final state)."""

from megatron_hypenet.ops.lightning_attn.chunked import (
    chunked_lightning_attn,
    chunked_lightning_state,
)
from megatron_hypenet.ops.lightning_attn.decode import StateSlots, lightning_decode
from megatron_hypenet.ops.lightning_attn.dispatch import lightning_attn, lightning_state
from megatron_hypenet.ops.lightning_attn.naive import naive_lightning_attn

__all__ = [
    "StateSlots",
    "chunked_lightning_attn",
    "chunked_lightning_state",
    "lightning_attn",
    "lightning_decode",
    "lightning_state",
    "naive_lightning_attn",
]
