"""The delta rules over a sequence that is split over ranks: each chunk acts on the state by a
matrix, M S + B, so M and B are what the ranks exchange (`state_exchange`, `Transition`)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_hypenet.ops.gated_delta_rule import DeltaRule
from megatron_hypenet.parallel.context.layout import check_document_ids
from megatron_hypenet.parallel.context.state_algebra import Transition, continuing_chunks
from megatron_hypenet.parallel.context.state_exchange import (
    ChunkExchange,
    Chunks,
    exchange_states,
)


def context_delta_rule(
    rule: DeltaRule,
    *inputs: Tensor,
    scale: float,
    group: dist.ProcessGroup,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return this rank's outputs [b, t_local, h, v] of `rule` over whole sequences, in q's dtype.

    Args:
        rule: the recurrence, with the effect of a chunk on a state.
        inputs: q, k, v, log_decay and beta of this rank's tokens, as `split_sequence` gives them.
        scale: factor of the outputs.
        group: context-parallel ranks.
        document_ids: [b, t_local * ranks], see `exchange_states`.

    Raises ValueError when t_local is odd or document_ids has another shape."""
    b, t = inputs[0].shape[:2]
    check_document_ids(document_ids, b, t * group.size())
    if group.size() == 1:
        return rule(*inputs, scale=scale, document_ids=document_ids)[0]
    exchange = DeltaRuleExchange(rule, scale)
    return exchange_states(exchange, *inputs, group=group, document_ids=document_ids)


class DeltaRuleExchange(ChunkExchange):
    """Summaries are the transition and the state from zero; outputs are computed once the incoming
    state is known."""

    def __init__(self, rule: DeltaRule, scale: float) -> None:
        self.rule = rule
        self.scale = scale

    def combine(self, chunks: Chunks) -> Transition:
        """Combine by S_out = M S + B; a state enters a chunk where its document goes on."""
        return Transition(continuing_chunks(chunks.document_ids, chunks.number))

    def local_summary(self, chunks: Chunks, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute M [2 b, h, k, k] and B [2 b, h, k, v] of each chunk; q is not used."""
        return self.rule.summary(*inputs[1:], document_ids=chunks.rows)

    def apply(
        self, chunks: Chunks, local: Tensor | None, incoming: Tensor, *inputs: Tensor
    ) -> Tensor:
        """Return the outputs [2 b, c, h, v] from the states that enter the chunks."""
        return self.rule(
            *inputs, scale=self.scale, initial_state=incoming, document_ids=chunks.rows
        )[0]
