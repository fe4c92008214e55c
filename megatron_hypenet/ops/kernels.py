"""Which families of Triton kernels may run. Whatever chooses between a kernel and its torch form asks here.

A family is turned off when its kernels do not work on this machine's GPU (`engine.kernel_guard` finds that out), or by whoever starts the
process, with their names in HYPENET_DISABLE_KERNELS, joined by commas, or `all`."""

import os

from megatron_hypenet.errors import ConfigError

FAMILIES = (
    "lightning_mix",
    "lightning_attn",
    "norm_rope",
    "gated_norm",
    "sigmoid_gate",
    "rms_norm",
    "swiglu",
    "vocab_loss",
    "gradient_sum",
    "adamw",
)
NEEDS = {"lightning_mix": ("norm_rope", "lightning_attn", "gated_norm")}
"""Families that launch kernels of others, and run only where those do."""
VARIABLE = "HYPENET_DISABLE_KERNELS"


def named(words: str) -> tuple[str, ...]:
    """The families that a value of the environment variable names. ConfigError for a word that is none."""
    chosen = [word.strip() for word in words.split(",") if word.strip()]
    if unknown := [word for word in chosen if word not in (*FAMILIES, "all")]:
        raise ConfigError(f"{VARIABLE}={words}: {', '.join(unknown)} is no family of kernels; choose from {', '.join(FAMILIES)}, or all")
    return FAMILIES if "all" in chosen else tuple(chosen)


_off = named(os.environ.get(VARIABLE, ""))
# a plain dictionary that is only ever read in ops: a compiler can put a guard on it
_enabled = {family: family not in _off for family in FAMILIES}


def enabled(family: str) -> bool:
    """Whether kernels of the family may run where they fit; KeyError for an unknown one."""
    return _enabled[family] and all(_enabled[other] for other in NEEDS.get(family, ()))


def disable(family: str) -> None:
    """Use the torch form of this family from now on, in the whole process; KeyError for an unknown one."""
    if family not in _enabled:
        raise KeyError(family)
    _enabled[family] = False
