"""The Lightning mixer without its matrix products: q/k norm and RoPE, the scan, output norm and
gate; forward and backward.

    python tools/bench/mixer.py            # CUDA; fla-core for the reference's scan
    python tools/bench/mixer.py --tiny     # anywhere

Against the unfused formulation of the reference (arXiv 2601.22156) in plain torch: norms and RoPE
as separate steps, q, k and v cast to fp32 before FLA's kernel, its output cast back; eager, and as
torch.compile makes it. Errors are relative RMS against float64. Times are of calls from Python,
which the host bounds, and ("graph ms") of replays from a CUDA graph, which are the GPU's own."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import Panel, bars  # noqa: E402
from lightning import environment, median_ms, replayed  # noqa: E402

from megatron_hypenet.ops import lightning_mix  # noqa: E402
from megatron_hypenet.ops.decay import log_decay  # noqa: E402
from megatron_hypenet.ops.dtypes import accumulation_dtype  # noqa: E402
from megatron_hypenet.ops.gated_norm import gated_norm  # noqa: E402
from megatron_hypenet.ops.lightning_attn import chunked_lightning_attn, lightning_attn  # noqa: E402
from megatron_hypenet.ops.norm_rope import norm_rope  # noqa: E402
from megatron_hypenet.ops.rope import apply_rope  # noqa: E402

GOAL = 5.0
EPS = 1e-6
Mix = Callable[..., Tensor]


class Case:
    """Inputs of one shape: the fused projection [t, b, 4 h d] that a mixer receives, its three norm
    weights, RoPE angles."""

    def __init__(self, b: int, t: int, h: int, d: int, device: str, dtype: torch.dtype) -> None:
        self.name = f"B{b} T{t} H{h} D{d}"
        self.h = h
        self.d = d
        generator = torch.Generator(device).manual_seed(2)
        normal = lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)  # noqa: E731
        self.projected = normal(t, b, 4 * h * d)
        self.grad = normal(t, b, h * d)
        self.weights = [normal(d).abs() + 0.5, normal(d).abs() + 0.5, normal(h * d).abs() + 0.5]
        half = torch.arange(t)[:, None] * 1e6 ** -(torch.arange(d // 2) / (d // 2))
        self.angles = torch.cat((half, half), -1)[:, None, None].to(device, torch.float32)
        self.decay = log_decay(h)

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the leaves: projected, q weight, k weight, output weight."""
        return [
            x.detach().to(dtype, copy=True).requires_grad_()
            for x in (self.projected, *self.weights)
        ]

    def sections(self, projected: Tensor) -> list[Tensor]:
        """Return q, k, v [t, b, h, d] and gate [t, b, h d], views."""
        q, k, v, gate = projected.chunk(4, -1)
        return [*(x.unflatten(-1, (self.h, self.d)) for x in (q, k, v)), gate]


def ours(case: Case, projected: Tensor, wq: Tensor, wk: Tensor, wo: Tensor) -> Tensor:
    """Run the mixer as it is on one rank: one node of the graph where its kernels run, else step by
    step."""
    if lightning_mix.fits(projected, case.d):
        return lightning_mix.lightning_mix(
            projected, wq, wk, wo, case.angles, case.decay, scale=case.d**-0.5, eps=EPS
        )
    q, k, v, gate = case.sections(projected)
    q, k = norm_rope(q, wq, case.angles, EPS), norm_rope(k, wk, case.angles, EPS)
    o, _ = lightning_attn(*(x.transpose(0, 1) for x in (q, k, v)), case.decay, scale=case.d**-0.5)
    return gated_norm(o.transpose(0, 1).flatten(-2), gate, wo, EPS)


def unfused(case: Case, projected: Tensor, wq: Tensor, wk: Tensor, wo: Tensor, scan: Mix) -> Tensor:
    """Run the reference's order of steps: each one a pass over memory, the scan in fp32."""
    q, k, v, gate = case.sections(projected)
    q = apply_rope(F.rms_norm(q, (case.d,), wq, EPS), case.angles)
    k = apply_rope(F.rms_norm(k, (case.d,), wk, EPS), case.angles)
    accumulation = accumulation_dtype(q.dtype)
    o = scan(*(x.transpose(0, 1).to(accumulation) for x in (q, k, v))).to(q.dtype)
    return F.rms_norm(o.transpose(0, 1).flatten(-2), (case.h * case.d,), wo, EPS) * torch.sigmoid(
        gate
    )


