"""Are the kernels right on this GPU? Each is run once, as this run will use it, against its definition in float64, before anything trains.

Kernels meet GPUs and versions of Triton that nobody tried. One that does not compile, or is off its limit, on any rank is replaced by its
torch form on all ranks, with a warning: the run is then slower and right. On a CPU nothing is looked at and nothing is paid."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_hypenet.errors import SetupError
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.ops import (
    adamw,
    gated_norm,
    gradient_sum,
    kernels,
    lightning_mix,
    norm_rope,
    rms_norm,
    selftest,
    sigmoid_gate,
    swiglu,
)
from megatron_hypenet.ops.lightning_attn import dispatch
from megatron_hypenet.ops.selftest import KernelCheck
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.parallel.vocab.selftest import check_vocab

logger = logging.getLogger(__name__)

Checks = dict[str, Callable[[], KernelCheck]]
DOCTOR_WIDTH, DOCTOR_FFN, DOCTOR_WORDS = 4096, 12_288, 151_936
"""What `survey` looks at: the width of 32 heads and of a layer, the MLP of Qwen3-8B, Qwen3's vocabulary."""


@dataclass(frozen=True)
class KernelUse:
    """Which kernels a model runs: what they are compiled for, and the shapes that decide how. Sizes are those of one rank."""

    dtype: torch.dtype
    head_dim: int
    width: int
    """Heads times head_dim."""
    hidden: int
    """Columns of what goes from layer to layer."""
    ffn: int
    """Columns of the MLP's inner product."""
    words: int
    tensor_ranks: int
    context_ranks: int
    documents: bool
    """Whether packed documents are kept apart."""

    @classmethod
    def of(cls, model: HypeNetModel, *, documents: bool) -> KernelUse:
        """What the mixers and the head of this model run."""
        shape, ranks = model.model_config, model.parallel.tensor_model_parallel_size
        return cls(
            dtype=model.config.params_dtype,
            head_dim=shape.kv_channels,
            width=shape.query_size // ranks,
            hidden=shape.hidden_size,
            ffn=shape.ffn_hidden_size // ranks,
            words=shape.vocab_size // ranks,
            tensor_ranks=ranks,
            context_ranks=model.parallel.context_parallel_size,
            documents=documents,
        )

    def checks(self, where: torch.device) -> Checks:
        """The check of each family that this model's kernels belong to; families whose torch form runs anyway are left out."""
        found: Checks = {}
        if dispatch.kernel_fits(self.dtype, self.head_dim):
            found["lightning_attn"] = lambda: selftest.check_lightning(
                where, self.dtype, head_dim=self.head_dim, documents=self.documents, states=False, pieces=self.context_ranks > 1
            )
        if norm_rope.kernel_fits(self.dtype, self.head_dim):
            found["norm_rope"] = lambda: selftest.check_norm_rope(where, self.dtype, head_dim=self.head_dim)
        if gated_norm.kernel_fits(self.dtype, self.width) and self.tensor_ranks == 1:
            found["gated_norm"] = lambda: selftest.check_gated_norm(where, self.dtype, width=self.width)
        alone = self.tensor_ranks == self.context_ranks == 1
        if alone and lightning_mix.kernel_fits(self.dtype, self.head_dim, self.width):
            found["lightning_mix"] = lambda: selftest.check_lightning_mix(
                where, self.dtype, head_dim=self.head_dim, documents=self.documents
            )
        if sigmoid_gate.kernel_fits(self.dtype):
            found["sigmoid_gate"] = lambda: selftest.check_sigmoid_gate(where, self.dtype, width=self.width)
        if rms_norm.kernel_fits(self.dtype, self.hidden):
            found["rms_norm"] = lambda: selftest.check_rms_norm(where, self.dtype, width=self.hidden)
        if swiglu.kernel_fits(self.dtype):
            found["swiglu"] = lambda: selftest.check_swiglu(where, self.dtype, width=self.ffn)
        if self.dtype != torch.float64:
            shards = min(self.tensor_ranks, 2)
            found["vocab_loss"] = lambda: check_vocab(where, self.dtype, words=self.words, shards=shards)
        if gradient_sum.kernel_fits(self.dtype):
            found["gradient_sum"] = lambda: selftest.check_gradient_sum(where, self.dtype)
        if adamw.kernel_fits(self.dtype):
            found["adamw"] = lambda: selftest.check_adamw(where, self.dtype)
        return found


