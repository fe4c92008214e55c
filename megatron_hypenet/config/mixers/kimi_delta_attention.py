"""Kimi Delta Attention (arXiv 2510.26692) in HypeNet's slot: a delta rule with one decay per key
channel and token.

Source of shapes, switches and initial values: the HypeNet reference (arXiv 2601.22156, mixer
`kda`). It leaves dt_bias uninitialised; here it is drawn like Gated DeltaNet's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from megatron_hypenet.config.mixers.base import (
    ONES,
    SECTION,
    HfKeys,
    Init,
    LayoutRules,
    MixerSpec,
    ParamSpec,
    Reshape,
    attention_parameters,
    register_mixer_spec,
)

if TYPE_CHECKING:
    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.config.schema import Recompute

CHUNK_TOKENS = 64
"""Tokens of a chunk in which FLOPs are counted."""


@register_mixer_spec("kimi_delta_attention")
class KimiDeltaAttentionSpec(MixerSpec):
    """As many key and value heads as query heads; decays and output gate come through low-rank
    projections."""

    qk_norm: bool = True
    """RMSNorm of each head of q and k, taken over from the teacher if it has one."""
    rope: bool = True
    """q and k are rotated by position, as HyPE does in RNN layers."""
    conv: bool = False
    """A short causal convolution with SiLU over q, k and v."""
    conv_size: int | None = None
    """Taps of the convolution, needed with it; 4 is usual."""

    kernel_families = ("kimi_delta_attention",)
    core_traffic = 940.0  # 10.5 ms a layer, 16,384 tokens: delta_mixers.py
    hf_keys = HfKeys(
        name="kda",
        spellings=("kimi_delta_attention",),
        prefix="kda_",
        switches={"expand_kv_proj": True},
        sizes={
            "kda_num_heads": "num_attention_heads",
            "kda_head_dim": "head_dim",
            # the reference's weight transfer reads these two for this mixer, too
            "lightning_nkv": "num_attention_heads",
            "lightning_head_dim": "head_dim",
        },
        settings={
            "kda_use_qk_norm": "qk_norm",
            "kda_use_rope": "rope",
            "kda_use_conv": "conv",
            "kda_conv_size": "conv_size",
        },
        absent={"kda_use_rope": False},
    )

    @model_validator(mode="after")
    def _taps(self) -> Self:
        if self.conv and (self.conv_size is None or not 1 < self.conv_size <= 64):
            raise ValueError(
                f"conv (kda_use_conv) needs conv_size (kda_conv_size) from 2 to 64, "
                f"got {self.conv_size}; 4 is usual"
            )
        return self

    def parameters(self, model: ModelConfig) -> tuple[ParamSpec, ...]:
        """Return the attention's parameters for all heads, the projections of decay, gate and write
        size, per-head rates, per-channel step sizes, and the convolutions."""
        heads = model.num_attention_heads
        width = model.query_size
        d = model.kv_channels
        taken = attention_parameters(model, kv_size=width, qk_norm=self.qk_norm)
        sections = (
            ("beta", "b_proj", heads),
            ("decay_down", "f_a_proj", d),
            ("gate_down", "g_a_proj", d),
        )
        return (
            *taken,
            *(
                ParamSpec(
                    name=SECTION + name, shape=(rows, model.hidden_size), tp_dim=0,
                    init=by_inputs(model.hidden_size), hf_names=(f"{hf_name}.weight",),
                )
                for name, hf_name, rows in sections
            ),
            *(
                ParamSpec(
                    name=name, shape=(width, d), tp_dim=0, init=by_inputs(d),
                    hf_names=(f"{hf_name}.weight",),
                )
                for name, hf_name in (("decay_up", "f_b_proj"), ("gate_up", "g_b_proj"))
            ),
            ParamSpec(
                name="A_log", shape=(heads,), tp_dim=0, hf_names=("A_log",), dtype="float32",
                hf_transform=Reshape((1, 1, heads, 1)), init=Init("uniform", 1.0, 16.0, "log"),
            ),
            ParamSpec(
                name="dt_bias", shape=(width,), tp_dim=0, hf_names=("dt_bias",), dtype="float32",
                init=Init("log_uniform", 0.001, 0.1, "inverse_softplus"),
            ),
            ParamSpec(
                name="o_norm.weight", shape=(d,), tp_dim=None, init=ONES,
                hf_names=("o_norm.weight",),
            ),
            *self._convolutions(width),
        )  # fmt: skip

    def _convolutions(self, width: int) -> tuple[ParamSpec, ...]:
        if not self.conv:
            return ()
        assert self.conv_size is not None, "checked with the settings"
        return tuple(
            ParamSpec(
                name=f"{letter}_conv", shape=(width, self.conv_size), tp_dim=0,
                init=by_inputs(self.conv_size), hf_names=(f"{letter}_conv1d.weight",),
                hf_transform=Reshape((width, 1, self.conv_size)),
            )
            for letter in "qkv"
        )  # fmt: skip

    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        """Count the second halves of the low-rank projections, the convolutions, and per head the
        delta rule: read, predict and update a d x d state, and half a chunk of four products."""
        d = model.kv_channels
        low_rank = 4.0 * d * model.query_size
        taps = self.conv_size if self.conv and self.conv_size is not None else 0
        convolutions = 6.0 * taps * model.query_size
        rule = model.num_attention_heads * (6.0 * d * d + 4.0 * CHUNK_TOKENS * d)
        return low_rank + convolutions + rule

    def saved_activations(
        self, model: ModelConfig, tensor_ranks: int, recompute: Recompute
    ) -> float:
        """Count the sections; unless recomputed also normalised q and k, decays and gates in
        float32 steps, o, and its norm."""
        sections = sum(self.sections(model).values())
        per_channel = 16 + (6 if self.conv else 0)
        inside = 0 if recompute == "selective" else per_channel * model.query_size
        return (sections + inside) / tensor_ranks

    def layout_rules(self, model: ModelConfig) -> LayoutRules:
        """Require whole heads on every rank, and an even share of the low-rank projections'
        channels."""
        slices = {name: getattr(model, name) for name in ("num_attention_heads", "kv_channels")}
        halo = self.conv_size - 1 if self.conv and self.conv_size is not None else 0
        return LayoutRules(tensor_slices=slices, halo_tokens=halo)


def by_inputs(fan_in: int) -> Init:
    """Use PyTorch's default for linear layers and convolutions: U(+-1 / sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return Init("uniform", -bound, bound)
