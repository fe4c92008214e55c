"""Tensor functions of conversions in both directions: dtypes by name, checks of values, joining of
parts, and reading in blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import hf_folder, mapping

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in hf_folder.DTYPES.values()}
"""Names of the dtypes that a conversion can be asked for."""

BLOCK_VALUES = 1 << 22
"""Number of values that are read at a time."""


def parse_dtype(name: str) -> torch.dtype:
    """Return torch.bfloat16 for "bfloat16"; ConversionError lists the known names."""
    if name not in DTYPES:
        raise ConversionError(f"dtype {name!r} is not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def kept_dtype(entry: mapping.Entry, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a conversion to `dtype` writes the entry's tensors."""
    return torch.promote_types(dtype, torch.float32) if entry.at_least_float32 else dtype


def join(entry: mapping.Entry, parts: Sequence[Tensor]) -> Tensor:
    """Join the HF parts of one entry, in the order of its `hf`, into our tensor. A single part is
    returned without a copy."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=0)
    return joined if entry.reshaped is None else joined.reshape(entry.reshaped)


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite; in one pass and without another tensor."""
    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def check_finite(
    name: str, values: Tensor, blocks: Callable[[], Iterable[Tensor]], *, where: str
) -> None:
    """Raise ConversionError unless `values`, a part of the tensor `name`, are finite. `blocks`
    gives the whole tensor in parts, for counting."""
    if all_finite(values):
        return
    bad = total = 0
    for block in blocks():
        bad += int((~torch.isfinite(block)).sum())
        total += block.numel()
    raise ConversionError(
        f"{where}: {name} has {bad} of {total} values that are NaN or infinite; "
        "the file is damaged or training diverged"
    )


def blocks_of(
    read: Callable[[int, Tensor], None], count: int, dtype: torch.dtype, unit: int = 1
) -> Iterator[Tensor]:
    """Yield `count` values in parts of BLOCK_VALUES, or of `unit` values if that is more, which
    `read` puts into a 1-D tensor from the given number on. A part is replaced by the next one."""
    step = max(unit, BLOCK_VALUES // unit * unit)
    block = torch.empty(min(step, count), dtype=dtype)
    for first in range(0, count, step):
        part = block[: min(step, count - first)]
        read(first, part)
        yield part


class Scratch(threading.local):
    """Memory of each thread for values between two dtypes, used again and again: fresh memory costs
    more than the conversion."""

    _bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return a 1-D tensor of `count` values, whose content is that of an earlier use."""
        if self._bytes.numel() < count * dtype.itemsize:
            self._bytes = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        return self._bytes[: count * dtype.itemsize].view(dtype)


SCRATCH = (Scratch(), Scratch())
"""Memory for the two tensors that a piece of a conversion needs at most."""
