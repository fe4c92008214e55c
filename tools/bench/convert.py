"""Time and memory of `hypenet convert`, beside copying the same folder, on random weights.

    python tools/bench/convert.py --size 1.7b --out /tmp/bench

Makes a Hugging Face folder of Qwen3's shape with random bf16 weights under --work (removed at the
end; three times its size must be free), then in one run: `cp -r` and sync, import, export, both
comparisons of `verify`, and safetensors' own load and save. Each is a process of its own; wall time
is that of the process and of the `sync` behind it, CPU time and peak memory are the kernel's
(rusage of the child: ru_utime + ru_stime, ru_maxrss). Ratios are to cp in the same round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZES = {
    "tiny": (2, 64, 96, 4, True),
    "0.6b": (28, 1024, 3072, 16, True),
    "1.7b": (28, 2048, 6144, 16, True),
    "4b": (36, 2560, 9728, 32, True),
    "8b": (36, 4096, 12288, 32, False),
}
"""Layers, hidden size, FFN size, attention heads, tied head."""
VOCABULARY = 151936
FILE_BYTES = 5_000_000_000
_LOAD_SAVE = """
import os, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
source, target = map(Path, sys.argv[1:])
target.mkdir()
for file in sorted(source.glob("*.safetensors")):
    save_file(load_file(file), target / file.name, metadata={"format": "pt"})
"""

Row = dict[str, Any]


def write_model(folder: Path, size: str) -> None:
    """Write a Qwen3 folder with random weights, one file in memory at a time."""
    import torch
    from safetensors.torch import save_file

    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.export import hf_config, hf_folder, mapping

    layers, hidden, ffn, heads, tied = SIZES[size]
    config = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=2 if size == "tiny" else 8,
        kv_channels=16 if size == "tiny" else 128,
        vocab_size=512 if size == "tiny" else VOCABULARY,
        share_embeddings_and_output_weights=tied,
        mixer_types=("attn",) * layers,
        attn_use_rope=True,
        attn_use_output_gate=False,
    )
    folder.mkdir(parents=True)
    hf_folder.write_json(
        folder / "config.json", hf_config.hf_config_from_model(config, torch_dtype="bfloat16")
    )
    shapes = {name: entry.part_shape for entry in mapping.entries(config) for name in entry.hf}
    groups = hf_folder.plan_shards(
        ((name, 2 * math.prod(shape)) for name, shape in shapes.items()), FILE_BYTES
    )
    # one draw, rotated: random enough for hashes, and quick
    draw = torch.randn(1 << 24, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    where = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file = "model.safetensors" if len(groups) == 1 else file
        tensors = {}
        for at, name in enumerate(group):
            count = math.prod(shapes[name])
            values = draw.roll(7919 * at).repeat(-(-count // draw.numel()))[:count]
            tensors[name] = values.clone().view(shapes[name])
            where[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(groups) > 1:
        hf_folder.write_json(folder / hf_folder.INDEX, {"metadata": {}, "weight_map": where})


def timed(name: str, command: Sequence[str], log: Path) -> Row:
    """Run a command and a sync; seconds, and the kernel's CPU seconds and peak memory of the
    command. SystemExit with its output when it fails."""
    started = time.monotonic()
    with log.open("wb") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    finished = time.monotonic()
    if child.returncode:
        raise SystemExit(f"{name} failed:\n{log.read_text()[-2000:]}")
    os.sync()
    return {
        "name": name,
        "seconds": round(time.monotonic() - started, 4),
        "sync": round(time.monotonic() - finished, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def one_round(work: Path, workers: int | None, logits: bool) -> list[Row]:
    """Take all measurements once, in an order in which each reads from the page cache if it
    fits."""
    source, copy, ckpt, back = (work / name for name in ("hf", "copy", "ckpt", "back"))
    hypenet = [sys.executable, "-m", "megatron_hypenet", "convert"]
    threads = [] if workers is None else ["--workers", str(workers)]
    log = work / "log"
    rows = [timed("cp -r", ["cp", "-r", str(source), str(copy)], log)]
    shutil.rmtree(copy)
    rows.append(timed("import", [*hypenet, "import", str(source), str(ckpt), *threads], log))
    rows.append(timed("export", [*hypenet, "export", str(ckpt), str(back), *threads], log))
    shutil.rmtree(back)
    verify = [*hypenet, "verify", str(source), str(ckpt), *threads]
    rows.append(timed("verify --tensors-only", [*verify, "--tensors-only"], log))
    if logits:
        rows.append(timed("verify", verify, log))
    shutil.rmtree(ckpt)
    command = [sys.executable, "-c", _LOAD_SAVE, str(source), str(copy)]
    rows.append(timed("safetensors load + save", command, log))
    shutil.rmtree(copy)
    for row in rows:
        row["ratio"] = round(row["seconds"] / max(rows[0]["seconds"], 1e-4), 2)
    return rows


def table(size: str, num_bytes: int, rounds: Sequence[Sequence[Row]]) -> str:
    """Return the report: a row per command, figures of all rounds side by side."""
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"Qwen3 {size} shape, random bf16 weights, {num_bytes / 1e9:.2f} GB, {cores} cores; load "
        f"average before each round: {', '.join(str(rows[0]['load']) for rows in rounds)}",
        "",
        "| command | seconds with sync | times cp | CPU seconds | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for row in zip(*rounds, strict=True):
        cells = (
            " / ".join(str(one[key]) for one in row)
            for key in ("seconds", "ratio", "cpu_seconds", "peak_mib")
        )
        lines.append(f"| {row[0]['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and print the table; with --out write it and the figures there too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.7b")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--no-logits", action="store_true", help="leave the models' logits out")
    parser.add_argument("--work", type=Path, default=Path("/tmp/hypenet-bench-convert"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only-make", action="store_true", help="write the model, measure nothing")
    options = parser.parse_args()
    if options.only_make:
        write_model(options.work, options.size)
        return
    if options.work.exists():
        raise SystemExit(f"{options.work} exists: remove it, or give another --work")
    try:
        # in a process of its own: the kernel counts the memory of this one to those it starts
        make = [sys.executable, __file__, "--only-make", "--size", options.size]
        source = options.work / "hf"
        subprocess.run([*make, "--work", str(source)], check=True)
        num_bytes = sum(path.stat().st_size for path in source.iterdir())
        os.sync()
        rounds = []
        for _ in range(options.rounds):
            load = os.getloadavg()[0]
            rows = one_round(options.work, options.workers, not options.no_logits)
            rows[0]["load"] = round(load, 2)
            rounds.append(rows)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    text = table(options.size, num_bytes, rounds)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"convert_{options.size}.md").write_text(text)
        (options.out / f"convert_{options.size}.json").write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
