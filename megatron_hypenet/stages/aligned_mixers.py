"""The aligned RNN mixers of all layers as a module: what stage 1 trains, saves and hands on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

from megatron_hypenet.config.mixers import MixerSpec
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.model.linear_layers import mixer_submodules
from megatron_hypenet.model.mixers import Mixer, mixer_class


class AlignedMixers(nn.Module):
    """One RNN mixer per decoder layer of this pipeline stage; the module that stage 1 trains and
    saves."""

    def __init__(self, model_config: ModelConfig, mixers: Mapping[int, Mixer]) -> None:
        """`model_config` is the student with an RNN mixer in every layer; `mixers` goes by global
        layer index."""
        super().__init__()
        self.model_config = model_config
        self.mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in mixers.items()})

    @classmethod
    def from_teacher(cls, teacher: HypeNetModel, spec: MixerSpec, *, seed: int) -> AlignedMixers:
        """Make new mixers for every layer of `teacher` on this stage, each initialised from its
        layer's attention (weight transfer)."""
        config = teacher.model_config.converted(spec)
        build = mixer_class(spec.name)
        weight = next(teacher.parameters())
        submodules = mixer_submodules(teacher.config.transformer_impl)
        mixers = {}
        for block in teacher.layers:
            mixer = build(
                teacher.config, submodules, block.layer_number, config, teacher.pg_collection
            )
            mixer.to(weight.device, weight.dtype)
            mixers[block.layer_number - 1] = mixer.init_from_attention(
                block.self_attention, seed=seed
            )
        return cls(config, mixers)

    def items(self) -> Iterator[tuple[int, Mixer]]:
        """Return pairs of global layer index and mixer, in order."""
        return ((int(layer), cast(Mixer, mixer)) for layer, mixer in self.mixers.items())

    def of_layer(self, layer: int) -> nn.Module:
        """Return the mixer of global layer `layer`."""
        return self.mixers[str(layer)]

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Return Megatron sharded tensors under the names that the mixers have in a student."""
        tensors: dict[str, Any] = {}
        for layer, mixer in self.items():
            tensors.update(
                mixer.sharded_state_dict(f"{prefix}decoder.layers.{layer}.self_attention.")
            )
        return tensors
