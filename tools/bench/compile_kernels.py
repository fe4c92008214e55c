"""Compile every kernel for GPUs that need not be here, and compare the shared memory of a program
with what they have.

    python tools/bench/compile_kernels.py       # A100, RTX 4090, H100, RTX 5090; installed Triton
    python tools/bench/compile_kernels.py --gpu 90 --dims 128 --dtypes bf16
    PYTHONPATH=FOLDER python tools/bench/compile_kernels.py     # with another Triton:
                                      # pip install --no-deps --target FOLDER triton==3.2.0

A kernel that does not compile, or needs too much memory, is a line with FAILED or OVER, and the
exit code is 1. Some versions of Triton end the whole process instead: the kernel is then the one
after the last line."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_hypenet.ops.adamw import triton as adamw_kernels  # noqa: E402
from megatron_hypenet.ops.gated_norm import triton as gated_norm_kernels  # noqa: E402
from megatron_hypenet.ops.gradient_sum import triton as gradient_sum_kernels  # noqa: E402
from megatron_hypenet.ops.lightning_attn import triton_dkdv, triton_scan  # noqa: E402
from megatron_hypenet.ops.lightning_attn.triton_plan import Blocks, Gpu, make_plan, power_of_two  # noqa: E402
from megatron_hypenet.ops.lightning_attn.triton_tiles import DESCRIPTORS, WHOLE  # noqa: E402
from megatron_hypenet.ops.norm_rope import triton as norm_rope_kernels  # noqa: E402
from megatron_hypenet.ops.rms_norm import triton as rms_norm_kernels  # noqa: E402
from megatron_hypenet.ops.rows import warps_of_row  # noqa: E402
from megatron_hypenet.ops.sigmoid_gate import triton as sigmoid_gate_kernels  # noqa: E402
from megatron_hypenet.ops.swiglu import triton as swiglu_kernels  # noqa: E402
from megatron_hypenet.parallel.vocab_loss import triton_terms  # noqa: E402

# compute capability -> processors and bytes of shared memory of one program
GPUS = {
    80: (108, 166_912),
    89: (128, 101_376),
    90: (132, 232_448),
    100: (148, 232_448),
    120: (170, 101_376),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HAS_DESCRIPTORS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 4)


@dataclass(frozen=True)
class Job:
    """One kernel to compile: types of its arguments, values of the compile-time ones, launch
    parameters."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int | None = None


def lightning(capability: int, dtype: str, dim: int, documents: bool) -> Iterator[Job]:
    """Launch the kernels of one head dim as the plan for this GPU says."""
    gpu = Gpu(*GPUS[capability], all_products=HAS_DESCRIPTORS or capability < 90)
    plan = make_plan(
        batch=1, tokens=16384, heads=16, dim_k=dim, dim_v=dim, dtype=DTYPES[dtype], gpu=gpu
    )
    access = int((DESCRIPTORS if HAS_DESCRIPTORS and capability >= 90 else WHOLE).value)

    def tiles(names: str, columns: int, blocks: Blocks) -> dict[str, str]:
        kind = (
            f"tensordesc<{dtype}[1, 1, {blocks.chunk}, {columns}]>"
            if access == DESCRIPTORS.value
            else f"*{dtype}"
        )
        return {f"{name}_ptr": kind for name in names.split()}

    block = power_of_two(dim)
    types = dict.fromkeys(("states", "outer", "final", "log2_decay"), "*fp32")
    types |= {"ids_ptr": "*i32" if documents else "*fp32", "scale": "fp32"}
    shared = {"documents": documents, "access": access, "precision": plan.precision}
    scan = plan.scan
    states = plan.states
    dkdv = plan.dkdv
    for reverse, transposed in [(False, False), (False, True)] + (
        [] if dkdv else [(True, False), (True, True)]
    ):
        constants = {
            "dim_x": dim,
            "dim_z": dim,
            "block_x": block,
            "block_z": scan.columns,
            "chunk": scan.chunk,
            "reverse": reverse,
        }
        constants |= {
            "has_outer": False,
            "wants_final": not transposed,
            "stride_sx" if transposed else "stride_sz": 1,
        } | shared
        own = types | tiles("x y", block, scan) | tiles("z out", scan.columns, scan)
        name = f"scan{' reverse' if reverse else ''}{' transposed' if transposed else ''}"
        yield Job(name, triton_scan.scan_kernel, own, constants, scan.warps, scan.stages)
    for reverse in (False, True):
        constants = {
            "dim_x": dim,
            "dim_z": dim,
            "block_x": block,
            "block_z": states.columns,
            "chunk": states.chunk,
            "reverse": reverse,
        }
        own = types | tiles("y", block, states) | tiles("z", states.columns, states)
        name = f"states{' reverse' if reverse else ''}"
        yield Job(
            name,
            triton_scan.segment_states_kernel,
            own,
            constants | shared,
            states.warps,
            states.stages,
        )
    if dkdv:
        constants = {
            "dim_k": dim,
            "dim_v": dim,
            "block_k": block,
            "block_v": block,
            "chunk": dkdv.chunk,
        } | shared
        own = types | tiles("q k v do dk dv", block, dkdv)
        yield Job(
            "dkdv",
            triton_dkdv.dkdv_kernel,
            own,
            constants | {"has_outer": False, "wants_final": False},
            dkdv.warps,
            dkdv.stages,
        )


