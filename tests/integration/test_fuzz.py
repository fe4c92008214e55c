"""Random damage to every kind of foreign file: one clear error, in bounded time and memory, or an
input that was harmless.

The suite damages the same inputs every time, so that a change is judged by what it changed;
`make fuzz` draws a new seed and more inputs. The seed is printed; HYPENET_FUZZ_SEED sets it and
HYPENET_FUZZ_COUNT how many inputs each kind gets. One input again: `python -m tests.fuzz.worker
SEED COUNT KIND`, whose numbers are the same.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fuzz.subjects import SUBJECTS

SEED = 885392762
COUNT = 24
"""Inputs of each kind."""
WORKERS = 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_damage_is_accepted_or_ends_in_anything_but_one_error(repo_root):
    seed = os.environ.get("HYPENET_FUZZ_SEED") or str(SEED)
    count = int(os.environ.get("HYPENET_FUZZ_COUNT") or COUNT)
    kinds = list(SUBJECTS)
    hidden = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }

    def work(number):
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.worker",
            seed,
            str(count),
            *kinds[number::WORKERS],
        ]
        done = subprocess.run(
            command,
            cwd=repo_root,
            env={**os.environ, **hidden},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    with ThreadPoolExecutor(WORKERS) as pool:
        ended = list(pool.map(work, range(WORKERS)))
    rows = [row for _, found, _ in ended for row in found]
    outcomes = Counter((row["kind"], row["outcome"]) for row in rows)
    print(f"seed {seed}")
    for kind in kinds:
        print(
            f"  {kind}: "
            + ", ".join(
                f"{outcomes[kind, outcome]} {outcome}"
                for outcome in ("accepted", "refused", "FAULT")
            )
        )
    assert [code for code, _, _ in ended] == [0] * WORKERS, (
        f"seed {seed}: {[said[-3000:] for _, _, said in ended]}"
    )
    assert len(rows) == count * len(kinds)
    faults = [
        f"{row['kind']} {row['number']}: {row['did']}\n    {row['seen']}"
        for row in rows
        if row["outcome"] == "FAULT"
    ]
    assert not faults, f"seed {seed}: {len(faults)} of {len(rows)} inputs\n" + "\n".join(faults)
    assert all(outcomes[kind, "refused"] > count // 4 for kind in kinds), (
        "the damage is too harmless to tell anything"
    )
