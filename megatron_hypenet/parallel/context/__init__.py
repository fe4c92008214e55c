"""Context parallelism: the tokens of each sequence are split over the ranks of a group, and the
mixers exchange what crosses chunk borders.

`layout` says which tokens a rank holds, `state_exchange` hands the states of recurrent mixers from
chunk to chunk, `softmax` brings all keys and values to each rank's queries."""

from megatron_hypenet.parallel.context.layout import (
    gather_sequence,
    local_positions,
    split_sequence,
)
from megatron_hypenet.parallel.context.softmax import context_softmax_attn
from megatron_hypenet.parallel.context.state_exchange import ChunkExchange, Chunks, exchange_states

__all__ = [
    "ChunkExchange",
    "Chunks",
    "context_softmax_attn",
    "exchange_states",
    "gather_sequence",
    "local_positions",
    "split_sequence",
]
