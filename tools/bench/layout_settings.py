"""Settings of layouts on two GPUs beside those that training uses: how DeepSpeed gathers weights
and reduces gradients under ZeRO-3, and the priority of NCCL's kernels.

    python tools/bench/layout_settings.py --out DIR         # two GPUs
    python tools/bench/layout_settings.py --tiny --out DIR  # two CPU processes, a tiny model

Stage 3 of HypeNet-2B at 16,384 tokens, 8 sequences a step, each setting in processes of its own.
Losses and norms are compared with those of the first setting of the layout, which starts from the
same weights. Writes layout_settings_<gpu>_<yyyymm>.{json,md}."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fresh_process import Row, report  # noqa: E402
from layout_case import PP, SP, TP, ZERO, case, run_case, work  # noqa: E402
from layout_tables import ONE_GPU, TIMING, failures, timing_lines  # noqa: E402

DIFFERENCE = "largest difference of loss, norm from the first of its layout"
ZERO3, TP2, PP2 = {ZERO: 3}, {TP: 2, SP: True}, {PP: 2}
MANY = 10**10
SMALL = 2**26
"""Gradients of a bucket that holds about one layer of HypeNet-2B."""
OVERLAP = {"overlap_comm": True}
PRIORITY = {"TORCH_NCCL_HIGH_PRIORITY": "1"}
SETTINGS = (
    ("ZeRO-3", ZERO3, {"zero": {"overlap_comm": False}}),
    ("ZeRO-3, overlap", ZERO3, {"zero": OVERLAP}),
    (
        "ZeRO-3, overlap, weights kept until backward",
        ZERO3,
        {
            "zero": {
                **OVERLAP,
                "stage3_max_live_parameters": MANY,
                "stage3_max_reuse_distance": MANY,
            }
        },
    ),
    ("TP2 + SP", TP2, {}),
    ("TP2 + SP, priority", TP2, {"environment": PRIORITY}),
    ("ZeRO-3, overlap, small buckets", ZERO3, {"zero": {**OVERLAP, "reduce_bucket_size": SMALL}}),
    (
        "ZeRO-3, overlap, MLPs whole",
        ZERO3,
        {"zero": {**OVERLAP, "leaf_module": {"classes": ["megatron_hypenet.model.mlp.SwiGLU"]}}},
    ),
    (
        "ZeRO-3, overlap, wide prefetch",
        ZERO3,
        {"zero": {**OVERLAP, "stage3_prefetch_bucket_size": 2 * 10**8}},
    ),
    ("PP2", PP2, {}),
)
"""Name, layout, and what differs from training: `zero` changes DeepSpeed's zero_optimization,
`environment` sets variables. Those that are worth most to know come first."""


def settings(tiny: bool) -> list[Row]:
    """Return the case of every setting, behind the one on one GPU."""
    sizes: dict[str, Any] = {"model": "tiny", "seq_length": 64} if tiny else {"seq_length": 16384}
    shared = {
        "stages": ("finetune",),
        "global_batch": 8,
        "steps": 3,
        "warmup": 1,
        "baseline": ONE_GPU,
        **sizes,
    }
    alone = case(ONE_GPU, TIMING, layout=ONE_GPU, processes=1, parallel={}, **shared)
    return [alone] + [
        case(
            name,
            TIMING,
            layout=name.split(",")[0],
            processes=2,
            parallel=parallel,
            **options,
            **shared,
        )
        for name, parallel, options in SETTINGS
    ]


@contextmanager
def applied(zero: dict[str, Any]) -> Iterator[None]:
    """Train with these entries of DeepSpeed's zero_optimization inside the block."""
    from megatron_hypenet.engine.deepspeed import engine

    usual = engine.config_dict

    def changed(*arguments: Any, **options: Any) -> dict[str, Any]:
        config = usual(*arguments, **options)
        config["zero_optimization"] |= zero
        return config

    with mock.patch.object(engine, "config_dict", changed):
        yield


def differences(rows: Sequence[Row], row: Row) -> str:
    """Return the largest relative differences of losses and norms from the first row of a
    layout."""
    first = next(other for other in rows if other["layout"] == row["layout"])
    (mine,), (firsts,) = row["measured"].values(), first["measured"].values()
    apart = (
        max(abs(a - b) / abs(a) for a, b in zip(firsts[key], mine[key], strict=True))
        for key in ("losses", "grad_norms")
    )
    return ", ".join(f"{value:.1e}" for value in apart)


def table(results: Sequence[Row]) -> str:
    """Return the Markdown report."""
    measured = [row for row in results if "failed" not in row]
    apart = {row["name"]: {DIFFERENCE: differences(measured, row)} for row in measured}
    return "\n\n".join(["\n".join(timing_lines(results, apart)), *failures(results)]) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on two CPU processes")
    parser.add_argument("--case", action="append", help="only settings with this in their name")
    parser.add_argument(
        "--profile", action="store_true", help="kernels of one more step, in the JSON file"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all settings")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        row = json.loads(options.work)
        with applied(row.get("zero", {})):
            work(row, options.out)
    end = time.monotonic() + 60 * options.minutes
    results = []
    for row in settings(options.tiny):
        if not options.case or any(part in row["name"] for part in options.case):
            found = run_case(
                __file__,
                {**row, "profile": options.profile},
                timeout=max(1.0, end - time.monotonic()),
                environment=row.get("environment"),
            )
            results.append(found)
            said = {key: found.get(key) for key in ("name", "measured", "failed")}
            print(json.dumps(said), flush=True)
    report(results, table, options.out, "layout_settings")


if __name__ == "__main__":
    main()