def rows(dtype: str) -> Iterator[Job]:
    """Launch norm with RoPE for 128 dims, norms with and without gate or residual for narrow and
    for the widest rows, SwiGLU."""
    own = f"*{dtype}"
    tokens = norm_rope_kernels.TOKENS
    warps = norm_rope_kernels.WARPS
    pointers = ("x", "y", "dy", "dx", "weight", "gate", "dgate", "residual", "summed", "dresidual")
    types = dict.fromkeys(pointers, own) | {"angles": "*fp32", "dweight": "*fp32", "eps": "fp32"}
    for name in ("forward", "backward"):
        kernel = getattr(norm_rope_kernels, f"{name}_kernel")
        for rotates in (True, False):
            constants = {"half": 64, "tokens": tokens} | ({} if rotates else {"angles": None})
            yield Job(
                f"norm_rope {name}{'' if rotates else ' without angles'}",
                kernel,
                types,
                constants,
                warps,
            )
        for width in (2048, 16384):
            kernel = getattr(gated_norm_kernels, f"{name}_kernel")
            yield Job(
                f"gated_norm {name} {width}", kernel, types, {"block": width}, warps_of_row(width)
            )
        for width in (2048, 8192):
            kernel = getattr(rms_norm_kernels, f"{name}_kernel")
            alone = dict.fromkeys({"residual", "summed", "dresidual"} & set(kernel.arg_names))
            for label, constants in (("", alone), (" with a residual", {})):
                yield Job(
                    f"rms_norm {name} {width}{label}",
                    kernel,
                    types,
                    {"block": width} | constants,
                    warps_of_row(width),
                )
        kernel = getattr(swiglu_kernels, f"{name}_kernel")
        yield Job(
            f"swiglu {name}", kernel, types, {"block": swiglu_kernels.BLOCK}, swiglu_kernels.WARPS
        )
        kernel = getattr(sigmoid_gate_kernels, f"{name}_kernel")
        yield Job(
            f"sigmoid_gate {name}",
            kernel,
            types,
            {"block": sigmoid_gate_kernels.BLOCK},
            sigmoid_gate_kernels.WARPS,
        )


