"""What a HypeNet remembers between calls: keys and values of its softmax layers, one matrix per
head of its Lightning layers.

Shapes: b rows, g key/value heads, h heads, t new tokens, d head_dim."""

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK_TOKENS = 256
_GROWTH = 1.5


class HypeNetCache:
    """Memory of one batch of sequences; pass it back, as `past_key_values` or `cache`, to continue
    them.

    Softmax layers keep [b, g, capacity, d] buffers that are filled in place and grow by half their
    size, in blocks of 256 tokens, so a token is copied a bounded number of times. Lightning layers
    keep a state [b, h, d, d] in fp32 (fp64 in an fp64 model) of fixed size. Padding is remembered
    per row: `num_real` counts the real tokens, `real` says which cached columns they are. A
    Lightning state cannot be rolled back, so the cache cannot be cropped. `copy.deepcopy` gives a
    cache that is continued independently."""

    is_compileable = False
    is_croppable = False
    # `generate` feeds no token beyond the last to a cache that its caller goes on with
    _is_user_defined = False

    def __init__(self, num_layers: int) -> None:
        """An empty cache for a model of `num_layers` layers."""
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.states: list[Tensor | None] = [None] * num_layers
        self.length = 0
        self.batch_size = -1
        self.real: Tensor | None = None
        self.num_real: Tensor | None = None

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.keys)

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has seen anything."""
        return self.length > 0

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: transformers takes True to mean that the layer does not know how
        many tokens it has seen."""
        return [False] * len(self)

    @property
    def is_sliding(self) -> list[bool]:
        """False for every layer."""
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included: what `generate` has already fed."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns before the next token."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: the cache grows as needed."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows as needed (the name in transformers 5)."""
        return -1

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """(columns with the new tokens, 0). Takes the number of new tokens (transformers 5) or
        their positions (4.57)."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + new, 0

    def advance(
        self, new_real: Tensor | None, batch: int, new_tokens: int, device: torch.device
    ) -> tuple[int, int | Tensor, Tensor | None]:
        """Register `new_tokens` columns before the layers run. `new_real` [b, t] bool, None when
        nothing is padded.

        Returns (past, first, real): columns before these, real tokens before these (int, or [b, 1]
        tensor), and the mask [b, past + t] of real columns (None when nothing has ever been
        padded). ValueError for another number of rows than before."""
        if self.batch_size not in (-1, batch):
            raise ValueError(
                f"the cache holds {self.batch_size} rows and the input has {batch}; "
                "repeat the rows of"
                " the cache first, cache.batch_repeat_interleave(n), as for n beams"
            )
        self.batch_size = batch
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
        """Append key, value [b, g, t, d] after `past` columns; returns all keys and values so far,
        [b, g, past + t, d] views."""
        total = past + key.shape[2]
        views = []
        for buffers, new in ((self.keys, key), (self.values, value)):
            buffer = buffers[layer]
            if (
                buffer is not None
                and torch.is_grad_enabled()
                and (new.requires_grad or buffer.requires_grad)
            ):
                # a backward pass needs the earlier keys and values as they were
                buffers[layer] = buffer = torch.cat([buffer[:, :, :past], new], dim=2)
            else:
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
        self._change_rows(len(beam_idx), lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` names, by number or by a bool per row."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes `repeats` rows, which follow each other."""
        self._change_rows(self.batch_size * repeats, lambda x: x.repeat_interleave(repeats, dim=0))

    def _change_rows(self, batch: int, change: Callable[[Tensor], Tensor]) -> None:
        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        for memory in (self.keys, self.values, self.states):
            memory[:] = [changed(tensor) for tensor in memory]
        self.real, self.num_real = changed(self.real), changed(self.num_real)
        if self.batch_size >= 0:
            self.batch_size = batch

    def reset(self) -> None:
        """Forget everything."""
        for memory in (self.keys, self.values, self.states):
            memory[:] = [None] * len(memory)
        self.length = 0
        self.batch_size = -1
        self.real = None
        self.num_real = None

    def crop(self, max_length: int) -> None:
        """Raise ValueError: a Lightning state cannot be rolled back."""
        raise ValueError(
            "a HypeNetCache cannot be cropped: its Lightning layers keep one state, "
            "which cannot be rolled back;"
            " continue a copy that was made before (copy.deepcopy)"
        )

    def activate_past_recording(self) -> None:
        """Raise ValueError, as `crop` would later: transformers 5 asks before it drafts tokens."""
        self.crop(0)