def gradients(mix: Mix, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of projection and weights."""
    inputs = case.inputs(dtype)
    y = mix(case, *inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, case.grad.to(dtype))]


def mixers(case: Case, device: str) -> dict[str, Mix]:
    """Return our form and, where FLA is installed, the unfused form eager and compiled; elsewhere
    the unfused form over our torch scan."""
    scale = case.d**-0.5

    def torch_scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunked_lightning_attn(q, k, v, case.decay, scale=scale)[0]

    scan = torch_scan
    found = {"ours": ours}
    if device == "cuda":
        from fla.ops.simple_gla import chunk_simple_gla

        gamma = case.decay.float().to(device)

        def scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return chunk_simple_gla(q, k, v, g_gamma=gamma, scale=scale)[0]

    found["unfused"] = lambda *args: unfused(*args, scan=scan)
    if device == "cuda":
        found["unfused, compiled"] = torch.compile(found["unfused"])
    return found


def measure(case: Case, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return one row per form: errors against float64, milliseconds of forward and backward, ratio
    to ours."""
    decay = case.decay
    scale = case.d**-0.5
    exact = gradients(
        lambda *args: unfused(
            *args,
            scan=lambda q, k, v: chunked_lightning_attn(
                q, k, v, decay, scale=scale, chunk_size=128
            )[0],
        ),
        case,
        torch.float64,
    )
    rows = []
    for name, mix in mixers(case, device).items():
        found = gradients(mix, case, dtype)
        errors = [
            float((got.double() - want).norm() / want.norm())
            for got, want in zip(found, exact, strict=True)
        ]
        inputs = case.inputs(dtype)

        def step(mix: Mix = mix, inputs: list[Tensor] = inputs) -> None:
            torch.autograd.grad(mix(case, *inputs), inputs, case.grad)

        graph = replayed(step) if device == "cuda" else None
        replay = None if graph is None else median_ms(graph, device)
        row = {
            "shape": case.name,
            "form": name,
            "fwd+bwd ms": median_ms(step, device),
            "fwd+bwd graph ms": replay,
        }
        rows.append({**row, "error y": errors[0], "error dx": errors[1]})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    for row in rows:
        for way in ("fwd+bwd", "fwd+bwd graph"):
            mine = rows[0][f"{way} ms"]
            other = row[f"{way} ms"]
            row[f"{way}: ours is faster by"] = other / mine if mine and other else None
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write mixer_<gpu>_<yyyymm>.{json,md,png}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tiny", action="store_true", help="one small shape")
    parser.add_argument("--only", default="", help="only shapes whose name has this in it")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = (
        [(1, 16384, 16, 128), (1, 16384, 32, 128), (8, 512, 16, 128)]
        if device == "cuda" and not args.tiny
        else [(2, 40, 2, 32)]
    )
    about = environment(device, 0.0)
    cases = [
        case
        for case in (Case(*shape, device, torch.bfloat16) for shape in shapes)
        if args.only in case.name
    ]
    rows = [row for case in cases for row in measure(case, device, torch.bfloat16)]
    lines = [
        "# Lightning mixer without matrix products",
        "",
        ", ".join(f"{k} {v}" for k, v in about.items() if k != "copy_gbps"),
        "",
    ]
    lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += [
        "| "
        + " | ".join(f"{x:.4g}" if isinstance(x, float) else x or "" for x in row.values())
        + " |"
        for row in rows
    ]
    lines += ["", f"Goal: at least {GOAL}x over the unfused eager form."]
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = about["gpu"].replace("NVIDIA ", "").split()[0].lower()
    stem = args.out / f"mixer_{gpu}_{datetime.date.today():%Y%m}"
    stem.with_suffix(".json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ways = [way for way in ("fwd+bwd ms", "fwd+bwd graph ms") if any(row[way] for row in rows)]
    panels = [
        Panel(
            shape if way == ways[0] else "",
            way,
            {row["form"]: row[way] for row in rows if row["shape"] == shape},
        )
        for shape in dict.fromkeys(row["shape"] for row in rows)
        for way in ways
    ]
    bars(
        stem.with_suffix(".png"),
        f"Lightning mixer without matrix products, {about['gpu']}, {about['date']}",
        panels,
        columns=len(ways),
    )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