def head(dtype: str) -> Iterator[Job]:
    """Launch the vocabulary losses at Qwen3's 75 tiles per token."""
    types = dict.fromkeys(
        ("s_ptr", "t_ptr", "x_ptr", "stats_ptr", "tile_ptr", "merged_ptr", "weight_ptr"), "*fp32"
    )
    types |= {"label_ptr": "*i64", "count_ptr": "*i32", "out_ptr": f"*{dtype}"}
    values = {
        "TILE": triton_terms.TILE,
        "PARTS": 128,
        "TOKENS": triton_terms.MERGE_TOKENS,
        "WEIGHTED": True,
    }
    for name in (
        "kl_stats",
        "kl_merge",
        "kl_gradient",
        "kl_one_pass",
        "ce_stats",
        "ce_merge",
        "ce_gradient",
        "ce_one_pass",
    ):
        kernel = getattr(triton_terms, f"_{name}_kernel")
        constants = {key: value for key, value in values.items() if key in kernel.arg_names}
        own = types | ({"out_ptr": "*fp32"} if name.endswith("merge") else {})
        yield Job(name, kernel, own, constants, triton_terms.NUM_WARPS)


def sums(dtype: str) -> Iterator[Job]:
    """Launch the first gradient sum of a step, later ones that are added to it, and the update."""
    types = {"total": "*fp32", "gradient": f"*{dtype}"}
    sizes = {"block": gradient_sum_kernels.BLOCK, "vector": gradient_sum_kernels.VECTOR}
    for add in (False, True):
        yield Job(
            f"gradient {'sum' if add else 'copy'}",
            gradient_sum_kernels.kernel,
            types,
            {"add": add} | sizes,
            gradient_sum_kernels.WARPS,
        )
    floats = ("kept", "beta1", "rest1", "beta2", "rest2", "step_size", "root_correction", "eps")
    types = (
        dict.fromkeys(("weight", "gradient", "exp_avg", "exp_avg_sq", "scale"), "*fp32")
        | {"compute_weight": f"*{dtype}"}
        | dict.fromkeys(floats, "fp32")
    )
    constants = {"block": adamw_kernels.BLOCK, "vector": adamw_kernels.VECTOR}
    yield Job("adamw", adamw_kernels.kernel, types, constants, adamw_kernels.WARPS)


def compiled(job: Job, capability: int) -> int:
    """Return the shared memory in bytes of one program; raises whatever Triton raises. Arguments
    without a given type are int32."""
    names = job.kernel.arg_names
    types = {name: job.types.get(name, "i32") for name in names if name not in job.constants}
    if "constants" in inspect.signature(ASTSource).parameters:  # Triton 3.2
        source = ASTSource(job.kernel, types, constants=job.constants)
    else:
        signature = {name: types.get(name, "constexpr") for name in names}
        constants = {(names.index(name),): value for name, value in job.constants.items()}
        aligned = {
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(names)
            if types.get(name, "").startswith("*")
        }
        source = ASTSource(job.kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": job.warps} | ({} if job.stages is None else {"num_stages": job.stages})
    return int(
        triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=options
        ).metadata.shared
    )


def main(argv: list[str] | None = None) -> int:
    """Compile, print a line for each kernel; returns 1 when one failed or needs too much memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpu",
        type=int,
        nargs="+",
        choices=GPUS,
        default=[80, 89, 90, 120],
        help="compute capability, times ten",
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256], help="head dims")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args(argv)
    bad = 0
    for capability in args.gpu:
        for dtype in args.dtypes:
            jobs = [
                (f"lightning {dim}{' packed' if docs else ''}", job)
                for dim in args.dims
                for docs in (False, True)
                for job in lightning(capability, dtype, dim, docs)
            ]
            jobs += [
                (group, job)
                for group, made in (("rows", rows), ("head", head), ("sums", sums))
                for job in made(dtype)
            ]
            for group, job in jobs:
                try:
                    shared = compiled(job, capability)
                    verdict = f"{shared} bytes" + (" OVER" if shared > GPUS[capability][1] else "")
                except Exception as error:
                    verdict = f"FAILED {type(error).__name__}: {str(error)[:200]}"
                bad += verdict.endswith("OVER") or verdict.startswith("FAILED")
                print(
                    f"triton {triton.__version__} sm_{capability} {dtype} {group}: {job.name}: "
                    f"{verdict}",
                    flush=True,
                )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
