"""Layouts on two GPUs against one: the same numbers in bf16, how well context parallelism scales
stage 3, and the speed of the other layouts.

    python tools/bench/parallel.py --out DIR         # two GPUs: HypeNet-2B layers, 64K and 128K
    python tools/bench/parallel.py --tiny --out DIR  # anywhere: two CPU processes, a tiny model

Starts its own processes. Writes parallel_<gpu>_<yyyymm>.{json,md}. "Of one GPU" are the tokens/s of
each GPU over those of one GPU: with the same number of tokens of its own for context parallelism,
with the same steps for the other layouts. "By work" counts FLOPs instead of tokens, because a token
of a longer sequence attends to more."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fresh_process import Row, report  # noqa: E402
from layout_case import CHUNKS, CP, PP, SP, TP, ZERO, case, run_case, work  # noqa: E402
from layout_tables import (  # noqa: E402
    ONE_GPU,
    PARITY,
    TIMING,
    failures,
    parity_lines,
    timing_lines,
)

LAYOUTS = {
    ONE_GPU: (1, {}),
    "TP2 + SP": (2, {TP: 2, SP: True}),
    "PP2": (2, {PP: 2}),
    "PP2, 2 chunks": (2, {PP: 2, CHUNKS: 2}),
    "PP2, 4 chunks": (2, {PP: 2, CHUNKS: 4}),
    "CP2": (2, {CP: 2}),
    "CP2 ring": (2, {CP: 2, "context_parallel_method": "ring"}),
    "DP2 ZeRO-1": (2, {ZERO: 1}),
    "DP2 ZeRO-3": (2, {ZERO: 3}),
}
TIMED_ONLY = ("PP2, 4 chunks",)
"""The parity rows' models have too few layers for it."""
OTHERS = (ONE_GPU, "TP2 + SP", "PP2", "PP2, 2 chunks", "PP2, 4 chunks", "DP2 ZeRO-3", "DP2 ZeRO-1")
"""Layouts of the speed rows: steps of 8 sequences, as many on one GPU as on two."""


def cases(tiny: bool) -> list[Row]:
    """Return everything that is run, in order."""
    whole = {"model": "tiny"} if tiny else {"model": "hypenet_2b"}
    small = {**whole, "layers": 4, "changes": {} if tiny else {"vocab_size": 32768}}
    found = [
        case(
            f"parity, {name}",
            PARITY,
            layout=name,
            stages=("distill",) if tiny else ("distill", "finetune"),
            processes=processes,
            parallel=parallel,
            **small,
            seq_length=64 if tiny else 4096,
            global_batch=4,
            steps=4,
            warmup=0,
            by_name=True,
        )
        for name, (processes, parallel) in LAYOUTS.items()
        if (name in (ONE_GPU, "CP2") if tiny else name not in TIMED_ONLY)
    ]
    for total in (128,) if tiny else (65536, 131072):
        alone = f"{total // 2} tokens, {ONE_GPU}"
        for name, length in ((ONE_GPU, total // 2), ("CP2", total)):
            processes, parallel = LAYOUTS[name]
            found.append(
                case(
                    alone if name == ONE_GPU else f"{total} tokens, {name}",
                    TIMING,
                    layout=name,
                    stages=("finetune",),
                    processes=processes,
                    parallel=parallel,
                    **whole,
                    seq_length=length,
                    global_batch=1,
                    steps=2 if tiny else 5,
                    warmup=1 if tiny else 2,
                    recompute="full",
                    baseline=alone,
                    scales=True,
                )
            )
    length = 64 if tiny else 16384
    return found + [
        case(
            f"8 x {length} tokens, {name}",
            TIMING,
            layout=name,
            stages=("finetune",),
            processes=LAYOUTS[name][0],
            parallel=LAYOUTS[name][1],
            **whole,
            seq_length=length,
            global_batch=8,
            steps=3,
            warmup=1,
            baseline=f"8 x {length} tokens, {ONE_GPU}",
            scales=False,
        )
        for name in OTHERS
        if not tiny or CHUNKS not in LAYOUTS[name][1]
    ]


def group(row: Row) -> str:
    """Return the word of --only that chooses a case."""
    return PARITY if row["kind"] == PARITY else "efficiency" if row["scales"] else "speed"


def table(results: Sequence[Row]) -> str:
    """Return the Markdown report."""
    parts = (parity_lines(results), timing_lines(results), failures(results))
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on two CPU processes")
    parser.add_argument(
        "--only", default="", help="only cases of this kind: parity, efficiency or speed"
    )
    parser.add_argument("--stage", default="", help="only this stage")
    parser.add_argument("--layout", action="append", help="only this layout; can be repeated")
    parser.add_argument(
        "--profile", action="store_true", help="kernels of one more step, in the JSON file"
    )
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work), options.out)
    results = []
    for row in cases(options.tiny):
        stages = [name for name in row["stages"] if options.stage in ("", name)]
        wanted = options.only in ("", group(row)) and stages
        if wanted and (not options.layout or row["layout"] in options.layout):
            chosen = {**row, "stages": stages, "profile": options.profile}
            results.append(run_case(__file__, chosen))
            said = {key: results[-1].get(key) for key in ("name", "measured", "failed")}
            print(json.dumps(said), flush=True)
    report(results, table, options.out, "parallel")


if __name__ == "__main__":
    main()
