"""The settings of how a model's layers are computed: whose layers run, and what is in FP8."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_hypenet.config.fields import Section
from megatron_hypenet.config.model import Switch

TransformerImpl = Literal["local", "transformer_engine"]
Fp8Recipe = Literal["current", "delayed", "blockwise"]


class ModelConfigOfRun(Section):
    """How the model's layers are computed. The model itself comes from the teacher's checkpoint."""

    transformer_impl: TransformerImpl = Field(
        default="local",
        description="Whose linear layers and softmax attention run: local are Megatron's and this "
        "package's, transformer_engine NVIDIA's Transformer Engine, a package of its own, needed "
        "for fp8.student. Checkpoints and exports are the same, so a run may change it at any "
        "time.",
    )


class Fp8Config(Section):
    """Matrix products in FP8, on GPUs that have them (H100 and later). Embeddings, head, norms,
    attention, RNN states, gradients and the optimizer's weights stay as they are."""

    teacher: Switch = Field(
        default=False,
        description="Hold the linear layers of the frozen teacher in FP8, quantised once, a scale "
        "for every row: half their memory, faster products. What that does to its predictions is "
        "measured before training (guard.max_fp8_kl).",
    )
    student: Fp8Recipe | None = Field(
        default=None,
        description="Compute the linear layers of stages 2 and 3 in FP8, with scales by this "
        "recipe of Transformer Engine: current takes each tensor's largest value, delayed that of "
        "the last 16 steps (the first steps after every start have too small gradients, and CUDA "
        "graphs take no effect), blockwise one for each 128 values. null computes in the type of "
        "`precision`. Needs model.transformer_impl=transformer_engine; evaluation computes in "
        "bfloat16.",
    )

    @property
    def used(self) -> bool:
        """Return whether anything is computed in FP8."""
        return self.teacher or self.student is not None
