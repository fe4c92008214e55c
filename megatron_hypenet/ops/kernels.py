"""Families of Triton kernels. Each registers where its operation is defined; code that chooses
between a kernel and its torch form asks here.

A family is turned off when its kernels do not work on this machine's GPU (`model.kernel_guard`
finds that out), or by the user, with names in HYPENET_DISABLE_KERNELS, joined by commas, or
`all`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_hypenet.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megatron_hypenet.ops.selftest import KernelCheck

VARIABLE = "HYPENET_DISABLE_KERNELS"


@dataclass(frozen=True)
class KernelUse:
    """How a model uses kernels: what they are compiled for, and the shapes that decide how they
    run. Sizes are those of one rank."""

    dtype: torch.dtype
    head_dim: int
    width: int
    """Heads times head_dim."""
    hidden: int
    """Columns of the hidden states between layers."""
    ffn: int
    """Columns of the MLP's inner product."""
    vocab_rows: int
    tensor_ranks: int
    context_ranks: int
    documents: bool
    """Whether packed documents are kept apart."""
    mixers: frozenset[str] = frozenset()
    """Names of the mixers in the model, or that will be trained beside it."""
    fp8: bool = False
    """Whether a frozen teacher's linear layers are in FP8."""
    thorough: bool = False
    """Check every variant of a kernel, whether or not a model uses it, as `hypenet doctor
    --kernels` does."""


@dataclass(frozen=True)
class Family:
    """Kernels that are turned off together."""

    name: str
    fits: Callable[[KernelUse], bool]
    """Whether a model with this use runs them."""
    checked_by: str
    """`module:function` of the check; by name, because checks import what they check."""
    checked_uses: tuple[Mapping[str, Any], ...]
    """The uses that the doctor checks, as changes of its own."""

    def check(self, where: torch.device, use: KernelUse) -> KernelCheck:
        """Run the kernels once as the use says, against their definition in float64."""
        module, _, function = self.checked_by.partition(":")
        return getattr(importlib.import_module(module), function)(where, use)


FAMILIES: dict[str, Family] = {}
"""All families whose code is loaded, by name."""

# a plain dictionary that operations only read, so that torch.compile can guard on it
_enabled: dict[str, bool] = {}
_needs: dict[str, tuple[str, ...]] = {}
Front = TypeVar("Front", bound=Callable[..., Any])


def kernel_family(
    name: str,
    *,
    fits: Callable[[KernelUse], bool],
    check: str,
    needs: tuple[str, ...] = (),
    checked_uses: tuple[Mapping[str, Any], ...] = ({},),
) -> Callable[[Front], Front]:
    """Register a kernel family by decorating the function that chooses between the kernels and
    their torch form.

    Args:
        name: as HYPENET_DISABLE_KERNELS and messages spell it.
        fits, checked_uses: see `Family`.
        check: `module:function`, called with a device and the use.
        needs: families whose kernels these launch; they run only where those do."""

    def register(front: Front) -> Front:
        assert name not in FAMILIES, f"kernel family {name!r} is registered twice"
        FAMILIES[name] = Family(name, fits, check, checked_uses)
        _needs[name] = needs
        _enabled[name] = not {name, "all"} & set(_words(os.environ.get(VARIABLE, "")))
        return front

    return register


def named(words: str) -> tuple[str, ...]:
    """Return the families that a value of the environment variable names. ConfigError for a word
    that names no family."""
    chosen = _words(words)
    if unknown := [word for word in chosen if word not in (*FAMILIES, "all")]:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(
            f"{VARIABLE}={words}: {', '.join(unknown)} is no family of kernels; "
            f"choose from {known}, or all"
        )
    return tuple(FAMILIES) if "all" in chosen else tuple(chosen)


def check_variable() -> None:
    """Raise ConfigError when the environment variable names an unknown family; call it once all
    families are loaded."""
    named(os.environ.get(VARIABLE, ""))


def enabled(family: str) -> bool:
    """Return whether kernels of the family may run where they fit; KeyError for an unknown one."""
    return _enabled[family] and all(_enabled[other] for other in _needs[family])


def disable(family: str) -> None:
    """Use the torch form of this family from now on, in the whole process; KeyError for an unknown
    one."""
    if family not in _enabled:
        raise KeyError(family)
    _enabled[family] = False


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]
