"""Lightning Attention against its peers on one GPU: first correctness, then time, in one run.

    python tools/bench/lightning.py                  # CUDA: all rows; fla-core for the peer
    python tools/bench/lightning.py --only D64,fp32  # rows whose name holds one of these words
    python tools/bench/lightning.py --tiny --out D   # anywhere: small shapes, no peer

Writes lightning_<gpu>_<yyyymm>.{json,csv,md,png} to --out. The peer is
`fla.ops.simple_gla.chunk_simple_gla` with `g_gamma`, called directly, its tuning forgotten before
each shape (its keys leave out the length). Errors are relative RMS against the recurrence in
float64, chunked, head by head. Roofline: each input read once, each output written once, at the
copy bandwidth of the same run.

Small shapes are over before the host has launched them. So each time is given twice: called from
Python ("ms"), and replayed from a CUDA graph ("graph ms"), as small micro-batches train; the latter
is the GPU's own.

Before its first row the peer compiles for minutes, one kernel after the other. Processes with
different --only, started beside each other and thrown away, fill Triton's cache sooner; time alone
afterwards.

One file: a benchmark is run and read by itself."""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_hypenet.ops.decay import log_decay  # noqa: E402
from megatron_hypenet.ops.lightning_attn import chunked_lightning_attn, lightning_attn  # noqa: E402

Op = Callable[[Tensor, Tensor, Tensor], Tensor]
EXACT_FP32 = "ours, full fp32"
OUTPUTS = ("o", "dq", "dk", "dv")
GOALS = {"fwd": 2.0, "fwd+bwd": 2.8}
WAYS = (*GOALS, *(f"{key} graph" for key in GOALS))
NOISE = 1.01
"""Errors this much apart are equal: rounding the results alone gives nearly all of them."""
ROUNDS = 3
"""Each time is the least of so many medians: the host of a virtual machine may be at half its speed
for tenths of a second."""
GOAL_SHAPES = ("B1 T131072 H16", "B1 T131072 H32")


@dataclass(frozen=True)
class Shape:
    """One row of the table: batch, tokens, heads, head dim, dtype, and tokens per packed document
    (None: one per row)."""

    b: int
    t: int
    h: int
    d: int = 128
    dtype: torch.dtype = torch.bfloat16
    document: int | None = None

    @property
    def name(self) -> str:
        """Return the shape's name as it is printed."""
        packed = f" of {self.document}" if self.document else ""
        head = "" if self.d == 128 else f" D{self.d}"
        return f"B{self.b} T{self.t}{packed} H{self.h}{head}" + (
            " fp32" if self.dtype == torch.float32 else ""
        )

    @property
    def floor_bytes(self) -> tuple[int, int]:
        """Return the fewest bytes of forward, and of forward and backward: 4 and 11 tensors."""
        one = self.b * self.t * self.h * self.d * self.dtype.itemsize
        return 4 * one, 11 * one


TABLE = [
    Shape(1, 131072, 16),
    Shape(1, 131072, 32),
    Shape(8, 512, 16),
    Shape(1, 2048, 16),
    Shape(1, 16384, 16),
    Shape(1, 16384, 32),
    Shape(2, 16384, 16),
    Shape(4, 4096, 64),
    Shape(1, 8192, 96),
    Shape(8, 16384, 32),
    Shape(1, 49152, 16, document=512),
    Shape(8, 512, 16, dtype=torch.float32),
    Shape(1, 16384, 16, dtype=torch.float32),
    Shape(1, 16384, 16, d=64),
    Shape(1, 16384, 8, d=256),
]
TINY = [
    Shape(1, 70, 2, 16),
    Shape(2, 33, 3, 16, dtype=torch.float32),
    Shape(1, 64, 2, 16, document=24),
]


def draw(shape: Shape, device: str) -> list[Tensor]:
    """Draw q, k, v and the gradient of o: unit normal, q and k as their norms leave them."""
    generator = torch.Generator(device).manual_seed(11)
    size = (shape.b, shape.t, shape.h, shape.d)
    return [
        torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(shape.dtype)
        for _ in range(4)
    ]


