"""Layouts on four and eight GPUs of one host: the same numbers in bf16 as on one, how well they
scale, HypeNet-9B, whole runs with a killed process, and beside each time what the cost model said.

    python tools/bench/many_gpus.py --gpus 8 --out DIR               # at most 9 minutes
    python tools/bench/many_gpus.py --predict                        # no GPU: predictions alone
    python tools/bench/many_gpus.py --gpus 4 --device cpu --out DIR  # CPU processes, tiny models

Each row has processes of its own. Rows that need more than --gpus are named and left out, and so
are those for which no time is left; --only and --case run some alone. Parity rows and whole runs,
whose time does not matter, share the GPUs and come first; timed rows then have the machine for
themselves. Writes many_gpus_<gpu>_<yyyymm>.{json,md,png}."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from estimates import Estimate, estimate_case  # noqa: E402
from figures import Panel  # noqa: E402
from fresh_process import Row, report  # noqa: E402
from layout_case import CHUNKS, CP, PP, SP, TP, ZERO, case, run_case, work  # noqa: E402
from layout_tables import (  # noqa: E402
    ONE_GPU,
    PARITY,
    TIMING,
    efficiency,
    failures,
    parity_lines,
    timing_lines,
)
from whole_runs import run_lines, whole_run  # noqa: E402

RUN = "run"
GROUPS = ("parity", "scaling", "9b", "runs")
TP2, PP2, CP2 = {TP: 2, SP: True}, {PP: 2}, {CP: 2}
PARITY_LAYOUTS = {
    ONE_GPU: (1, {}),
    "TP2 + SP": (2, TP2),
    "PP2": (2, PP2),
    "PP2, 2 chunks": (2, {**PP2, CHUNKS: 2}),
    "CP2": (2, CP2),
    "CP4": (4, {CP: 4}),
    "TP4 + SP": (4, {TP: 4, SP: True}),
    "TP2 x PP2": (4, {**TP2, **PP2}),
    "TP2 x PP2, 2 chunks": (4, {**TP2, **PP2, CHUNKS: 2}),
    "TP2 x CP2": (4, {**TP2, **CP2}),
    "PP2 x CP2": (4, {**PP2, **CP2}),
    "CP8": (8, {CP: 8}),
    "TP2 x PP2 x CP2": (8, {**TP2, **PP2, **CP2}),
    **{f"DP{n} ZeRO-{zero}": (n, {ZERO: zero}) for n in (2, 4, 8) for zero in (1, 2, 3)},
}
START_SECONDS = 25
"""Seconds that the processes of a row take until their first step."""
UNTIMED_SECONDS = {PARITY: 40, RUN: 120}
SHARED = 2
"""Untimed rows that run on one GPU at the same time."""
MACHINE_MINUTES = 9.0


def parity_cases(gpus: int, tiny: bool) -> Iterator[Row]:
    """Yield the rows that compare losses and norms with one GPU's."""
    model = "tiny" if tiny else "hypenet_06b"
    # four groups of keys can be split over four tensor-parallel processes
    changes = {"num_query_groups": 4} if tiny else {"vocab_size": 32768}
    for name, (processes, parallel) in PARITY_LAYOUTS.items():
        # smaller machines have rows of their own; on larger ones they would say nothing new
        if 1 < processes < min(gpus, 4) or (name.startswith("DP") and processes < gpus):
            continue
        yield case(
            f"parity, {name}",
            PARITY,
            group="parity",
            layout=name,
            stages=("align", "distill", "finetune"),
            processes=processes,
            parallel=parallel,
            model=model,
            layers=4,
            changes=changes,
            seq_length=128 if tiny else 4096,
            global_batch=8,
            steps=4,
            warmup=0,
            by_name=True,
        )


def timed(name: str, stage: str, group: str, processes: int, **more: object) -> Row:
    """Return a timed row."""
    settings = {"layout": name, "parallel": {}, "steps": 2, "warmup": 1, "global_batch": 1, **more}
    return case(name, TIMING, group=group, stages=(stage,), processes=processes, **settings)


