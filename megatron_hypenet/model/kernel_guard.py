"""Check that the kernels are correct on this GPU: each runs once, as this run will use it, and is
compared with its definition in float64 before training starts.

Users have GPUs and versions of Triton on which the kernels were never tested. A kernel that does
not compile or exceeds its error limit on any rank is replaced by its torch form on all ranks, with
a warning: the run is then slower but correct. On a CPU nothing is checked and nothing is spent."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from megatron_hypenet.config.mixers import mixer_spec, mixer_specs
from megatron_hypenet.errors import SetupError
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.ops import adamw, gradient_sum, kernels  # noqa: F401 - families that no model loads
from megatron_hypenet.ops.kernels import KernelUse
from megatron_hypenet.ops.selftest import KernelCheck
from megatron_hypenet.parallel import groups, vocab_loss  # noqa: F401
from megatron_hypenet.parallel.cpu import device

logger = logging.getLogger(__name__)

DOCTOR_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DOCTOR_USE = KernelUse(
    dtype=torch.bfloat16, head_dim=128, width=4096, hidden=4096, ffn=12_288, vocab_rows=151_936,
    tensor_ranks=1, context_ranks=1, documents=False, thorough=True,
)  # fmt: skip
"""The use that `check_all_kernels` checks: 32 heads, width and MLP of Qwen3-8B, its vocabulary."""


def use_of(
    model: HypeNetModel, *, documents: bool, mixers: tuple[str, ...] = (), fp8: bool = False
) -> KernelUse:
    """Return the kernels' use by this model, and by mixers that will be trained beside it; `fp8`
    says whether its linear layers, or a teacher's, will be put in FP8."""
    shape = model.model_config
    ranks = model.parallel.tensor_model_parallel_size
    return KernelUse(
        dtype=model.config.params_dtype,
        head_dim=shape.kv_channels,
        width=shape.query_size // ranks,
        hidden=shape.hidden_size,
        ffn=shape.ffn_hidden_size // ranks,
        vocab_rows=shape.vocab_size // ranks,
        tensor_ranks=ranks,
        context_ranks=model.parallel.context_parallel_size,
        documents=documents,
        mixers=frozenset((*shape.mixer_types, *mixers)),
        fp8=fp8,
    )


def families_of(use: KernelUse) -> list[kernels.Family]:
    """Return the families that run in this use, in an order that all ranks share; families of
    mixers that it does not have are left out."""
    claimed = {family for spec in mixer_specs().values() for family in spec.kernel_families}
    own = {family for name in use.mixers for family in mixer_spec(name).kernel_families}
    found = (
        kernels.FAMILIES[name]
        for name in sorted(kernels.FAMILIES)
        if name in own or name not in claimed
    )
    return [family for family in found if family.fits(use)]


_looked_at: set[KernelUse] = set()


def guard_kernels(
    model: HypeNetModel,
    *,
    documents: bool = False,
    mixers: tuple[str, ...] = (),
    fp8: bool = False,
) -> None:
    """Check the kernels that `model` will run, and disable the families that fail; collective over
    all ranks, once per use and process.

    `mixers` are trained beside the model. Raises ConfigError for a wrong HYPENET_DISABLE_KERNELS,
    SetupError when a kernel left the GPU unusable for this process."""
    kernels.check_variable()
    where = device()
    if where.type == "cuda":
        with torch.enable_grad():
            guard(
                use_of(model, documents=documents, mixers=mixers, fp8=fp8),
                where,
                torch.cuda.get_device_name(where),
            )


def guard(use: KernelUse, where: torch.device, gpu: str) -> None:
    """Check kernels like `guard_kernels`, for a use of them on `where`, a device of that name."""
    if use in _looked_at:
        return
    _looked_at.add(use)
    started = time.perf_counter()
    passed = []
    for family, check in ((each.name, each.check) for each in families_of(use)):
        # None: disabled on this rank, so it must be on all
        found = check(where, use) if kernels.enabled(family) else None
        _still_usable(where, family, gpu)
        verdicts = groups.gather_numbers(float(found is not None and found.ok))
        if min(verdicts) == 1.0:
            assert found is not None, "every rank passed"
            passed.append(f"{family} {found.error:.1e}")
            continue
        kernels.disable(family)
        if found is not None and not found.ok:
            logger.warning(
                "WARNING: rank %d, %s: the kernel fails its check (%s); the torch form of %s runs "
                "instead on all ranks: right, but slower. "
                "`hypenet doctor --kernels` shows all kernels; torch and triton should be versions "
                "that belong together",
                groups.rank(),
                gpu,
                found,
                family,
            )
        elif found is not None and groups.rank() == 0:
            failing = [rank for rank, verdict in enumerate(verdicts) if verdict != 1.0]
            logger.warning(
                "WARNING: the kernel of %s does not run on ranks %s: its torch form runs on all "
                "ranks",
                family,
                failing,
            )
    if where.type == "cuda":
        torch.cuda.empty_cache()
    if passed and groups.rank() == 0:
        logger.info(
            "kernels checked on %s in %.1f s, relative errors: %s",
            gpu,
            time.perf_counter() - started,
            ", ".join(passed),
        )


def _still_usable(where: torch.device, family: str, gpu: str) -> None:
    """Raise SetupError when the check of `family` left the GPU unusable: after an illegal access
    all later calls fail too, so no torch form can run in this process."""
    if where.type != "cuda":
        return
    try:
        torch.cuda.synchronize(where)
    except RuntimeError as error:
        raise SetupError(
            f"{gpu}: the kernel of {family} broke this process's use of the GPU: "
            f"{str(error).splitlines()[0]}; "
            f"set {kernels.VARIABLE}={family} in the environment to run its torch form, "
            "and start again"
        ) from error


def check_all_kernels(where: torch.device) -> Iterator[KernelCheck]:
    """Check every family in every dtype, in the uses that it names: small and large heads, packed
    documents, states in and out, a whole and a split vocabulary."""
    for dtype in DOCTOR_DTYPES:
        for family in kernels.FAMILIES.values():
            for change in family.checked_uses:
                use = replace(DOCTOR_USE, dtype=dtype, **change)
                if family.fits(use):  # another package's kernels are checked where it is installed
                    yield family.check(where, use)
