"""Lightning Attention: `naive` is the definition, `chunked` the torch form for training, `recurrent` one decode step.

All share one contract: q, k [b, t, h, k], v [b, t, h, v], log_decay [h] (fp32 or wider), state [b, h, k, v] -> (o, final state)."""

from megatron_hypenet.ops.lightning_attn.chunked import chunked_lightning_attn
from megatron_hypenet.ops.lightning_attn.naive import naive_lightning_attn
from megatron_hypenet.ops.lightning_attn.recurrent import recurrent_lightning_attn_step

__all__ = ["chunked_lightning_attn", "naive_lightning_attn", "recurrent_lightning_attn_step"]