_looked_at: set[KernelUse] = set()


def guard_kernels(model: HypeNetModel, *, documents: bool = False, mixers: tuple[str, ...] = ()) -> None:
    """Check the kernels that `model` will run, and disable the families that fail; collective over all ranks, once per use and process.

    Raises SetupError when a kernel left the GPU unusable for this process."""
    where = device()
    if where.type == "cuda":
        with torch.enable_grad():
            guard(KernelUse.of(model, documents=documents), where, torch.cuda.get_device_name(where))


def guard(use: KernelUse, where: torch.device, gpu: str) -> None:
    """`guard_kernels` for a use of kernels on `where`, a device of that name."""
    if use in _looked_at:
        return
    _looked_at.add(use)
    started, passed = time.perf_counter(), []
    for family, check in use.checks(where).items():
        found = check() if kernels.enabled(family) else None  # None: disabled on this rank, so it must be on all
        _still_usable(where, family, gpu)
        verdicts = groups.gather_numbers(float(found is not None and found.ok))
        if min(verdicts) == 1.0:
            assert found is not None, "every rank passed"
            passed.append(f"{family} {found.error:.1e}")
            continue
        kernels.disable(family)
        if found is not None and not found.ok:
            logger.warning(
                "WARNING: rank %d, %s: the kernel fails its check (%s); the torch form of %s runs instead on all ranks: right, but slower. "
                "`hypenet doctor --kernels` shows all kernels; torch and triton should be versions that belong together",
                groups.rank(), gpu, found, family,
            )  # fmt: skip
        elif found is not None and groups.rank() == 0:
            failing = [rank for rank, verdict in enumerate(verdicts) if verdict != 1.0]
            logger.warning("WARNING: the kernel of %s does not run on ranks %s: its torch form runs on all ranks", family, failing)
    if where.type == "cuda":
        torch.cuda.empty_cache()
    if passed and groups.rank() == 0:
        logger.info("kernels checked on %s in %.1f s, relative errors: %s", gpu, time.perf_counter() - started, ", ".join(passed))


def _still_usable(where: torch.device, family: str, gpu: str) -> None:
    """An illegal access is reported by all later calls too: no torch form can run in this process any more."""
    if where.type != "cuda":
        return
    try:
        torch.cuda.synchronize(where)
    except RuntimeError as error:
        raise SetupError(
            f"{gpu}: the kernel of {family} broke this process's use of the GPU: {str(error).splitlines()[0]}; "
            f"set {kernels.VARIABLE}={family} in the environment to run its torch form, and start again"
        ) from error


def survey(where: torch.device) -> Iterator[KernelCheck]:
    """Every family in every dtype: narrow and wide heads, packed documents, states in and out, a whole and a split vocabulary."""
    for dtype in dispatch.KERNEL_DTYPES:
        for head_dim, full in ((64, False), (128, True)):
            yield selftest.check_lightning(where, dtype, head_dim=head_dim, documents=full, states=full, pieces=full, tokens=1000)
        yield selftest.check_norm_rope(where, dtype, head_dim=128)
        yield selftest.check_gated_norm(where, dtype, width=DOCTOR_WIDTH)
        yield selftest.check_lightning_mix(where, dtype, head_dim=128, documents=True)
        yield selftest.check_sigmoid_gate(where, dtype, width=DOCTOR_WIDTH)
        yield selftest.check_rms_norm(where, dtype, width=DOCTOR_WIDTH)
        yield selftest.check_swiglu(where, dtype, width=DOCTOR_FFN)
        yield selftest.check_gradient_sum(where, dtype)
        yield selftest.check_adamw(where, dtype)
        for shards in (1, 2):
            yield check_vocab(where, dtype, words=DOCTOR_WORDS // shards, shards=shards)
