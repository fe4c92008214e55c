"""What a HypeNet remembers between calls: keys and values of its softmax layers, one matrix per head of its Lightning layers.

Shapes: b rows, g key/value heads, h heads, t new tokens, d head_dim."""

import torch
from torch import Tensor

_BLOCK_TOKENS = 256
_GROWTH = 1.5


class HypeNetCache:
    """Memory of one batch of sequences; pass it back as `past_key_values` to continue them.

    Softmax layers keep [b, g, capacity, d] buffers that are filled in place and grow by half their size, in blocks of 256 tokens, so a
    token is copied a bounded number of times. Lightning layers keep a state [b, h, d, d] in fp32 (fp64 in an fp64 model) of fixed size.
    Padding is remembered per row: `num_real` counts the real tokens, `real` says which cached columns they are. A Lightning state cannot
    be rolled back, so the cache cannot be cropped."""

    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        """An empty cache for a model of `num_layers` layers."""
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.states: list[Tensor | None] = [None] * num_layers
        self.length = 0
        self.real: Tensor | None = None
        self.num_real: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included: what `generate` has already fed."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: the cache grows as needed."""
        return -1

    def advance(
        self, new_real: Tensor | None, batch: int, new_tokens: int, device: torch.device
    ) -> tuple[int, int | Tensor, Tensor | None]:
        """Register `new_tokens` columns before the layers run. `new_real` [b, t] bool, None when nothing is padded.

        Returns (past, first, real): columns before these, real tokens before these (int, or [b, 1] tensor), and the mask [b, past + t] of
        real columns (None when nothing has ever been padded)."""
        past = self.length
        first = past if self.num_real is None else self.num_real[:, None]
        self.length = past + new_tokens
        if new_real is None and self.real is None:
            return past, first, None
        if new_real is None:
            new_real = torch.ones(batch, new_tokens, dtype=torch.bool, device=device)
        if self.real is None or self.num_real is None:
            self.real = torch.ones(batch, past, dtype=torch.bool, device=device)
            self.num_real = torch.full((batch,), past, dtype=torch.long, device=device)
            first = self.num_real[:, None]
        self.real = torch.cat([self.real, new_real], dim=1)
        self.num_real = self.num_real + new_real.sum(1)
        return past, first, self.real

    def update(self, layer: int, key: Tensor, value: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Append key, value [b, g, t, d] after `past` columns; returns all keys and values so far, [b, g, past + t, d] views."""
        total = past + key.shape[2]
        views = []
        for buffers, new in ((self.keys, key), (self.values, value)):
            buffer = buffers[layer]
            if buffer is None or buffer.shape[2] < total:
                wanted = total if buffer is None else max(total, int(buffer.shape[2] * _GROWTH))
                capacity = -(-wanted // _BLOCK_TOKENS) * _BLOCK_TOKENS
                grown = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
                if buffer is not None:
                    grown[:, :, :past] = buffer[:, :, :past]
                buffers[layer] = buffer = grown
            buffer[:, :, past:total] = new
            views.append(buffer[:, :, :total])
        return views[0], views[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was (beam search)."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, beam_idx.to(tensor.device))

        self.keys, self.values, self.states = ([pick(tensor) for tensor in group] for group in (self.keys, self.values, self.states))
        self.real, self.num_real = pick(self.real), pick(self.num_real)

    def reset(self) -> None:
        """Forget everything."""
        for memory in (self.keys, self.values, self.states):
            memory[:] = [None] * len(memory)
        self.length, self.real, self.num_real = 0, None, None
