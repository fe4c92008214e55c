"""Token mixers, one per file, registered by name: importing this package imports, and so registers,
all of them."""

import importlib
import pkgutil

from megatron_hypenet.model.mixers.base import (
    Mixer,
    mixer_class,
    register_mixer,
    registered_mixers,
    without_extra_state,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Mixer",
    "mixer_class",
    "register_mixer",
    "registered_mixers",
    "without_extra_state",
]
