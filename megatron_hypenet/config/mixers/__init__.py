"""Specifications of the mixers, one per file; importing this package registers all of them."""

import importlib
import pkgutil

from megatron_hypenet.config.mixers.base import (
    HfKeys,
    Init,
    LayoutRules,
    MixerFlops,
    MixerSpec,
    ParamSpec,
    default_mixer,
    mixer_spec,
    mixer_specs,
    register_mixer_spec,
    with_settings,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "HfKeys",
    "Init",
    "LayoutRules",
    "MixerFlops",
    "MixerSpec",
    "ParamSpec",
    "default_mixer",
    "mixer_spec",
    "mixer_specs",
    "register_mixer_spec",
    "with_settings",
]
