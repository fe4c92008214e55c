"""Token mixers, one per file, registered by name: importing this package registers all of them."""

from megatron_hypenet.model.mixers.base import Mixer, MixerSubmodules, mixer_class, register_mixer, registered_mixers, without_extra_state
from megatron_hypenet.model.mixers.lightning import LightningAttn
from megatron_hypenet.model.mixers.softmax import SoftmaxAttn

__all__ = [
    "LightningAttn",
    "Mixer",
    "MixerSubmodules",
    "SoftmaxAttn",
    "mixer_class",
    "register_mixer",
    "registered_mixers",
    "without_extra_state",
]
