"""What a HypeNet keeps of the past in one layer: a slot of its cache.

Without gradients everything keeps its place in memory from token to token, so that the step of one
token can be captured in a CUDA graph. Shapes: b rows, g key/value heads, h heads, t new tokens, d
head_dim."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

_BLOCK_TOKENS = 256
_GROWTH = 1.5
_AHEAD_TOKENS = 1024


def in_memory_of(old: Tensor | None, new: Tensor) -> Tensor:
    """Return `new`, in the memory of `old` where that is allowed: not where gradients may need the
    old values."""
    if (
        old is None
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device)
    ):
        return new
    return writable(old).copy_(new)


def writable(x: Tensor) -> Tensor:
    """Return x, or a copy where x was made in inference mode and may not be written outside of
    it."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def room_for(columns: int, before: int, expected: int) -> int:
    """Return the size of a new buffer that must hold `columns`, instead of one for `before`
    columns; a part of the `expected` ones fits too."""
    ahead = min(expected, int(columns * _GROWTH) + _AHEAD_TOKENS)
    wanted = max(columns, ahead, int(before * _GROWTH))
    return -(-wanted // _BLOCK_TOKENS) * _BLOCK_TOKENS


class CacheSlot:
    """Cache of one layer: tensors whose first dimension is rows, None before the first token. A
    subclass names them."""

    kept: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that hold the tensors."""
    is_croppable: ClassVar[bool] = False
    """Whether the last tokens can be removed."""
    expected = 0
    """Columns that will probably come in all; room is made for them, within limits."""

    def __init__(self, layer_kind: str) -> None:
        """Name the layers as messages call them: `layer_kind`."""
        self.layer_kind = layer_kind
        self.reset()

    def get_seq_length(self) -> int:
        """Return the number of columns seen so far, padding included."""
        return self.length

    def reserve(self, columns: int) -> None:
        """Make room for so many columns in all, where a layer keeps columns."""

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `change` of it."""
        for name in self.kept:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else change(tensor))

    def reorder(self, beam_idx: Tensor) -> None:
        """Replace row i by what row beam_idx[i] was (beam search)."""
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
        """Store the state after `new_tokens` more columns."""
        self.state = in_memory_of(self.state, state)
        self.length += new_tokens


class KeyValueSlot(CacheSlot):
    """Keys and values [b, g, capacity, d], filled in place; the buffers grow by half their size, in
    blocks of 256 tokens, so a token is copied a bounded number of times."""

    kept = ("keys", "values")
    is_croppable = True
    keys: Tensor | None
    values: Tensor | None

    def __init__(self) -> None:
        """Begin without keys."""
        super().__init__("softmax")

    def update(self, key: Tensor, value: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Append key, value [b, g, t, d]; returns all keys and values so far, as views
        [b, g, length, d].

        With `at` [1], the number of the one new column, known to the device alone: the buffers
        [b, g, capacity, d], which `reserve` has made large enough; what lies behind the new column
        is finite and means nothing."""
        if at is not None:
            assert self.keys is not None and self.values is not None
            return self.keys.index_copy_(2, at, key), self.values.index_copy_(2, at, value)
        keys = self._appended(self.keys, key)
        values = self._appended(self.values, value)
        self.keys = keys
        self.values = values
        self.length += key.shape[2]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def reserve(self, columns: int) -> None:
        """Make room for so many columns in all."""
        if self.keys is not None and self.values is not None:
            self.keys = self._with_room(self.keys, columns)
            self.values = self._with_room(self.values, columns)

    def _appended(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        past = self.length
        total = past + new.shape[2]
        tracked = new.requires_grad or (buffer is not None and buffer.requires_grad)
        if buffer is not None and torch.is_grad_enabled() and tracked:
            # a backward pass needs the earlier keys and values as they were
            return torch.cat([buffer[:, :, :past], new], dim=2)
        if buffer is None:
            buffer = new.new_zeros(*new.shape[:2], room_for(total, 0, self.expected), new.shape[3])
        buffer = self._with_room(buffer, total)
        buffer[:, :, past:total] = new
        return buffer

    def _with_room(self, buffer: Tensor, columns: int) -> Tensor:
        """Return `buffer`, writable, or a larger one with its columns so far."""
        if buffer.shape[2] >= columns:
            return writable(buffer)
        capacity = room_for(columns, buffer.shape[2], self.expected)
        grown = buffer.new_zeros(*buffer.shape[:2], capacity, buffer.shape[3])
        grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def crop(self, max_length: int) -> None:
        """Forget the columns from `max_length` on; their memory is overwritten later."""
        self.length = min(self.length, max_length)
