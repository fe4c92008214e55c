"""RoPE whose frequencies are scaled for longer contexts, as teachers have it: Llama 3's rule and
YaRN (arXiv 2309.00071). Names of settings are those of Hugging Face's `rope_scaling`.

Formulas are in `ops/rope.py`; this file imports no tensor library."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Factor = Annotated[float, Field(ge=1, le=1e6, strict=True)]
Turns = Annotated[float, Field(gt=0, le=1e6, strict=True)]
Length = Annotated[int, Field(gt=0, le=1 << 40, strict=True)]


class Llama3Scaling(BaseModel):
    """Llama 3.1's rule: long wavelengths are stretched by `factor`, short ones stay, and those
    between are blended."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_type: Literal["llama3"] = "llama3"
    factor: Factor
    low_freq_factor: Turns
    """Wavelengths above original_max_position_embeddings / low_freq_factor are stretched."""
    high_freq_factor: Turns
    """Wavelengths below original_max_position_embeddings / high_freq_factor stay as they are."""
    original_max_position_embeddings: Length
    """Context length before the scaling."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be larger than "
                f"low_freq_factor={self.low_freq_factor}"
            )
        return self

    @property
    def attention_scale(self) -> float:
        """Return the factor of the products of queries and keys."""
        return 1.0


class YarnScaling(BaseModel):
    """YaRN: frequencies are divided by `factor` or not, by how often they turn within the original
    context, and the products of queries and keys get a factor."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_type: Literal["yarn"] = "yarn"
    factor: Factor
    original_max_position_embeddings: Length
    """Context length before the scaling."""
    attention_factor: Annotated[float, Field(gt=0, le=1e3, strict=True)] | None = None
    """Factor of rotated queries and of rotated keys; null: 0.1 ln(factor) + 1."""
    beta_fast: Turns = 32.0
    """Frequencies with at least as many turns within the original context stay as they are."""
    beta_slow: Turns = 1.0
    """Frequencies with at most as many are divided by `factor`."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.beta_fast > self.beta_slow:
            raise ValueError(
                f"beta_fast={self.beta_fast} must be larger than beta_slow={self.beta_slow}"
            )
        return self

    @property
    def attention_scale(self) -> float:
        """Return the factor of the products of queries and keys: queries and keys have
        `attention_factor` each."""
        given = self.attention_factor
        return (0.1 * math.log(self.factor) + 1.0 if given is None else given) ** 2


RopeScaling = Annotated[Llama3Scaling | YarnScaling, Field(discriminator="rope_type")]
"""How the frequencies of a teacher's RoPE differ from plain ones."""
SCALED_ROPE_TYPES = ("llama3", "yarn")
"""Values of `rope_type` that are supported, besides `default`."""
