"""Time every kernel of Lightning Attention alone over launch parameters: the numbers in
`triton_plan.py` are chosen from this.

    python tools/bench/lightning_sweep.py --tokens 131072 --heads 16     # CUDA
    TRITON_INTERPRET=1 python tools/bench/lightning_sweep.py --tiny      # anywhere

One JSON line per kernel, way of reaching memory, number of segments and blocks: milliseconds, and
TB/s of the bytes the kernel must move. Every variant's result is compared with that of the present
plan first."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from lightning import median_ms  # noqa: E402

from megatron_hypenet.ops.decay import log_decay  # noqa: E402
from megatron_hypenet.ops.lightning_attn import triton as kernels  # noqa: E402
from megatron_hypenet.ops.lightning_attn.triton_plan import Blocks, Plan, round_up  # noqa: E402

SCANS = [
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 128, 8, 2),
    (64, 128, 8, 3),
    (64, 128, 8, 4),
    (128, 64, 4, 2),
    (64, 32, 4, 2),
]
STATES = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 3)]
FUSED = [(64, 128, 8, 1), (64, 128, 8, 2), (32, 128, 8, 3), (128, 128, 8, 1)]
Row = dict[str, Any]


class Sweep:
    """Inputs of one shape and a way to launch each kernel under any plan; every launch returns what
    it wrote."""

    def __init__(
        self, batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str
    ) -> None:
        generator = torch.Generator(device).manual_seed(4)
        draw = [
            torch.randn(batch, tokens, heads, dim, generator=generator, device=device).to(dtype)
            for _ in range(4)
        ]
        self.q, self.k, self.v, self.do = draw
        self.decay = kernels._log2_decay(log_decay(heads), self.q.device)
        self.scale = dim**-0.5
        self.device = device
        self.plan = kernels._plan(self.q, self.v)
        self.first, self.second = torch.empty_like(self.q), torch.empty_like(self.q)

    def states(self, plan: Plan) -> list[Tensor]:
        """Return the states of the segments, forward."""
        return [
            kernels._segment_states(
                self.k, self.v, self.decay, None, plan, reverse=False, always=True
            )
        ]

    def scan(self, plan: Plan) -> list[Tensor]:
        """Return o."""
        args = (None, None, self.decay, None, self.scale, plan)
        kernels._scan(
            self.q,
            self.k,
            self.v,
            self.first,
            self.entering,
            *args,
            reverse=False,
            transposed=False,
        )
        return [self.first]

    def dkdv(self, plan: Plan) -> list[Tensor]:
        """Return dk and dv, fused."""
        args = (None, None, self.decay, None, self.scale, plan, plan.dkdv)
        kernels._dkdv(
            self.q, self.k, self.v, self.do, self.first, self.second, self.entering, *args
        )
        return [self.first, self.second]

    def variants(self) -> Iterator[tuple[str, Plan, int]]:
        """Yield (kernel, plan, bytes it must move) over segments and blocks that differ from the
        present plan in one kernel."""
        tokens = self.q.shape[1]
        one = self.q.numel() * self.q.element_size()
        for factor in (1, 2, 3, 4):
            segment = round_up(-(-tokens // (factor * self.plan.num_segments)), 128)
            cut = dataclasses.replace(
                self.plan, segment_tokens=segment, num_segments=-(-tokens // segment)
            )
            for name, choices, moved in (
                ("states", STATES, 2),
                ("scan", SCANS, 4),
                ("dkdv", FUSED, 6),
            ):
                for choice in choices if factor == 1 else choices[:2]:
                    yield name, dataclasses.replace(cut, **{name: Blocks(*choice)}), moved * one

    def rows(self) -> Iterator[Row]:
        """Yield one row per variant; a variant that does not compile or does not fit says so."""
        for name, plan, moved in self.variants():
            launch, blocks = getattr(self, name), getattr(plan, name)
            row: Row = {"kernel": name, "segments": plan.num_segments, **dataclasses.asdict(blocks)}
            try:
                reverse = name == "dkdv"
                y, z = (self.q, self.do) if reverse else (self.k, self.v)
                self.entering = kernels._segment_states(
                    y, z, self.decay, None, plan, reverse=reverse
                )
                present = dataclasses.replace(plan, **{name: getattr(self.plan, name)})
                want = [x.clone() for x in launch(present)]
                row["error"] = max(
                    float((got - x).norm() / x.norm())
                    for got, x in zip(launch(plan), want, strict=True)
                )
                row["ms"] = median_ms(lambda launch=launch, plan=plan: launch(plan), self.device)
                row["tb_per_s"] = moved / row["ms"] / 1e9
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:120]}"
            yield row


def main(argv: list[str] | None = None) -> int:
    """Print the rows; with --out write them as one JSON file too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument(
        "--pointers",
        action="store_true",
        help="reach memory by pointers instead of Hopper's descriptors",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--tiny", action="store_true", help="one head, 256 tokens, fp16: for the interpreter"
    )
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.pointers:
        kernels._has_descriptors = lambda device: False
    shape = (
        (1, 256, 1, 128, torch.float16)
        if args.tiny
        else (args.batch, args.tokens, args.heads, args.dim, torch.bfloat16)
    )
    rows = []
    for row in Sweep(*shape, device).rows():
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
