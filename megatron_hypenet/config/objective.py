"""Settings of what a student minimises beside its teacher."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_hypenet.config.fields import Section
from megatron_hypenet.config.model import PositiveInt

BetweenZeroAndOne = Annotated[float, Field(gt=0, lt=1, strict=True)]


class ObjectiveConfig(Section):
    """What the student minimises beside its teacher: a divergence of their next-token
    distributions, p of the teacher and q of the student."""

    kind: Literal["forward_kl", "reverse_kl", "jensen_shannon", "top_k"] = Field(
        default="forward_kl",
        description="forward_kl: sum p log(p / q). reverse_kl: sum q log(q / p). jensen_shannon: "
        "beta sum p log(p / m) + (1 - beta) sum q log(q / m) with m = beta p + (1 - beta) q. "
        "top_k: forward KL over k + 1 outcomes, the teacher's k most likely tokens and all others "
        "together.",
    )
    beta: BetweenZeroAndOne | None = Field(
        default=None,
        description="The teacher's share of m, for jensen_shannon alone; null is 0.5 there.",
    )
    k: PositiveInt | None = Field(
        default=None,
        description="The teacher's most likely tokens that count one by one, for top_k alone, "
        "which needs it.",
    )

    @model_validator(mode="after")
    def _parameters_belong(self) -> Self:
        for name, value, kind in (
            ("beta", self.beta, "jensen_shannon"),
            ("k", self.k, "top_k"),
        ):
            if value is not None and self.kind != kind:
                raise ValueError(
                    f"{name}={value:g} has no effect with kind={self.kind}: it belongs to {kind}; "
                    "leave it out"
                )
        if self.kind == "top_k" and self.k is None:
            raise ValueError("kind=top_k needs k, the number of tokens that count one by one")
        return self
