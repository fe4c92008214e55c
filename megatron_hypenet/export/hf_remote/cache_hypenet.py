"""The cache of a HypeNet between calls: a slot per layer, which that layer's mixer makes and fills,
and the columns of the batch that are padding.

Shapes: b rows, g key/value heads, h heads, t new tokens, d head_dim."""

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor

_BLOCK_TOKENS = 256
_GROWTH = 1.5


class CacheSlot:
    """Cache of one layer: tensors whose first dimension is rows, None before the first token. A
    subclass names them."""

    kept: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that hold the tensors."""
    is_croppable: ClassVar[bool] = False
    """Whether the last tokens can be removed."""

    def __init__(self, layer_kind: str) -> None:
        """`layer_kind`: what messages call such layers."""
        self.layer_kind = layer_kind
        self.reset()

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included."""
        return self.length

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `change` of it."""
        for name in self.kept:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else change(tensor))

    def reorder(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was (beam search)."""
        self.change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        for name in self.kept:
            setattr(self, name, None)

    def crop(self, max_length: int) -> None:
        """Forget the columns from `max_length` on; ValueError where they cannot be taken back."""
        raise ValueError(
            f"a HypeNetCache cannot be cropped: its {self.layer_kind} layers keep one state, "
            "which cannot be rolled back;"
            " continue a copy that was made before (copy.deepcopy)"
        )


class StateSlot(CacheSlot):
    """A state of fixed size, in fp32 (fp64 in an fp64 model)."""

    kept: ClassVar[tuple[str, ...]] = ("state",)
    state: Tensor | None

    def update(self, state: Tensor, *, new_tokens: int) -> None:
        """The state after `new_tokens` more columns."""
        self.state = state
        self.length += new_tokens


class KeyValueSlot(CacheSlot):
    """Keys and values [b, g, capacity, d], filled in place; the buffers grow by half their size, in
    blocks of 256 tokens, so a token is copied a bounded number of times."""

    kept = ("keys", "values")
    is_croppable = True
    keys: Tensor | None
    values: Tensor | None

    def __init__(self) -> None:
        """No keys yet."""
        super().__init__("softmax")

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key, value [b, g, t, d]; returns all keys and values so far, as views
        [b, g, length, d]."""
        keys = self._appended(self.keys, key)
        values = self._appended(self.values, value)
        self.keys = keys
        self.values = values
        self.length += key.shape[2]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def _appended(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        past = self.length
        total = past + new.shape[2]
        tracked = new.requires_grad or (buffer is not None and buffer.requires_grad)
        if buffer is not None and torch.is_grad_enabled() and tracked:
            # a backward pass needs the earlier keys and values as they were
            return torch.cat([buffer[:, :, :past], new], dim=2)
        if buffer is None or buffer.shape[2] < total:
            wanted = total if buffer is None else max(total, int(buffer.shape[2] * _GROWTH))
            capacity = -(-wanted // _BLOCK_TOKENS) * _BLOCK_TOKENS
            grown = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
            if buffer is not None:
                grown[:, :, :past] = buffer[:, :, :past]
            buffer = grown
        buffer[:, :, past:total] = new
        return buffer

    def crop(self, max_length: int) -> None:
        """Forget the columns from `max_length` on; their memory is overwritten later."""
        self.length = min(self.length, max_length)


class HypeNetCache:
    """Cache of one batch of sequences; pass it, as `past_key_values` or `cache`, to continue them.

    `slots` has the cache of each layer. Padding is recorded per row: `num_real` counts the real
    tokens, `real` says which cached columns they are. A recurrent state cannot be rolled back, so
    only the cache of a model without any can be cropped. `copy.deepcopy` gives a cache that is
    continued independently."""

    is_compileable = False
    # `generate` adds no token beyond the last to a cache that its caller continues
    _is_user_defined = False

    def __init__(self, slots: Iterable[CacheSlot]) -> None:
        """An empty cache; `slots` by layer, `model.new_cache()` makes them."""
        self.slots = list(slots)
        self.length = 0
        self.batch_size = -1
        self.real: Tensor | None = None
        self.num_real: Tensor | None = None

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.slots)

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds any token."""
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

    @property
    def is_croppable(self) -> bool:
        """Whether no layer has a state that cannot be rolled back."""
        return all(slot.is_croppable for slot in self.slots)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns so far, padding included, which `generate` has already passed in."""
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
        for slot in self.slots:
            slot.change_rows(change)
        if self.real is not None and self.num_real is not None:
            self.real = change(self.real)
            self.num_real = change(self.num_real)
        if self.batch_size >= 0:
            self.batch_size = batch

    def reset(self) -> None:
        """Forget everything."""
        for slot in self.slots:
            slot.reset()
        self.length = 0
        self.batch_size = -1
        self.real = None
        self.num_real = None

    def crop(self, max_length: int) -> None:
        """Forget the columns from `max_length` on, or the last `-max_length` ones. ValueError where
        a layer keeps a state: nothing is changed then."""
        length = max_length if max_length >= 0 else max(self.length + max_length, 0)
        for slot in sorted(self.slots, key=lambda slot: slot.is_croppable):
            slot.crop(length)
        self.length = min(self.length, length)
        if self.real is not None:
            self.real = self.real[:, : self.length]
            self.num_real = self.real.sum(1)

    def activate_past_recording(self) -> None:
        """Raise ValueError as `crop` would later: transformers 5 asks before it drafts tokens."""
        self.crop(self.length)