def scaling_cases(gpus: int, tiny: bool) -> Iterator[Row]:
    """Yield the rows that time a layout, each group behind its row on one GPU."""
    model = {"model": "tiny", "changes": {"num_query_groups": 4}} if tiny else {}
    length = 64 if tiny else 65536
    alone = f"stage 3, {length} tokens, {ONE_GPU}"
    long = {**model, "recompute": "full", "baseline": alone}
    yield timed(alone, "finetune", "scaling", 1, seq_length=length, **long)
    for size, goal in ((2, 0.92), (4, 0.90), (8, 0.86)):
        if size >= min(gpus, 4):
            name = f"stage 3, {length} tokens a GPU, CP{size}"
            yield timed(
                name, "finetune", "scaling", size, parallel={CP: size}, seq_length=size * length,
                goal=goal, **long,
            )  # fmt: skip
    batch = 2 if tiny else 12
    alone = f"stage 2, {batch} x 512, {ONE_GPU}"
    short = {**model, "micro_batch": batch, "baseline": alone, "steps": 6, "warmup": 3}
    short["seq_length"] = 64 if tiny else 512
    yield timed(alone, "distill", "scaling", 1, global_batch=batch, **short)
    size = max(2, gpus)
    name = f"stage 2, {batch} x 512 a GPU, DP{size} ZeRO-1"
    yield timed(
        name, "distill", "scaling", size, global_batch=batch * size, goal=0.92, **short
    )  # fmt: skip
    length = 64 if tiny else 16384
    alone = f"stage 3, 8 x {length} tokens, {ONE_GPU}"
    several = {**model, "seq_length": length, "baseline": alone}
    yield timed(alone, "finetune", "scaling", 1, global_batch=8, **several)
    size = 2 if gpus == 2 else 4
    layouts = {f"TP{size} + SP": {TP: size, SP: True}, f"PP{size}": {PP: size}}
    if gpus == 2 and not tiny:  # of four stages the first holds more than 80 GB have room for
        for chunks in (2, 4):
            layouts[f"PP2, {chunks} chunks"] = {PP: 2, CHUNKS: chunks}
    for layout, parallel in layouts.items():
        name = f"stage 3, {4 * size} x {length} tokens, {layout}"
        goal = 0.93 if CHUNKS in parallel else None
        yield timed(
            name, "finetune", "scaling", size, parallel=parallel, global_batch=4 * size, goal=goal,
            **several,
        )  # fmt: skip


def large_cases(tiny: bool) -> Iterator[Row]:
    """Yield HypeNet-9B's stages 2 and 3 with the optimizer on eight GPUs."""
    model = {"model": "tiny"} if tiny else {"model": "hypenet_9b"}
    shared = {**model, "parallel": {ZERO: 2}, "start_seconds": 50}
    length, batch = (64, 1) if tiny else (512, 6)
    yield timed(
        "HypeNet-9B stage 2, ZeRO-2", "distill", "9b", 8, seq_length=length, micro_batch=batch,
        global_batch=16 * batch, recompute="selective", **shared,
    )  # fmt: skip
    yield timed(
        "HypeNet-9B stage 3, ZeRO-2", "finetune", "9b", 8, seq_length=64 if tiny else 16384,
        global_batch=16, recompute="full", **shared,
    )  # fmt: skip


def run_cases(gpus: int, tiny: bool) -> Iterator[Row]:
    """Yield the whole demo, and the demo with a killed process that is started again."""
    processes = min(gpus, 4)
    layout = {1: [], 2: ["--cp", "2"], 4: ["--pp", "2", "--cp", "2"]}[processes]
    words = [*layout, "distill.save_interval=100"]
    kill_at = 250
    if tiny:
        words = [*layout, "align.train_iters=6", "distill.train_iters=12", "finetune.train_iters=2"]
        words += ["align.warmup_iters=1", "distill.warmup_iters=1", "distill.save_interval=4"]
        words += ["eval.recall_sequences=2", "eval.heldout_sequences=2", "device=cpu"]
        words += ["select.recall_sequences=2", "select.heldout_sequences=2"]
        kill_at = 6
    for kill in (False, True):
        name = "demo, one process killed and resumed" if kill else "demo"
        yield {
            "name": f"{name}, {processes} processes",
            "kind": RUN,
            "group": "runs",
            "processes": processes,
            "words": words,
            "kill": kill,
            "kill_at": kill_at,
        }


