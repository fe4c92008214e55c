"""Run by torchrun: train tiny stages on one layout after the other.

layout_worker FOLDER CASES      CASES: JSON list of {name, stage, parallel, [changes],
[stage_changes], [head_changes], [align_changes]}; results in FOLDER/<name>/<stage>
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from megatron_hypenet.errors import SavedAndRequeue
from megatron_hypenet.halo import build_stage
from megatron_hypenet.model.memory import release_memory
from megatron_hypenet.parallel import groups
from megatron_hypenet.supervision.process_exit import exit_process
from megatron_hypenet.training.loop import train
from tests.distributed.layouts import Tokens, run_config


def one(folder: Path, case: dict) -> None:
    run = run_config(
        folder / case["name"],
        case.get("stage_changes"),
        case.get("head_changes"),
        case.get("align_changes"),
        parallel=case["parallel"],
        **case.get("changes", {}),
    )
    groups.init_parallel(run.parallel, seed=run.seed)
    name = case["stage"]
    stage = build_stage.build_stage(
        name, run, teacher=folder / "teacher", init=None if name == "align" else folder / "student"
    )

    def on_step(record) -> None:
        if record.step == case.get("stop_after") and groups.rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(SavedAndRequeue):
        train(
            stage,
            Tokens(),
            run.stage(name),
            run,
            folder / case["name"] / name,
            extra={"pipeline_layout": list(stage.layout)},
            on_step=on_step,
        )
    del stage
    release_memory()
    groups.destroy_model_groups()


def main() -> None:
    folder = Path(sys.argv[1])
    cases = json.loads(sys.argv[2])
    for case in cases:
        began = time.monotonic()
        one(folder, case)
        if groups.rank() == 0:
            print(
                f"ran {case['name']} {case['stage']} in {time.monotonic() - began:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
    exit_process(0)
