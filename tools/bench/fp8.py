"""Transformer Engine's layers and FP8 beside this package's layers in bfloat16, on one GPU.

    python tools/bench/fp8.py --out DIR             # CUDA, with Transformer Engine
    python tools/bench/fp8.py --tiny --out DIR      # anywhere: shows that it works

Four parts (--part takes some of them):

- parity: losses of 20 steps of stage 2 from the same weights, local against Transformer Engine;
- teacher: KL and top-1 agreement of teachers in FP8 with themselves: the bundled one on its
  held-out text, and a random one of 1.7B on random tokens, whose logits are nearly flat;
- curves: 300 steps of stage 2 of the bundled teacher, from the same aligned student and data, in
  each precision, and the KL on held-out text behind them;
- steps: rows of step.py, each precision beside bfloat16.

Writes fp8_<gpu>_<yyyymm>.{json,md}. What Transformer Engine is needed for is left
out where it is not installed, and the report says so."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fresh_process import measured, report  # noqa: E402

PARTS = ("parity", "teacher", "curves", "steps")
RECIPES = ("current", "delayed", "blockwise")
LOCAL = {"impl": "local", "fp8_teacher": False, "fp8_student": None}
TE = {**LOCAL, "impl": "transformer_engine"}
SIZES = (
    {"stage": "align", "batch": 24, "seq_length": 512, "reference": 29_606.0, "teacher": True},
    {"stage": "distill", "batch": 12, "seq_length": 512, "reference": 14_969.0, "teacher": True},
    {
        "stage": "finetune",
        "batch": 1,
        "seq_length": 16_384,
        "reference": 17_042.0,
        "teacher": False,
    },
)
"""Steps of step.py, and the paper's code on the same card."""
GOAL = 1.2
"""Speed of stages 2 and 3 with FP8 over bfloat16's that was aimed at."""


def variants(stage: str, *, engine: bool) -> list[dict[str, Any]]:
    """Return what is measured of a stage: bfloat16, then each use of FP8; with `engine`, those of
    Transformer Engine too."""
    from megatron_hypenet.stages.spec import stage_spec

    beside = next(size["teacher"] for size in SIZES if size["stage"] == stage)
    found = [LOCAL, *([{**LOCAL, "fp8_teacher": True}] if beside else [])]
    if engine and stage_spec(stage).through_head:
        found += [TE, *({**TE, "fp8_teacher": beside, "fp8_student": name} for name in RECIPES)]
    return found


def precision(row: dict[str, Any]) -> str:
    """Return a variant in words."""
    parts = ["Transformer Engine" if row["impl"] != "local" else "local"]
    parts += ["FP8 teacher"] if row["fp8_teacher"] else []
    parts += [f"FP8 student ({row['fp8_student']})"] if row["fp8_student"] else []
    return ", ".join([*parts, *(["bf16"] if len(parts) == 1 else [])])


def parity(options: dict[str, Any]) -> dict[str, Any]:
    """Train 20 steps of stage 2 from the same weights in both implementations."""
    from random_stage import TimedSteps, build, model_config

    from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig
    from megatron_hypenet.parallel import groups

    parallel = ParallelConfig()
    groups.init_parallel(parallel)
    shape = model_config(options["model"], num_layers=options["layers"])
    config = HeadStageConfig(
        train_iters=20, seq_length=options["seq_length"], micro_batch_size=2, global_batch_size=4,
        lr=1e-4, min_lr=1e-4,
    )  # fmt: skip
    found: dict[str, Any] = {}
    for impl in ("local", "transformer_engine") if options["engine"] else ("local", "local"):
        steps = TimedSteps(
            build("distill", shape, config, parallel, by_name=True, impl=impl), config, parallel
        )
        steps.run(config.train_iters)
        found.setdefault("losses", []).append(steps.losses)
        found.setdefault("norms", []).append(steps.norms)
        steps.close()
    worst = max(abs(a - b) / abs(a) for a, b in zip(*found["losses"], strict=True))
    return {**found, "worst": worst}


def teacher(options: dict[str, Any]) -> dict[str, Any]:
    """Measure what FP8 does to one teacher's predictions."""
    import torch

    from megatron_hypenet.config.schema import ParallelConfig
    from megatron_hypenet.model.fp8_layers import fp8_divergence
    from megatron_hypenet.model.hypenet import build_model
    from megatron_hypenet.parallel import groups
    from megatron_hypenet.parallel.cpu import device

    groups.init_parallel(ParallelConfig())
    if options["model"] == "bundled":
        run, folder = converted(Path(options["folder"]))
        from megatron_hypenet.halo import build_stage, datasets

        model = build_stage.load_teacher(run, folder.teacher)
        ids = datasets.measure(run, folder).heldout(64, 256)[:, :-1].to(device())
    else:
        from random_stage import model_config

        from megatron_hypenet.config.mixers import default_mixer
        from megatron_hypenet.planning.layout_search import teacher_and_student

        shape, _ = teacher_and_student(model_config(options["model"]), default_mixer())
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        model = build_model(shape, ParallelConfig(), dtype=dtype, seed=1)
        drawn = torch.Generator().manual_seed(3)
        ids = torch.randint(0, shape.vocab_size, (4, 512), generator=drawn).to(device())
    kl, same = fp8_divergence(model, ids.split(1))
    return {"kl": kl, "same": same, "tokens": ids.numel()}


