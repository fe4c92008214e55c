"""What sections of a configuration are made of: their base class, and the types of their values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Rate = Annotated[float, Field(gt=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True)]
BelowOne = Annotated[float, Field(ge=0, lt=1, strict=True)]
Percent = Annotated[float, Field(gt=0, le=100, strict=True)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """What all parts share: frozen after load, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_batches(micro: int, whole: int) -> None:
    """Raise ValueError unless micro-batches of `micro` sequences make up a step of `whole`."""
    if whole % micro:
        raise ValueError(f"micro_batch_size={micro} does not divide global_batch_size={whole}")
