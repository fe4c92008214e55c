"""Run by torchrun: one step's loss and gradients of each stage, and scores of whole sequences, in
float64 on one layout after the other.

    gradient_worker FOLDER CASES      CASES: JSON list of {name, stage, parallel, documents,
[answers]}

One process writes FOLDER/<stage>-<documents>[-answers][-<objective>].pt; several compare their
pieces with it and print the largest relative differences.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_hypenet.checkpoint.shards import tensor_pieces
from megatron_hypenet.engine.own_time import OwnTime
from megatron_hypenet.halo import build_stage
from megatron_hypenet.model.memory import release_memory
from megatron_hypenet.parallel import groups
from megatron_hypenet.supervision.process_exit import exit_process
from megatron_hypenet.training import schedule
from megatron_hypenet.training.micro_batches import step_batches
from tests.distributed.layouts import SHAPE, Tokens, run_config

IDS = torch.randint(0, SHAPE["vocab_size"], (3, 13), generator=torch.Generator().manual_seed(5))


def computed(stage, batches):
    """Compute the loss of the step; gradients are left in the parameters, whole ones as one process
    would have them."""
    if groups.pipeline_stage()[1] > 1:
        loss, _ = schedule._pipelined(stage, batches, train=True, clock=OwnTime())
    else:
        loss = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            part, _ = stage(batch)
            (part / len(batches)).backward()
            loss += part.detach() / len(batches)
    for parameter in stage.replicated_over_pipeline():
        dist.all_reduce(parameter.grad, group=groups.embedding_group())
    for parameter in stage.trainable_parameters().values():
        groups.all_reduce_mean(parameter.grad)
    return groups.sum_over_pipeline(groups.all_reduce_mean(loss.double()))


def pieces_of_gradients(stage):
    for parameter in stage.trainable_parameters().values():
        parameter.data = parameter.grad  # the pieces now describe gradients
    return [
        piece
        for entry in stage.sharded_state_dict().values()
        if entry.data is not None
        for piece in tensor_pieces(entry)
    ]


def place(full, piece):
    return full[
        tuple(
            slice(start, start + size)
            for start, size in zip(piece.global_offset, piece.local_shape, strict=True)
        )
    ]


def one(folder, case):
    run = run_config(
        folder / "unused",
        head_changes=case.get("head_changes"),
        align_changes=case.get("align_changes"),
        parallel=case["parallel"],
    )
    groups.init_parallel(run.parallel, seed=run.seed)
    name, documents = case["stage"], case["documents"]
    stage = build_stage.build_stage(
        name, run, teacher=folder / "teacher", init=None if name == "align" else folder / "student"
    )
    found = {}
    stage.train()
    if name == "finetune":
        nll, correct = stage.student.token_scores(IDS)
        with torch.no_grad():
            found = {"nll": nll, "correct": correct.double(), "logits": stage.student(IDS)}
    masked = case.get("answers", False)
    tokens = Tokens(answers_below=4 if masked else None)
    batches = step_batches(tokens, run.stage(name), 0, separate=documents)
    found["loss"] = computed(stage, batches)
    objective = case["head_changes"].get("objective")
    kind = f"-{objective['kind']}" if objective else ""
    file = folder / f"{name}-{documents}{'-answers' if masked else ''}{kind}.pt"
    pieces = pieces_of_gradients(stage)
    if dist.get_world_size() == 1:
        whole = {
            piece.key: torch.zeros(piece.global_shape, dtype=torch.float64) for piece in pieces
        }
        for piece in pieces:
            place(whole[piece.key], piece).copy_(piece.data)
        torch.save({**found, **{f"grad/{key}": value for key, value in whole.items()}}, file)
    else:
        want = torch.load(file, weights_only=True)
        pairs = [(key, value, want[key], want[key]) for key, value in found.items()]
        pairs += [
            (
                piece.key,
                piece.data,
                place(want[f"grad/{piece.key}"], piece),
                want[f"grad/{piece.key}"],
            )
            for piece in pieces
        ]
        errors = torch.tensor(
            [
                float((got - ref).abs().max() / (whole.abs().max() or 1.0))
                for _, got, ref, whole in pairs
            ]
        )
        where = pairs[int(errors.argmax())][0]
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(
            gathered, (float(errors.max()), where, sorted({piece.key for piece in pieces}))
        )
        missing = {key.removeprefix("grad/") for key in want if key.startswith("grad/")} - {
            key for *_, keys in gathered for key in keys
        }
        assert not missing, (
            f"{case['name']} {name}: no rank has the gradients of {sorted(missing)[:3]}"
        )
        if dist.get_rank() == 0:
            worst = max(gathered)
            print(
                json.dumps(
                    {
                        "name": case["name"],
                        "stage": name,
                        "documents": documents,
                        "error": worst[0],
                        "where": worst[1],
                    }
                ),
                flush=True,
            )
    del stage
    release_memory()
    groups.destroy_model_groups()


if __name__ == "__main__":
    build_stage.compute_dtype = lambda run: torch.float64
    torch.set_default_dtype(torch.float32)
    for each in json.loads(sys.argv[2]):
        one(Path(sys.argv[1]), each)
    exit_process(0)