def operators(shape: Shape, device: str) -> dict[str, Op]:
    """Return ours, the peer where it is installed and can run, and the torch form where it is not
    ours already."""
    decay = log_decay(shape.h)
    scale = shape.d**-0.5
    ids = None
    if shape.document:
        ids = (
            (torch.arange(shape.t, device=device) // shape.document)
            .int()
            .expand(shape.b, shape.t)
            .contiguous()
        )
    ops: dict[str, Op] = {
        "ours": lambda q, k, v: lightning_attn(q, k, v, decay, scale=scale, document_ids=ids)[0]
    }
    if device == "cpu":
        return ops
    if shape.dtype == torch.float32:
        ops[EXACT_FP32] = ops["ours"]
    if shape.b * shape.t * shape.h <= 2**18:
        ops["torch"] = lambda q, k, v: chunked_lightning_attn(
            q, k, v, decay, scale=scale, document_ids=ids
        )[0]
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return ops
    gamma = decay.float().to(device)
    edges = None
    if shape.document:
        assert shape.b == 1, "fla packs documents into one row"
        edges = torch.tensor([*range(0, shape.t, shape.document), shape.t], device=device)
    ops["fla"] = lambda q, k, v: chunk_simple_gla(
        q, k, v, g_gamma=gamma, scale=scale, cu_seqlens=edges
    )[0]
    return ops


def exact(shape: Shape, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Return o, dq, dk, dv of the float64 recurrence, one head at a time: [b, t, h, d], stored in
    fp32."""
    ids = None
    decay = log_decay(shape.h)
    parts = []
    if shape.document:
        ids = (torch.arange(shape.t, device=inputs[0].device) // shape.document).expand(
            shape.b, shape.t
        )
    for head in range(shape.h):
        q, k, v, do = (x[:, :, head : head + 1].double() for x in inputs)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        chunk = 256 if shape.t > 4096 else 64
        o, _ = chunked_lightning_attn(
            q, k, v, decay[head : head + 1], scale=shape.d**-0.5, document_ids=ids, chunk_size=chunk
        )  # fmt: skip
        parts.append([x.float() for x in (o.detach(), *torch.autograd.grad(o, (q, k, v), do))])
    return {
        name: torch.cat(tensors, dim=2)
        for name, tensors in zip(OUTPUTS, zip(*parts, strict=True), strict=True)
    }


def errors(op: Op, inputs: list[Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative RMS error of each output and gradient."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])
    o = op(q, k, v)
    found = (o.detach(), *torch.autograd.grad(o, (q, k, v), inputs[3]))
    return {
        name: float((got.float() - want[name]).norm() / want[name].norm())
        for name, got in zip(OUTPUTS, found, strict=True)
    }


def median_ms(call: Callable[[], Any], device: str) -> float:
    """Return the median time of a call: GPU events after a warm-up and with the cache flushed, or
    the clock on a CPU."""
    if device == "cuda":
        import triton.testing

        return float(triton.testing.do_bench(call, warmup=25, rep=120, return_mode="median"))
    call()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times)[1]


def replayed(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """Capture the call as one CUDA graph; None where it cannot be captured, as when it asks the
    host for something."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return None
    return graph.replay


def times(op: Op, inputs: list[Tensor], device: str) -> dict[str, float]:
    """Return the milliseconds of forward without gradients, and of forward and backward, called and
    (on a GPU) replayed."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])

    def forward() -> None:
        with torch.no_grad():
            op(q, k, v)

    def both() -> None:
        torch.autograd.grad(op(q, k, v), (q, k, v), inputs[3])

    calls: dict[str, Callable[[], Any]] = {"fwd ms": forward, "fwd+bwd ms": both}
    for key, call in list(calls.items()) if device == "cuda" else ():
        if (graph := replayed(call)) is not None:
            calls[key.replace("ms", "graph ms")] = graph
    rounds = [{key: median_ms(call, device) for key, call in calls.items()} for _ in range(ROUNDS)]
    return {key: min(found[key] for found in rounds) for key in calls}


def forget_tuning() -> None:
    """Clear the caches of every autotuner of the peer: each shape is tuned anew."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            for item in list(vars(module).values()):
                while item is not None:
                    if type(getattr(item, "cache", None)) is dict:
                        item.cache.clear()
                    item = (
                        getattr(item, "fn", None) if "triton" in str(type(item).__mro__) else None
                    )


def measure(shape: Shape, device: str, copy_gbps: float) -> list[dict[str, Any]]:
    """Return the rows of one shape, one per operator."""
    inputs = draw(shape, device)
    ops = operators(shape, device)
    rows = []
    want = exact(shape, inputs)
    for name, op in ops.items():
        forget_tuning()
        # the peer always multiplies fp32 as tf32; ours does where torch's switch allows it
        torch.set_float32_matmul_precision("highest" if name == EXACT_FP32 else "high")
        found = errors(op, inputs, want)
        row: dict[str, Any] = {"shape": shape.name, "op": name}
        row |= times(op, inputs, device)
        for key, floor in zip(GOALS, shape.floor_bytes, strict=True):
            row[f"{key} % of roofline"] = 100 * floor / copy_gbps / 1e6 / row[f"{key} ms"]
        rows.append(row | {f"error {key}": value for key, value in found.items()})
    peer = next((row for row in rows if row["op"] == "fla"), None)
    if peer is not None:
        for row in rows:
            ways = [way for way in WAYS if f"{way} ms" in peer and f"{way} ms" in row]
            row |= {f"{way} x fla": peer[f"{way} ms"] / row[f"{way} ms"] for way in ways}
    gc.collect()
    return rows


def copy_bandwidth(device: str) -> float:
    """Return the GB/s of a copy, bytes read plus bytes written."""
    x = torch.empty(2**30 if device == "cuda" else 2**22, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / 1e6 / median_ms(lambda: y.copy_(x), device)


def environment(device: str, copy_gbps: float) -> dict[str, Any]:
    """Return what the numbers depend on."""
    versions: dict[str, Any] = {"torch": torch.__version__}
    for package in ("triton", "fla"):
        try:
            versions[package] = __import__(package).__version__
        except (ImportError, AttributeError):
            versions[package] = None
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "gpu": gpu,
        "date": datetime.date.today().isoformat(),
        **versions,
        "copy_gbps": round(copy_gbps, 1),
    }


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the table for people, with the goals' verdicts."""
    lines = [
        "# Lightning Attention",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items()),
        "",
    ]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(key, row.get(key)) for key in keys) + " |")
    ours = [row for row in rows if row["op"] == "ours" and "fwd x fla" in row]
    peers = {row["shape"]: row for row in rows if row["op"] == "fla"}
    if ours:
        lines += ["", "## Goals", ""]
        for name in GOAL_SHAPES:
            for row in (row for row in ours if row["shape"] == name):
                for key, goal in GOALS.items():
                    ratio = row[f"{key} x fla"]
                    lines.append(
                        f"- {name} {key}: {ratio:.2f}x, goal {goal}x: "
                        f"{'met' if ratio >= goal else 'missed'}"
                    )
        slower = [
            f"{row['shape']} {way} ({row[f'{way} x fla']:.2f}x)"
            for row in ours
            for way in WAYS
            if row.get(f"{way} x fla", 1.0) < 1
        ]
        lines.append(f"- shapes slower than FLA: {', '.join(slower) or 'none'}")
        worst = max(
            (row[f"error {key}"] / peers[row["shape"]][f"error {key}"], row["shape"], key)
            for row in ours
            for key in OUTPUTS
        )
        verdict = "met" if worst[0] <= NOISE else "missed"
        lines.append(
            f"- errors at most FLA's: {verdict}; the largest against it is {worst[0]:.4f} of it "
            f"({worst[1]} {worst[2]})"
        )
    return "\n".join(lines) + "\n"


