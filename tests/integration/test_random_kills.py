"""A whole run of two processes with saves in the background, killed at random moments, ends with
the bytes of a run that nothing disturbed.

HYPENET_RANDOM_KILLS is the number of kills (3), HYPENET_RANDOM_SEED their seed (printed).
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("HYPENET_RANDOM_KILLS", "3"))
SEED = int(os.environ.get("HYPENET_RANDOM_SEED", str(time.time_ns() % 10_000)))
STAGE = {
    "train_iters": 6,
    "seq_length": 64,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "lr": 1e-3,
    "min_lr": 1e-5,
    "warmup_iters": 1,
    "save_interval": 1,
    "log_interval": 1,
}


def write_config(root: Path, repo_root: Path) -> Path:
    teacher = repo_root / "assets" / "tiny-qwen3"
    for name, size in (("sample.txt", 60_000), ("heldout.txt", 40_000)):
        (root / name).write_bytes((teacher / name).read_bytes()[:size])
    small = {"recall_pairs": 2, "recall_sequences": 2, "heldout_sequences": 2, "seq_length": 64}
    values = {
        "output_dir": str(root / "unnamed"),
        "teacher": str(teacher),
        "align": STAGE,
        "distill": STAGE,
        "finetune": STAGE,
        "data": {
            "train": [str(root / "sample.txt")],
            "heldout": str(root / "heldout.txt"),
            "recall_fraction": 0.35,
            "recall_pairs": 2,
        },
        "select": {**small, "batch_size": 2},
        "eval": {**small, "length_multiples": [1]},
        "checkpoint": {"async_save": True, "keep_last": 2},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    return root / "run.yaml"


def start(config: Path, folder: Path, log: Path) -> subprocess.Popen:
    words = [
        sys.executable,
        "-m",
        "megatron_hypenet",
        "run",
        str(config),
        "--nproc",
        "2",
        f"output_dir={folder}",
    ]
    with log.open("ab") as stream:
        return subprocess.Popen(
            words, stdout=stream, stderr=stream, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def result(folder: Path) -> dict[str, str]:
    """Hash what a run leaves, but for what says when or where it was made."""
    stages = [folder / stage for stage in ("align", "distill", "finetune")]
    files = [stage / "losses.jsonl" for stage in stages]
    finals = [
        *(stage / "checkpoints" / "iter_0000006" for stage in stages),
        folder / "teacher",
        folder / "assembled",
    ]
    files += [
        file
        for final in finals
        for part in ("weights", "optimizer")
        for file in sorted((final / part).glob("*.distcp"))
    ]
    files += [final / "train_state.json" for final in finals[:3]]
    files += [path for path in sorted((folder / "export").rglob("*")) if path.is_file()]
    scores = json.loads((folder / "selection" / "scores.json").read_text())
    assert scores.pop("seconds") > 0
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    contents["selection/scores.json"] = json.dumps(scores).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def test_random_kills_change_no_byte_of_the_result(tmp_path, repo_root):
    print(f"seed {SEED}, {KILLS} kills")
    draw = random.Random(SEED)
    config = write_config(tmp_path, repo_root)
    log = tmp_path / "log"
    began = time.monotonic()
    assert start(config, tmp_path / "straight", log).wait() == 0, log.read_text()[-4000:]
    whole = time.monotonic() - began
    want = result(tmp_path / "straight")
    kills = []
    runs = 0
    while not runs or len(kills) < KILLS:
        folder = tmp_path / f"killed-{runs}"
        while True:
            process = start(config, folder, log)
            if len(kills) == KILLS:
                assert process.wait() == 0, log.read_text()[-4000:]
                break
            time.sleep(draw.uniform(0.1, 0.7) * whole)
            family = (
                [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                if process.poll() is None
                else []
            )
            if not family:
                assert process.returncode == 0, log.read_text()[-4000:]
                break
            victims = draw.choice([family, [draw.choice(family)], [draw.choice(family)]])
            whom = (
                "all"
                if len(victims) > 1
                else "the command"
                if victims[0].pid == process.pid
                else "a rank"
            )
            for victim in draw.sample(victims, len(victims)):
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended with the one before
                    victim.send_signal(signal.SIGKILL)
            kills.append(f"{whom} after {time.monotonic() - began:.0f} s")
            assert process.wait(120) != 0
            assert psutil.wait_procs(family, timeout=30)[1] == []
        assert result(folder) == want
        left = [path for path in folder.rglob("*") if ".tmp-" in path.name or ".old-" in path.name]
        assert left == []
        assert not (folder / "owner.json").exists()
        runs += 1
    print(f"{len(kills)} kills over {runs} runs: {'; '.join(kills)}; {len(want)} files byte-equal")