def converted(root: Path) -> tuple[Any, Any]:
    """Return the run of the bundled teacher up to the assembled student, and its folder; it is
    made where it is not there."""
    from megatron_hypenet.config.loader import load_run_config
    from megatron_hypenet.halo.run_folder import RunFolder

    words = [f"output_dir={root}", "distill.train_iters=10", "distill.warmup_iters=1"]
    config = str(ROOT / "configs" / "run" / "demo.yaml")
    if not (root / "assembled").is_dir():
        command = [sys.executable, "-m", "megatron_hypenet", "train", config, "--stage", "distill"]
        subprocess.run([*command, *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    run = load_run_config(config, words)
    return run, RunFolder(run.output_dir)


def curves(options: dict[str, Any]) -> dict[str, Any]:
    """Train stage 2 of the bundled teacher from the same student in each precision; keeps losses
    and what is measured on held-out text behind the steps."""
    from megatron_hypenet.model.memory import release_memory
    from megatron_hypenet.parallel import groups

    run, folder = converted(Path(options["folder"]))
    groups.init_parallel(run.parallel, seed=run.seed)
    found = []
    for variant in options["variants"]:
        found.append({**variant, **_curve(run, folder, variant, options["steps"])})
        release_memory()
    return {"curves": found}


def _curve(run: Any, folder: Any, variant: dict[str, Any], steps: int) -> dict[str, Any]:
    import torch

    from megatron_hypenet.config.computation import Fp8Config
    from megatron_hypenet.engine.deepspeed.engine import TrainingEngine
    from megatron_hypenet.halo import build_stage, datasets
    from megatron_hypenet.training.micro_batches import step_batches
    from megatron_hypenet.training.schedule import forward_backward

    config = run.distill.model_copy(update={"train_iters": steps})
    fp8 = Fp8Config(teacher=variant["fp8_teacher"], student=variant["fp8_student"])
    layers = run.model.model_copy(update={"transformer_impl": variant["impl"]})
    run = run.model_copy(update={"fp8": fp8, "model": layers})
    stage = build_stage.build_stage("distill", run, teacher=folder.teacher, init=folder.assembled)
    stage.train()
    engine = TrainingEngine(stage, config, run.parallel)
    data = datasets.training_data(run, folder)
    losses = []
    for step in range(steps):
        batches = step_batches(data, config, step * config.global_batch_size)
        losses.append(forward_backward(engine, batches)[0].double())
        engine.apply(config.lr * min(1.0, (step + 1) / 10))
    values = torch.stack(losses).tolist()
    heldout = datasets.measure(run, folder).quick(stage)
    engine.close()
    return {"losses": values, "last_50": sum(values[-50:]) / len(values[-50:]), "heldout": heldout}


TASKS = {"parity": parity, "teacher": teacher, "curves": curves}


def run_case(case: dict[str, Any], out: Path) -> None:
    """Measure one case in this process, with the versions that it ran on."""
    import platform

    import torch

    from megatron_hypenet.checkpoint.manifest import library_versions
    from megatron_hypenet.model.transformer_engine import PACKAGE, version_of
    from megatron_hypenet.supervision.process_exit import exit_process

    found = TASKS[case["part"]](case)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {**library_versions(), PACKAGE: version_of(PACKAGE)}
    out.write_text(json.dumps({**case, **found, "device": device, "versions": versions}))
    exit_process(0)


def cases(options: argparse.Namespace, engine: bool) -> list[dict[str, Any]]:
    """Return everything that is measured, by part."""
    tiny = options.tiny
    shape = (
        {"model": "tiny", "layers": None, "seq_length": 64}
        if tiny
        else {"model": "hypenet_2b", "layers": 4, "seq_length": 1024}
    )
    folder = str(options.out.resolve() / "bundled")
    found: list[dict[str, Any]] = [{"part": "parity", "engine": engine, **shape}]
    found += [
        {"part": "teacher", "model": name, "folder": folder}
        for name in ("bundled", "tiny" if tiny else "hypenet_2b")
    ]
    steps = 3 if tiny else options.steps
    # the bundled model's sizes are no blocks of 128
    chosen = [v for v in variants("distill", engine=engine) if v["fp8_student"] != "blockwise"]
    found.append({"part": "curves", "folder": folder, "steps": steps, "variants": chosen})
    for size in (size for size in SIZES if size["stage"] in options.stage.split(",")):
        small = {"model": "tiny", "batch": 2, "seq_length": 64, "steps": 2, "warmup": 1}
        fixed = {
            "part": "steps", "model": "hypenet_2b", "steps": 8, "warmup": 4,
            "micro_batches": 1, "profile": options.profile, "recompute": "none", "layers": None,
            "zero_stage": 1, "cuda_graphs": True, "mixer": "", "goal": None,
            **size, **(small if tiny else {}),
        }  # fmt: skip
        found += [{**fixed, **variant} for variant in variants(size["stage"], engine=engine)]
    return [case for case in found if case["part"] in options.part.split(",")]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown report."""
    about = next((row for row in results if "versions" in row), {"device": "-", "versions": {}})
    lines = ["# Transformer Engine and FP8", ""]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [f"{about['device']}, {versions}", ""]
    lines += _failures(results)
    for title, part, body in (
        ("Parity", "parity", _parity_lines),
        ("A teacher in FP8 beside itself", "teacher", _teacher_lines),
        ("Stage 2 of the bundled teacher", "curves", _curve_lines),
        ("Steps of HypeNet-2B", "steps", _step_lines),
    ):
        rows = [row for row in results if row["part"] == part and "failed" not in row]
        if rows:
            lines += [f"## {title}", "", *body(rows), ""]
    return "\n".join(lines)


def _failures(results: Sequence[dict[str, Any]]) -> list[str]:
    failed = [row for row in results if "failed" in row]
    return [
        f"Failed: {row['part']} {row.get('stage', row.get('model', ''))} "
        f"{precision(row) if 'impl' in row else ''}: {row['failed'].strip().splitlines()[-1:]}\n"
        for row in failed
    ]


def _parity_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    row = rows[0]
    first, last = row["losses"][0][0], row["losses"][0][-1]
    return [
        f"Largest relative difference of the losses of 20 steps of stage 2 in bf16 "
        f"({row['model']}, {row['layers'] or 'all'} layers; loss {first:.5f} to {last:.5f}): "
        f"**{row['worst']:.1e}** (limit 1e-4)."
    ]


def _teacher_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "| teacher | tokens | KL, nats per token | same first choice |",
        "|---|---|---|---|",
        *(f"| {r['model']} | {r['tokens']} | {r['kl']:.2e} | {r['same']:.2%} |" for r in rows),
    ]


def _curve_lines(results: Sequence[dict[str, Any]]) -> list[str]:
    rows = results[0]["curves"]
    marks = [mark for mark in (1, 50, 100, 200, 300) if mark <= len(rows[0]["losses"])]
    head = ["precision", *(f"step {mark}" for mark in marks), "mean of the last 50"]
    head += ["held-out loss", "accuracy %"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        values = [f"{row['losses'][mark - 1]:.4f}" for mark in marks] + [f"{row['last_50']:.4f}"]
        measured_on = [f"{value:.3f}" for value in list(row["heldout"].values())[:2]]
        lines.append(f"| {precision(row)} | {' | '.join(values + measured_on)} |")
    return lines


def _step_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| stage | batch x tokens | precision | CUDA graph | tokens/s | of bf16 | of the paper's "
        "code | MFU | of the peak of the precision used | memory GiB (estimate) | loss |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        base = next(r for r in rows if r["stage"] == row["stage"])["tokens_per_second"]
        use = [f"{row[key]:.1%}" if row[key] else "-" for key in ("mfu", "utilisation")]
        lines.append(
            f"| {row['stage']} | {row['batch']} x {row['seq_length']} | {precision(row)} | "
            f"{'yes' if row['replayed'] else 'no'} | {row['tokens_per_second']:.0f} | "
            f"{row['tokens_per_second'] / base:.3f} | {row['ratio']:.2f} | {' | '.join(use)} | "
            f"{row['memory_gib']:.1f} ({row['estimated_gib']:.1f}) | {row['losses'][-1]:.5f} |"
        )
    return [*lines, "", f"Goal of stages 2 and 3 with FP8: {GOAL} of bf16."]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on any machine")
    parser.add_argument("--part", default=",".join(PARTS), help="parts, joined by commas")
    parser.add_argument(
        "--stage",
        default=",".join(size["stage"] for size in SIZES),
        help="stages whose steps are timed",
    )
    parser.add_argument("--steps", type=int, default=300, help="steps of each curve")
    parser.add_argument("--profile", action="store_true", help="kernels of the steps too")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(json.loads(options.case), options.out)
    from megatron_hypenet.model.transformer_engine import import_fault

    engine = not (fault := import_fault())
    if fault:
        print(f"left out: Transformer Engine {fault}", flush=True)
    results = []
    for case in cases(options, engine):
        script = "step.py" if case["part"] == "steps" else Path(__file__).name
        flag = "--row" if case["part"] == "steps" else "--case"
        command = [sys.executable, str(Path(__file__).with_name(script)), flag, json.dumps(case)]
        results.append(measured(command, case))
        shown = ("tokens_per_second", "memory_gib", "worst", "kl", "same", "last_50", "failed")
        told = {key: results[-1][key] for key in shown if key in results[-1]}
        told["failed"] = told.get("failed", "")[-600:]
        name = f"{case['part']} {case.get('stage', '')} {case.get('model', '')}"
        print(name, precision(case) if "impl" in case else "", json.dumps(told), flush=True)
    report(results, table, options.out, "fp8")


if __name__ == "__main__":
    main()