def cases(gpus: int, tiny: bool) -> list[Row]:
    """Return every row for a machine of `gpus`, those that need more too: untimed ones first."""
    return [
        *run_cases(gpus, tiny),
        *parity_cases(gpus, tiny),
        *scaling_cases(gpus, tiny),
        *large_cases(tiny),
    ]


class Session:
    """Runs rows on the GPUs of one machine until its time is over."""

    def __init__(self, gpus: int, minutes: float, cpu: bool) -> None:
        self.gpus = gpus
        self.cpu = cpu
        self._end = time.monotonic() + 60 * minutes
        self._users = dict.fromkeys(range(gpus), 0)

    def run(self, rows: Sequence[Row]) -> list[Row]:
        """Return every row with what was measured, `failed`, or `skipped`; in the same order."""
        found: dict[str, Row] = {}
        fitting = []
        for row in rows:
            if row["processes"] > self.gpus:
                found[row["name"]] = {**row, "skipped": f"needs {row['processes']} GPUs"}
            else:
                fitting.append(row)
        found |= self._together([row for row in fitting if row["kind"] != TIMING])
        for row in (row for row in fitting if row["kind"] == TIMING):
            found[row["name"]] = self._one(row, range(row["processes"]))
        return [found[row["name"]] for row in rows]

    def _together(self, rows: Sequence[Row]) -> dict[str, Row]:
        """Run untimed rows, as many at once as there is room for."""
        found: dict[str, Row] = {}
        running: dict[Future[Row], Sequence[int]] = {}
        with ThreadPoolExecutor(max(1, len(rows))) as pool:
            waiting = list(rows)
            while waiting or running:
                while waiting and (devices := self._free(waiting[0]["processes"])):
                    for device in devices:
                        self._users[device] += 1
                    running[pool.submit(self._one, waiting.pop(0), devices)] = devices
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    for device in running.pop(future):
                        self._users[device] -= 1
                    result = future.result()
                    found[result["name"]] = result
        return found

    def _free(self, count: int) -> list[int]:
        """Return GPUs with room for another untimed row, the emptiest; none when there are too
        few."""
        most = 1 if self.cpu else SHARED
        free = sorted((users, gpu) for gpu, users in self._users.items() if users < most)
        return sorted(gpu for _, gpu in free[:count]) if len(free) >= count else []

    def _one(self, row: Row, devices: Sequence[int]) -> Row:
        """Run one row on these GPUs if the time that it needs is left."""
        left = self._end - time.monotonic()
        if left < needed_seconds(row, self.cpu):
            result = {**row, "skipped": f"{left:.0f} s were left"}
        else:
            visible = "" if self.cpu else ",".join(map(str, devices))
            environment = {"CUDA_VISIBLE_DEVICES": visible}
            result = (
                whole_run(row, environment, left)
                if row["kind"] == RUN
                else run_case(__file__, row, timeout=left, environment=environment)
            )
        outcome = next((key for key in ("failed", "skipped") if key in result), "done")
        after = time.monotonic() - self._end + left
        print(f"{row['name']}: {outcome} after {after:.0f} s", flush=True)
        return result


def needed_seconds(row: Row, cpu: bool = False) -> float:
    """Return the seconds that a row is expected to take."""
    if cpu:
        return 0.0
    if row["kind"] != TIMING:
        return UNTIMED_SECONDS[row["kind"]]
    steps = row["steps"] + row["warmup"]
    return row.get("start_seconds", START_SECONDS) + 1.2 * steps * estimate_case(row).time.total


def predictions(rows: Sequence[Row]) -> dict[str, Mapping[str, str]]:
    """Return what the cost model says of each timed row, by its name: columns of a table."""
    timed_rows = [row for row in rows if row["kind"] == TIMING]
    found = {row["name"]: estimate_case(row) for row in timed_rows}
    return {
        row["name"]: _said(found[row["name"]], found.get(row["baseline"])) for row in timed_rows
    }


