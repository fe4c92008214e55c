"""The aligned RNN mixers as a module, and the layer sweep of layer selection: convert one layer,
score, convert back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from megatron_hypenet.config.mixers import MixerSpec
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.model.mixers import Mixer, MixerSubmodules, mixer_class
from megatron_hypenet.stages.select import METRICS

Scores = dict[str, float]
"""`recall` and `commonsense` of one model, higher is better."""


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
    def beside(cls, teacher: HypeNetModel, spec: MixerSpec, *, seed: int) -> AlignedMixers:
        """New mixers for every layer of `teacher` on this stage, each initialised from its layer's
        attention (weight transfer)."""
        config = teacher.model_config.converted(spec)
        build = mixer_class(spec.name)
        weight = next(teacher.parameters())
        mixers = {}
        for block in teacher.decoder.layers:
            mixer = build(
                teacher.config, MixerSubmodules(), block.layer_number, config, teacher.pg_collection
            )
            mixer.to(weight.device, weight.dtype)
            mixers[block.layer_number - 1] = mixer.init_from_attention(
                block.self_attention, seed=seed
            )
        return cls(config, mixers)

    def items(self) -> Iterator[tuple[int, Mixer]]:
        """Global layer index and mixer, in order."""
        return ((int(layer), cast(Mixer, mixer)) for layer, mixer in self.mixers.items())

    def of_layer(self, layer: int) -> nn.Module:
        """The mixer of global layer `layer`."""
        return self.mixers[str(layer)]

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Megatron sharded tensors under the names that the mixers have in a student."""
        tensors: dict[str, Any] = {}
        for layer, mixer in self.items():
            tensors.update(
                mixer.sharded_state_dict(f"{prefix}decoder.layers.{layer}.self_attention.")
            )
        return tensors


@contextmanager
def swapped(model: HypeNetModel, layer: int, mixers: AlignedMixers) -> Iterator[None]:
    """Inside the block, `model` uses the RNN mixer in global layer `layer`; a layer of another
    pipeline stage is not touched."""
    if str(layer) not in mixers.mixers:
        yield
        return
    original = model.mixer(layer)
    model.set_mixer(layer, mixers.of_layer(layer))
    try:
        yield
    finally:
        model.set_mixer(layer, original)


def score_layers(
    teacher: HypeNetModel,
    mixers: AlignedMixers,
    evaluate: Callable[[], Scores],
    *,
    known: Mapping[str, Any] | None = None,
    on_scored: Callable[[dict[str, Any]], None] = lambda payload: None,
) -> dict[str, Any]:
    """Score the teacher as it is, then with each layer swapped alone; the content of scores.json.

    `evaluate` measures the model in its present state. `known` is an earlier, perhaps unfinished
    result: what it holds is not measured again. `on_scored` sees the result after every
    measurement, so that it can be saved.
    """
    known = known or {}
    layers = dict(known.get("layers", {}))
    result: dict[str, Any] = {
        "num_layers": teacher.model_config.num_layers,
        "baseline": known.get("baseline"),
        "layers": layers,
    }
    if result["baseline"] is None:
        result["baseline"] = _checked(evaluate())
        on_scored(result)
    for layer in range(teacher.model_config.num_layers):
        if str(layer) in result["layers"]:
            continue
        with swapped(teacher, layer, mixers):
            result["layers"][str(layer)] = _checked(evaluate())
        on_scored(result)
    return result


def _checked(scores: Scores) -> Scores:
    assert set(scores) >= set(METRICS), f"evaluate() must give {METRICS}, got {sorted(scores)}"
    return {name: float(value) for name, value in scores.items()}
