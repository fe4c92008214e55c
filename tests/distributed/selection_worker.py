"""Run by torchrun: what the methods kl and gates compute, in float64 on one layout after the other.

    selection_worker FOLDER CASES      CASES: JSON list of {name, parallel}

One process writes FOLDER/selection.json; several compare their numbers with it and print the
largest relative differences.
"""

import json
import sys
from pathlib import Path

import torch

from megatron_hypenet.halo import build_stage
from megatron_hypenet.model.memory import release_memory
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.selection.comparison import Comparison, Rows
from megatron_hypenet.stages.selection.gated_layers import GatedModel
from megatron_hypenet.stages.selection.layer_sweep import swapped
from megatron_hypenet.supervision.process_exit import exit_process
from tests.distributed.layouts import SHAPE, TEACHER, run_config

GATES = [0.9, 0.1, 0.4, 0.35, 0.25]
GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(0, SHAPE["vocab_size"], (5, 13), generator=GENERATOR)
PREDICTED = torch.rand(5, 13, generator=GENERATOR) < 0.6
"""Rows and a length that no layout splits evenly."""


def computed(run, teacher):
    """Return the numbers of both methods by name."""
    mixers = AlignedMixers.from_teacher(teacher, run.align.spec, seed=run.seed)
    rows = Rows(TOKENS, PREDICTED, micro_batch_size=2)
    comparison = Comparison(teacher)
    reference = comparison.reference(rows)
    divergences = []
    for layer in range(TEACHER.num_layers):
        with swapped(teacher, layer, mixers):
            divergences.append(comparison.kl(reference))
    loss, gradient = GatedModel(teacher, mixers).loss_and_gradient(GATES, rows)
    return {"kl": divergences, "loss": [loss], "gradient": gradient}


def one(folder, case):
    run = run_config(folder / "unused", parallel=case["parallel"])
    groups.init_parallel(run.parallel, seed=run.seed)
    teacher = build_stage.load_teacher(run, folder / "teacher")
    found = computed(run, teacher)
    file = folder / "selection.json"
    if groups.world_size() == 1:
        file.write_text(json.dumps(found))
    else:
        want = json.loads(file.read_text())
        errors = {
            name: max(abs(a - b) for a, b in zip(values, want[name], strict=True))
            / max(map(abs, want[name]))
            for name, values in found.items()
        }
        worst = max(groups.gather_numbers(max(errors.values())))
        if groups.rank() == 0:
            print(json.dumps({"name": case["name"], "error": worst, **errors}), flush=True)
    del teacher
    release_memory()
    groups.destroy_model_groups()


if __name__ == "__main__":
    build_stage.compute_dtype = lambda run: torch.float64
    for each in json.loads(sys.argv[2]):
        one(Path(sys.argv[1]), each)
    exit_process(0)
