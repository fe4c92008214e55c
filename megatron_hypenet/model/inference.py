"""Logits and token scores of whole sequences on any parallel layout: every rank gives the same ids
and gets the same answer.

Sequences are padded at the end to what the layout can split; models are causal, so padding changes
nothing before it. Under context parallelism each rank computes its chunks, under pipeline
parallelism the rows go through as micro-batches; results are gathered on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype
from megatron_hypenet.parallel import groups, vocab_loss
from megatron_hypenet.parallel.context.layout import gather_sequence, split_sequence
from megatron_hypenet.parallel.pipeline import run_pipeline

if TYPE_CHECKING:
    from megatron_hypenet.model.hypenet import HypeNetModel

SCORE_CHUNK_TOKENS = 2048
"""Tokens whose logits exist at one time while scoring."""


def logits(model: HypeNetModel, input_ids: Tensor) -> Tensor:
    """input_ids [b, t] -> logits [b, t, vocab] in the model's dtype, on every rank. Differentiable
    on one process only."""
    vocab = model.model_config.vocab_size
    like = torch.empty(0, dtype=model.config.params_dtype, device=input_ids.device)
    (found,) = _over_layout(
        model, input_ids, [(like, (vocab,))], lambda hidden, _rows: (model.logits_of(hidden),)
    )
    return found


@torch.no_grad()
def token_scores(model: HypeNetModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """input_ids [b, t] -> negative log likelihood of each next token [b, t - 1] (fp32, float64 for
    float64 models), and whether it was the model's first choice [b, t - 1] (bool), on every rank.
    The head runs in chunks, so long inputs fit."""
    accumulation = accumulation_dtype(model.config.params_dtype)
    # the last position has no next token: its score is dropped
    following = F.pad(input_ids[:, 1:], (0, 1))

    def head(hidden: Tensor, rows: slice) -> tuple[Tensor, ...]:
        labels = split_sequence(_padded(model, following[rows]), model.pg_collection.cp, dim=1).t()
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=model.pg_collection.tp
            )
        return vocab_loss.token_scores(
            hidden,
            model.head_weight(),
            labels,
            chunk_tokens=SCORE_CHUNK_TOKENS,
            group=model.pg_collection.tp,
        )

    kinds = [
        torch.empty(0, dtype=dtype, device=input_ids.device) for dtype in (accumulation, torch.bool)
    ]
    nll, correct = _over_layout(model, input_ids, [(kind, ()) for kind in kinds], head)
    return nll[:, :-1], correct[:, :-1]


@torch.no_grad()
def first_choices(model: HypeNetModel, input_ids: Tensor) -> Tensor:
    """input_ids [b, t] -> the likeliest next token behind each of them, int64 [b, t], on every
    rank."""

    def head(hidden: Tensor, _rows: slice) -> tuple[Tensor, ...]:
        # under sequence parallelism the head gathers the ranks' tokens, which chunks would mix
        size = len(hidden) if model.config.sequence_parallel else SCORE_CHUNK_TOKENS
        return (torch.cat([model.logits_of(part).argmax(-1) for part in hidden.split(size)]),)

    (found,) = _over_layout(model, input_ids, [(input_ids.new_empty(0), ())], head)
    return found


def _over_layout(
    model: HypeNetModel,
    input_ids: Tensor,
    results: list[tuple[Tensor, tuple[int, ...]]],
    head: Callable[[Tensor, slice], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Run the model and, on the last stage, `head(hidden [s, b, h], rows)` -> tensors [s, b, ...]
    of this rank's tokens; returns them for whole sequences, [b, t, ...], on every rank. `results`
    names dtype and device (by an empty tensor) and trailing shape of each."""
    with _without_fp8(model):
        return _gathered(model, input_ids, results, head)


@contextmanager
def _without_fp8(model: HypeNetModel) -> Iterator[None]:
    """Compute in the model's dtype, as the exported model will: FP8 is for training, where the
    tokens are a multiple of 16."""
    config = model.config
    recipe, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = recipe


def _gathered(
    model: HypeNetModel,
    input_ids: Tensor,
    results: list[tuple[Tensor, tuple[int, ...]]],
    head: Callable[[Tensor, slice], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    group = model.pg_collection.cp
    length = input_ids.shape[1]
    local_ids = split_sequence(_padded(model, input_ids), group, dim=1)

    def whole(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            gather_sequence(part.transpose(0, 1), group, dim=1)[:, :length] for part in parts
        )

    if groups.pipeline_stage()[1] == 1:
        return whole(head(model.hidden(local_ids), slice(None)))
    found = tuple(like.new_empty(*input_ids.shape, *trailing) for like, trailing in results)
    pieces = local_ids.chunk(_num_micro_batches(len(input_ids)))
    size = len(pieces[0])

    def keep(index: int, hidden: Tensor) -> None:
        rows = slice(index * size, (index + 1) * size)
        for target, part in zip(found, whole(head(hidden, rows)), strict=True):
            target[rows] = part

    run_pipeline(
        model.chunks,
        len(pieces),
        seq_length=local_ids.shape[1] * group.size(),
        micro_batch_size=size,
        step=lambda index, chunk: model.hidden(pieces[index], chunk=chunk),
        finish=keep,
        train=False,
    )
    return tuple(groups.broadcast_from_last_stage(tensor) for tensor in found)


def _padded(model: HypeNetModel, ids: Tensor) -> Tensor:
    """Pad ids [b, t] with zeros at the end, up to a length that the layout can split."""
    return F.pad(ids, (0, -ids.shape[1] % model.parallel.sequence_unit))


def _num_micro_batches(rows: int) -> int:
    """Return the number of equal micro-batches for `rows`: the largest from which the pipeline
    profits."""
    most = 2 * groups.pipeline_stage()[1]
    return max(count for count in range(1, min(rows, most) + 1) if rows % count == 0)
