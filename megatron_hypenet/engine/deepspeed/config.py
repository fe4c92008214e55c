"""DeepSpeed's configuration for a training stage, and the import of DeepSpeed itself."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import torch

from megatron_hypenet.config.schema import ParallelConfig, StageConfig
from megatron_hypenet.engine.deepspeed.private_fields import check_private_fields

BUCKET_ELEMENTS = 2**28
"""Gradients that ZeRO-2 and 3 gather before they reduce them: half of DeepSpeed's default, which
takes 2 GB more."""
_EXCHANGE = {"float32": "fp32", "bfloat16": "bf16"}
"""DeepSpeed's names for the dtypes in which gradients are sent."""


def config_dict(
    stage: StageConfig, parallel: ParallelConfig, *, num_micro_batches: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for one training stage."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": stage.clip_grad,
        "zero_allow_untested_optimizer": True,
        # overlap_comm has to stay off for Megatron's pipeline schedule at stage 1
        "zero_optimization": {
            "stage": max(parallel.zero_stage, 1),
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
        },
        "steps_per_print": None,
        # it waits for the device in every forward and step
        "timers": {"throughput": {"enabled": False}},
    }
    if parallel.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": torch.cuda.is_available(),
        }
        # torch's fused AdamW runs on the CPU too, without a compiler
        config["zero_force_ds_cpu_optimizer"] = False
    if dtype == torch.bfloat16:
        # with check_grad_overflow a bad norm is noticed before the update begins, as it always is
        # in fp32
        config["bf16"] = {
            "enabled": True,
            "immediate_grad_update": True,
            "check_grad_overflow": True,
        }
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = _EXCHANGE[parallel.gradient_exchange]
    elif dtype != torch.float32:
        raise ValueError(f"training runs in float32 or bfloat16, got {dtype}")
    return config


def import_deepspeed() -> Any:
    """Import DeepSpeed with its accelerator chosen, its log quiet, and without its CPU inference
    op.

    Raises SetupError where it lacks a private field that training uses."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)  # stdout is for results
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    check_private_fields(deepspeed)
    return deepspeed