def _said(mine: Estimate, one: Estimate | None) -> dict[str, str]:
    share = "-" if one is None else f"{mine.flops_per_second / one.flops_per_second:.1%}"
    return {
        "predicted ms": f"{1e3 * mine.time.total:.0f}",
        "predicted tokens/s/GPU": f"{mine.tokens_per_second:.0f}",
        "predicted by work": share,
        "predicted GiB": f"{mine.gib:.1f}",
        "most of the predicted step": mine.time.shares(0.04),
    }


def prediction_table() -> str:
    """Return the report of --predict: the timed rows of four and of eight GPUs."""
    rows = {row["name"]: row for gpus in (4, 8) for row in scaling_cases(gpus, tiny=False)}
    rows |= {row["name"]: row for row in large_cases(tiny=False)}
    said = predictions(list(rows.values()))
    columns = list(next(iter(said.values())))
    lines = [
        "# Layouts on four and eight H100s: predictions",
        "",
        "Nothing on this page was measured. `python tools/bench/many_gpus.py --predict` asks the "
        "cost model",
        "(`megatron_hypenet/planning/`) for the timed rows that the script has for four and for "
        "eight GPUs of",
        "one host, in bf16. HypeNet-2B unless named; memory is that of the first pipeline stage. "
        "By work: the",
        "FLOP/s of each GPU over those of one GPU alone.",
        "",
        "| row | GPUs | tokens x sequences | goal | " + " | ".join(columns) + " |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for name, row in rows.items():
        goal = f"{row['goal']:.0%}" if row["goal"] else ""
        cells = [name, str(row["processes"]), f"{row['seq_length']} x {row['global_batch']}", goal]
        lines.append("| " + " | ".join([*cells, *said[name].values()]) + " |")
    return "\n".join(lines) + "\n"


def table(results: Sequence[Row]) -> str:
    """Return the Markdown report."""
    ran = [row for row in results if "skipped" not in row]
    said = predictions(ran) if any("H100" in row.get("device", "") for row in ran) else None
    about = next((row for row in ran if "device" in row), None)
    parts = [
        ["# Layouts on several GPUs"],
        [] if about is None else [f"{about['device']}, torch {about['torch']}, bf16 on GPUs"],
        parity_lines(ran),
        timing_lines(ran, said),
        run_lines([row for row in ran if row["kind"] == RUN]),
        [f"- not run: {row['name']} ({row['skipped']})" for row in results if "skipped" in row],
        failures(ran),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def panels(results: Sequence[Row]) -> list[Panel]:
    """Return the efficiency by work of every layout that was timed beside one GPU, with its
    goal."""
    values: dict[str, float | None] = {}
    for row in results:
        if row["kind"] == TIMING and "measured" in row and row["layout"] != row["baseline"]:
            shares = efficiency(results, row)
            if shares is not None:
                values[row["name"]] = 100 * shares[1]
    return [Panel("FLOP/s of each GPU over those of one GPU alone", "%", values)] if values else []


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--gpus", type=int, choices=(1, 2, 4, 8), default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=MACHINE_MINUTES, help="time for all rows")
    parser.add_argument("--only", choices=GROUPS, action="append", help="only these groups of rows")
    parser.add_argument("--case", action="append", help="only rows with this in their name")
    parser.add_argument("--predict", action="store_true", help="print predictions; runs nothing")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work), options.out)
    if options.predict:
        print(prediction_table(), end="")
        return
    if options.out is None:
        parser.error("--out DIR is needed, or --predict")
    tiny = options.device == "cpu"
    rows = [
        row
        for row in cases(options.gpus, tiny)
        if (not options.only or row["group"] in options.only)
        and (not options.case or any(part in row["name"] for part in options.case))
    ]
    results = Session(options.gpus, options.minutes, tiny).run(rows)
    figure = ("Layouts on several GPUs", panels(results))
    report(results, table, options.out, "many_gpus", figure=figure)


if __name__ == "__main__":
    main()
