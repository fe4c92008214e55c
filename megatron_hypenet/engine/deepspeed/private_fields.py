"""The private fields of DeepSpeed's optimizers that this package uses, and the check that they
exist.

This file, `state_access.py`, `bf16_accumulation.py` and `bf16_step.py` use them, and no other file
does."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

from megatron_hypenet.errors import SetupError

SEEN_IN = ("0.19.8",)
"""Versions of DeepSpeed in which all of them were seen."""
BF16 = "runtime.bf16_optimizer.BF16_Optimizer"
ZERO_1_2 = "runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
ZERO_3 = "runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
ENGINE = "runtime.engine.DeepSpeedEngine"
PRIVATE_FIELDS = {
    BF16: (
        "_update_hp_grad",
        "clear_hp_grads",
        "get_grads_for_reduction",
        "accumulate_hp_grads_and_remove_lp",
        "fp32_groups_gradients",
        "fp32_groups_gradients_flat",
        "fp32_groups_gradient_flat_partition",
        "fp32_groups_has_gradients",
        "bf16_groups",
        "bf16_groups_flat",
        "bf16_partitioned_groups",
        "dp_process_group",
        "mpu",
        "clip_grad",
        "optimizer",
        "step",
        "_hp_grad",
        "_lazy_init_hp_params_optimizer_state",
    ),
    ZERO_1_2: (
        "use_grad_accum_attribute",
        "grad_accum",
        "cpu_offload",
        "averaged_gradients",
        "_release_preflattened_grad_buffers",
        "_lazy_init_hp_params_optimizer_state",
        "_global_grad_norm",
        "overflow",
        "optimizer",
    ),
    ZERO_3: (
        "_z3_optimizer",
        "_get_fp32_opt_state_partition",
        "_get_param_partition_rank",
        "fp32_partitioned_groups_flat",
        "_global_grad_norm",
        "overflow",
        "optimizer",
    ),
    ENGINE: ("_cast_module_mixed_precision",),
    "runtime.constants": ("PIPE_REPLICATED",),
}
"""Class or module below `deepspeed` -> its attributes and methods, and the fields that its code
hangs on parameters."""


def check_private_fields(deepspeed: Any) -> None:
    """Raise SetupError that names the first field which this DeepSpeed lacks.

    Fields that exist only once an optimizer is built are looked for in the names that the class's
    code uses."""
    for owner, fields in PRIVATE_FIELDS.items():
        found = _names_of(owner)
        for field in fields:
            if field not in found:
                raise SetupError(
                    f"deepspeed {deepspeed.__version__} has no field {field} in deepspeed.{owner}, "
                    f"which training uses; it is there in {', '.join(SEEN_IN)}: install that"
                )


@contextmanager
def without_casts() -> Iterator[None]:
    """Let DeepSpeed take a module with the dtypes that its parameters have, inside the block: those
    that stay in float32 beside a bfloat16 model would be rounded before an optimizer sees them."""
    engine = owner_class(ENGINE)
    cast = engine._cast_module_mixed_precision
    engine._cast_module_mixed_precision = lambda *arguments: None
    try:
        yield
    finally:
        engine._cast_module_mixed_precision = cast


def owner_class(owner: str) -> Any:
    """Return the class or module of a key of PRIVATE_FIELDS; None when DeepSpeed has none."""
    module, _, name = f"deepspeed.{owner}".rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None


def _names_of(owner: str) -> set[str]:
    """Return the attributes of a class or module, and every name and text in the code of a class's
    methods."""
    holder = owner_class(owner)
    if not isinstance(holder, type):
        return set(dir(holder))
    functions = (
        inspect.unwrap(value)
        for part in holder.__mro__
        for value in vars(part).values()
        if isinstance(value, FunctionType)
    )
    found = set(dir(holder))
    for function in functions:
        for code in _codes(function.__code__):
            found.update(code.co_names)
            found.update(text for text in code.co_consts if isinstance(text, str))
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
