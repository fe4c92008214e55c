"""Context parallelism: the tokens of each sequence lie on the ranks of a group, and the mixers exchange what crosses the borders.

`layout` says which tokens a rank holds, `lightning` exchanges states between chunks, `softmax` brings keys and values to queries."""

from megatron_hypenet.parallel.context.layout import gather_sequence, local_positions, split_sequence
from megatron_hypenet.parallel.context.lightning import context_lightning_attn
from megatron_hypenet.parallel.context.softmax import context_softmax_attn

__all__ = ["context_lightning_attn", "context_softmax_attn", "gather_sequence", "local_positions", "split_sequence"]
