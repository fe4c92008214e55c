"""The cache of a HypeNet between calls: a slot per layer, which that layer's mixer makes and fills,
and the columns of the batch that are padding.

Between `begin_step` and `end_step`, the step of one token in place, the device alone knows the
number of columns, as `at`. Shapes: b rows, t new tokens."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .graph_hypenet import CapturedSteps, OneToken
from .slots_hypenet import CacheSlot, room_for, writable


class HypeNetCache:
    """Cache of one batch of sequences; pass it, as `past_key_values` or `cache`, to continue them.

    `slots` has the cache of each layer. Padding is recorded per row: `num_real` counts the real
    tokens, `real` says which cached columns they are. `generates` is set while `generate` adds
    columns, all of them real; `steps` runs single tokens. A recurrent state cannot be rolled back,
    so only the cache of a model without any can be cropped. `copy.deepcopy` gives a cache that is
    continued independently."""

    is_compileable = False
    length: int
    batch_size: int
    at: Tensor | None
    num_real: Tensor | None
    _real: Tensor | None
    # `generate` adds no token beyond the last to a cache that its caller continues
    _is_user_defined = False

    def __init__(self, slots: Iterable[CacheSlot]) -> None:
        """Make an empty cache; `slots` by layer, `model.new_cache()` makes them."""
        self.slots = list(slots)
        self.steps = CapturedSteps()
        self.generates = False
        self.reset()

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.slots)

    @property
    def is_initialized(self) -> bool:
        """Return whether the cache holds any token."""
        return self.length > 0

    @property
    def is_linear(self) -> list[bool]:
        """Return False for every layer: transformers takes True to mean that the layer does not
        know how many tokens it has seen."""
        return [False] * len(self)

    @property
    def is_sliding(self) -> list[bool]:
        """Return False for every layer."""
        return [False] * len(self)

    @property
    def is_croppable(self) -> bool:
        """Return whether no layer has a state that cannot be rolled back."""
        return all(slot.is_croppable for slot in self.slots)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns so far, padding included, which `generate` has already
        passed in."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the number of columns before the next token."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1: the cache grows as needed."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: the cache grows as needed (the name in transformers 5)."""
        return -1

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Return (columns with the new tokens, 0). Takes the number of new tokens (transformers 5)
        or their positions (4.57)."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + new, 0

    @property
    def real(self) -> Tensor | None:
        """Return [b, length] bool: the columns that are no padding; None while nothing has been
        padded."""
        return None if self._real is None else self._real[:, : self.length]

    def expect(self, columns: int) -> None:
        """Say how many columns will probably come in all, so that buffers need not grow."""
        for slot in self.slots:
            slot.expected = columns

    def advance(
        self, new_real: Tensor | None, batch: int, new_tokens: int, device: torch.device
    ) -> tuple[int, int | Tensor, Tensor | None]:
        """Register `new_tokens` columns before the layers run. `new_real` [b, t] bool, None when
        nothing is padded.

        Returns (past, first, real): columns before these, real tokens before these (int, or [b, 1]
        tensor), and the mask [b, past + t] of real columns (None when nothing has ever been
        padded). ValueError for another number of rows than before."""
        self._check_rows(batch)
        past = self.length
        if new_real is None and new_tokens > 1 and self.real is not None and bool(self.real.all()):
            # single tokens may have come with a mask that nobody looked into
            self._real = self.num_real = None
        if new_real is not None and self._real is None:
            self._start_padding(batch, device)
        if self._real is None or self.num_real is None:
            self.length = past + new_tokens
            return past, past, None
        first = self.num_real[:, None].clone()
        self._reserve_padding(past + new_tokens)
        if new_real is None:
            new_real = torch.ones(batch, new_tokens, dtype=torch.bool, device=device)
        self._real[:, past : past + new_tokens] = new_real
        self.num_real = self.num_real + new_real.sum(1)
        self.length = past + new_tokens
        return past, first, self.real

    def begin_step(self, batch: int, device: torch.device, *, masked: bool) -> None:
        """Do the host's part of one more column, in place: reserve memory for it, and write its
        number to `at` [1]. `masked`: it may be padding. ValueError for another number of rows than
        before."""
        self._check_rows(batch)
        if self.at is None or self.at.device != device:
            with torch.inference_mode(False):
                self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.at.fill_(self.length)
        for slot in self.slots:
            slot.reserve(self.length + 1)
            slot.change_rows(writable)
        if masked and self._real is None:
            self._start_padding(batch, device)
        if self._real is not None and self.num_real is not None:
            self._reserve_padding(self.length + 1)
            self.num_real = writable(self.num_real)

    def record_step(self, new_real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Do the device's part: record padding `new_real` [b, 1] bool (None: real tokens).

        Returns the tokens' positions [b or 1, 1] and the mask [b, capacity] of real columns, None
        when nothing has ever been padded."""
        assert self.at is not None
        if self._real is None or self.num_real is None:
            return self.at[None], None
        first = self.num_real[:, None].clone()
        new = torch.ones_like(first, dtype=torch.bool) if new_real is None else new_real
        self._real.index_copy_(1, self.at, new)
        self.num_real.add_(new.sum(1))
        return first, self._real

    def run_step(
        self, model: nn.Module, one_token: OneToken, ids: Tensor, new_real: Tensor | None
    ) -> Tensor:
        """Run one_token(ids, new_real), as a CUDA graph where `model` can be captured."""
        padding = (self.at, self._real, self.num_real)
        return self.steps.run(model, one_token, ids, new_real, self.slots, padding)

    def end_step(self) -> None:
        """Count the column on the host."""
        self.length += 1
        for slot in self.slots:
            slot.length = self.length

    def _check_rows(self, batch: int) -> None:
        if self.batch_size not in (-1, batch):
            raise ValueError(
                f"the cache holds {self.batch_size} rows and the input has {batch}; "
                "repeat the rows of"
                " the cache first, cache.batch_repeat_interleave(n), as for n beams"
            )
        self.batch_size = batch

    def _start_padding(self, batch: int, device: torch.device) -> None:
        """Record padding from now on: all columns so far are real."""
        self._real = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        self.num_real = torch.full((batch,), self.length, dtype=torch.long, device=device)

    def _reserve_padding(self, columns: int) -> None:
        """Make room for the padding of so many columns."""
        assert self._real is not None
        rows, capacity = self._real.shape
        if capacity >= columns:
            self._real = writable(self._real)
            return
        expected = max((slot.expected for slot in self.slots), default=0)
        grown = self._real.new_zeros(rows, room_for(columns, capacity, expected))
        grown[:, : self.length] = self._real[:, : self.length]
        self._real = grown

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by what row beam_idx[i] was (beam search)."""
        self._change_rows(len(beam_idx), lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` names, by number or by a bool per row."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, one after the other."""
        self._change_rows(self.batch_size * repeats, lambda x: x.repeat_interleave(repeats, dim=0))

    def _change_rows(self, batch: int, change: Callable[[Tensor], Tensor]) -> None:
        for slot in self.slots:
            slot.change_rows(change)
        if self._real is not None and self.num_real is not None:
            self._real = change(self._real)
            self.num_real = change(self.num_real)
        if self.batch_size >= 0:
            self.batch_size = batch

    def reset(self) -> None:
        """Forget everything."""
        for slot in self.slots:
            slot.reset()
        self.length = 0
        self.batch_size = -1
        self.at = None
        self._real = None
        self.num_real = None

    def crop(self, max_length: int) -> None:
        """Forget the columns from `max_length` on, or the last `-max_length` ones. ValueError where
        a layer keeps a state: nothing is changed then."""
        length = max_length if max_length >= 0 else max(self.length + max_length, 0)
        for slot in sorted(self.slots, key=lambda slot: slot.is_croppable):
            slot.crop(length)
        self.length = min(self.length, length)
        real = self.real
        if real is not None:
            self.num_real = real.sum(1)

    def activate_past_recording(self) -> None:
        """Raise ValueError as `crop` would later: transformers 5 asks before it drafts tokens."""
        self.crop(self.length)