def _cell(key: str, value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return (
        f"{value:.2e}"
        if key.startswith("error")
        else f"{value:.3f}"
        if key.endswith("ms")
        else f"{value:.2f}"
    )


def plot(rows: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Plot the share of the memory roofline reached by each operator, both passes, per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes, ops = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "op"))
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 0.45 * len(shapes) + 1.5), sharey=True)
    for axis, key in zip(axes, GOALS, strict=True):
        for index, op in enumerate(ops):
            mine = {row["shape"]: row[f"{key} % of roofline"] for row in rows if row["op"] == op}
            height = 0.8 / len(ops)
            axis.barh(
                [place + index * height for place in range(len(shapes))],
                [mine.get(name, 0) for name in shapes],
                height,
                label=op,
            )
        axis.set_xlabel("% of the memory roofline (longer is faster)")
        axis.set_title(key)
    axes[0].set_yticks([place + 0.4 for place in range(len(shapes))], shapes)
    axes[0].invert_yaxis()
    axes[1].legend()
    figure.suptitle(f"Lightning Attention, {about['gpu']}, {about['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the four files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes only; the default without a GPU"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="WORDS",
        help="rows whose name holds one of these, commas between",
    )
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy_gbps = copy_bandwidth(device)
    about = environment(device, copy_gbps)
    rows = []
    shapes = [
        shape
        for shape in (TINY if args.tiny or device == "cpu" else TABLE)
        if any(word in shape.name for word in args.only.split(","))
    ]
    if not shapes:
        parser.error(f"--only {args.only}: no row's name holds it")
    for shape in shapes:
        found = measure(shape, device, copy_gbps)
        print(*map(json.dumps, found), sep="\n", file=sys.stderr, flush=True)
        rows += found
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = about["gpu"].replace("NVIDIA ", "").split()[0].lower()
    stem = args.out / f"lightning_{gpu}_{datetime.date.today():%Y%m}"
    stem.with_suffix(".json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    text = markdown(rows, about)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(rows, about, stem.with_suffix(".png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
