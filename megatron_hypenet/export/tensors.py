"""Tensor functions of conversions in both directions: dtypes by name, checks of values, and joining
of parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import hf_folder, mapping

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in hf_folder.DTYPES.values()}
"""Names of the dtypes that a conversion can be asked for."""


def parse_dtype(name: str) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16; ConversionError lists the known names."""
    if name not in DTYPES:
        raise ConversionError(f"dtype {name!r} is not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def kept_dtype(entry: mapping.Entry, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a conversion to `dtype` writes the entry's tensors."""
    return torch.promote_types(dtype, torch.float32) if entry.at_least_float32 else dtype


def join(entry: mapping.Entry, parts: Sequence[Tensor]) -> Tensor:
    """Join the HF parts of one entry, in the order of its `hf`, into our tensor. A single part is
    returned without a copy."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=0)
    return joined if entry.reshaped is None else joined.reshape(entry.reshaped)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], *, where: str) -> None:
    """Raise ConversionError unless the tensor has this shape, a supported dtype and only finite
    values."""
    mapping.check_shape(name, tuple(tensor.shape), shape, where=where)
    if tensor.dtype not in DTYPES.values():
        supported = ", ".join(DTYPES)
        raise ConversionError(
            f"{where}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; "
            f"supported are {supported}."
            " Quantized weights must be dequantized first"
        )
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise ConversionError(
            f"{where}: {name} has {bad} of {tensor.numel()} values that are NaN or infinite; "
            "the file is damaged or training diverged"
        )
