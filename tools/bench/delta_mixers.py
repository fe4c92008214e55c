"""The delta-rule mixers, whole, forward and backward, beside flash-linear-attention's bare kernel
on inputs of the same shape in the same run; and the kernel's accuracy.

    python tools/bench/delta_mixers.py            # CUDA; needs fla-core
    python tools/bench/delta_mixers.py --tiny     # anywhere: a small shape, the torch form alone

A mixer includes its projections, norms, gates and the recurrence. "share" is the kernel's time in
the mixer's. Errors are relative RMS of outputs and gradients against chunks in float64. Writes
delta_mixers_<gpu>_<yyyymm>.{json,md} to --out."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fresh_process import report  # noqa: E402
from lightning import median_ms  # noqa: E402
from random_stage import model_config  # noqa: E402

from megatron_hypenet.checkpoint.manifest import library_versions  # noqa: E402
from megatron_hypenet.config.schema import ParallelConfig  # noqa: E402
from megatron_hypenet.model.hypenet import build_model  # noqa: E402
from megatron_hypenet.model.kernel_guard import use_of  # noqa: E402
from megatron_hypenet.ops.kernels import FAMILIES  # noqa: E402
from megatron_hypenet.parallel import groups  # noqa: E402

MIXERS = {
    "gated_delta_net": ("gated_delta_rule", "fla.ops.gated_delta_rule:chunk_gated_delta_rule"),
    "kimi_delta_attention": ("kimi_delta_attention", "fla.ops.kda:chunk_kda"),
}
"""Kernel family of a mixer, and fla's function."""
SHAPES = ((24, 512), (1, 16_384), (1, 65_536))


def kernel_ms(function: str, b: int, t: int, h: int, d: int, *, per_channel: bool) -> float:
    """Return the milliseconds of fla's kernel alone, forward and backward."""
    module, _, name = function.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    given = [torch.randn(b, t, h, d, device="cuda").bfloat16() for _ in range(3)]
    q, k = (torch.nn.functional.normalize(x.float(), dim=-1).bfloat16() for x in given[:2])
    decay = -torch.rand(b, t, h, *([d] if per_channel else []), device="cuda")
    inputs = [q, k, given[2], decay, torch.rand(b, t, h, device="cuda")]
    leaves = [x.detach().requires_grad_() for x in inputs]
    do = torch.randn_like(q)

    def step() -> Any:
        o, _ = kernel(*leaves, scale=d**-0.5)
        return torch.autograd.grad(o, leaves, do)

    return median_ms(step, "cuda")


def measure(name: str, b: int, t: int, *, tiny: bool) -> dict[str, Any]:
    """Measure one row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = model_config("tiny" if tiny else "hypenet_2b", num_layers=1)
    student = student.with_mixers((name,))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build_model(student, ParallelConfig(), dtype=dtype, seed=1)
    mixer = model.mixer(0)
    x = torch.randn(t, b, student.hidden_size, device=device).to(dtype).requires_grad_()
    angles = torch.rand(t, 1, 1, student.kv_channels, device=device)
    dy = torch.randn_like(x)
    leaves = [x, *mixer.parameters()]

    def step() -> Any:
        return torch.autograd.grad(mixer(x, rotary_pos_emb=angles)[0], leaves, dy)

    row: dict[str, Any] = {"mixer": name, "batch": b, "tokens": t}
    row["mixer ms"] = median_ms(step, device)
    _, function = MIXERS[name]
    if device == "cuda":
        h, d = student.num_attention_heads, student.kv_channels
        row["fla ms"] = kernel_ms(function, b, t, h, d, per_channel="kda" in function)
        row["share"] = row["fla ms"] / row["mixer ms"]
    return row


def accuracy(name: str) -> dict[str, Any]:
    """Return how far the kernel is off at the mixer's head size, with states in and out."""
    shape = model_config("hypenet_2b", num_layers=1).with_mixers((name,))
    model = build_model(shape, ParallelConfig(), dtype=torch.bfloat16, seed=1)
    use = replace(use_of(model, documents=False), thorough=True)
    found = FAMILIES[MIXERS[name][0]].check(torch.device("cuda"), use)
    measured = {"worst tensor": found.worst, "error": found.error, "limit": found.limit}
    return {"mixer": name, **measured, "check": "ok" if found.ok else str(found)}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown, under the versions they depend on."""
    rows = [row for row in results if "mixer" in row]
    versions = next((row["versions"] for row in results if "versions" in row), {})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    about = ", ".join(f"{key} {value}" for key, value in versions.items())
    lines = [about, "", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = (row.get(key, "") for key in keys)
        shown = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells)
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="a small shape, on any machine")
    parser.add_argument(
        "--shape",
        action="append",
        type=lambda text: tuple(map(int, text.split("x"))),
        help="BATCHxTOKENS, instead of all; fla tunes itself for minutes at each new shape",
    )
    parser.add_argument("--mixer", action="append", choices=list(MIXERS), help="only this one")
    options = parser.parse_args()
    groups.init_parallel(ParallelConfig())
    results: list[dict[str, Any]] = []
    for name in options.mixer or MIXERS:
        for b, t in ((2, 64),) if options.tiny else options.shape or SHAPES:
            try:
                results.append(measure(name, b, t, tiny=options.tiny))
            except Exception as error:  # a kernel that this GPU or Triton does not run
                said = str(error).splitlines()[0] if str(error) else ""
                failed = f"{type(error).__name__}: {said}"
                results.append({"mixer": name, "batch": b, "tokens": t, "failed": failed})
            print(json.dumps(results[-1]), flush=True)
        if torch.cuda.is_available():
            results.append(accuracy(name))
            print(json.dumps(results[-1]), flush=True)
    results.append({"versions": library_versions()})
    report(results, table, options.out, "delta_mixers")


if __name__ == "__main__":
    main()
