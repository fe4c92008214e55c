"""Every parallel axis and pair of axes gives one process's numbers: losses, gradient norms and
weights over five steps of each HALO stage.

Real stages from real checkpoints through the training loop and DeepSpeed in float32; the clipping
threshold is below the gradient norms, and runs without clipping show that no scale error hides
behind it. Gradients of one step, with and without separate documents, and the scores of whole
sequences are compared in float64, where rounding hides nothing."""

import itertools
import json

import pytest
import torch

from megatron_hypenet.checkpoint.load import read_manifest, read_weights, resolve
from tests.distributed.layouts import STAGES, start, write_models
from tests.losses import read_losses

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TP = "tensor_model_parallel_size"
PP = "pipeline_model_parallel_size"
CP = "context_parallel_size"
CHUNKS = "virtual_pipeline_model_parallel_size"
LAYOUTS = {
    2: {
        "tp2": {TP: 2},
        "tp2-sp": {TP: 2, "sequence_parallel": True},
        "pp2": {PP: 2},
        "pp2-chunks-uneven": {PP: 2, CHUNKS: 2, "pipeline_layout": [1, 1, 2, 1]},
        "cp2": {CP: 2},
        "cp2-ring": {CP: 2, "context_parallel_method": "ring"},
        "dp2-zero1": {"zero_stage": 1},
        "dp2-zero2": {"zero_stage": 2},
        "dp2-zero3": {"zero_stage": 3},
        "dp2-zero2-offload": {"zero_stage": 2, "offload_optimizer": True},
    },
    4: {
        "pp4-uneven": {PP: 4, "pipeline_layout": [1, 2, 1, 1]},
        "cp4": {CP: 4},
        "tp2-pp2": {TP: 2, PP: 2},
        "tp2-sp-pp2-chunks": {TP: 2, PP: 2, CHUNKS: 2, "sequence_parallel": True},
        "tp2-cp2": {TP: 2, CP: 2},
        "cp2-pp2": {CP: 2, PP: 2},
        "cp2-pp2-chunks": {CP: 2, PP: 2, CHUNKS: 2},
        "tp2-dp2-zero1": {TP: 2},
        "tp2-sp-dp2-zero3": {TP: 2, "sequence_parallel": True, "zero_stage": 3},
    },
}
GRADIENTS = "tests.distributed.gradient_worker"
LIMITS = {"loss": 1e-5, "grad_norm": 1e-4, "weights": 3e-4, "weights_rms": 1e-5}
"""In float32. Adam divides a gradient by its own size, so where gradients are about as small as
their rounding errors a weight can differ by a part of the learning rate (at most 1% of the five
steps' sum, 0.03); such weights are few, which the root mean square shows."""
RECOMPUTE = {
    "tp2-sp": "selective",
    "dp2-zero3": "selective",
    "tp2-sp-pp2-chunks": "selective",
    "cp2-pp2-chunks": "full",
    "tp2-sp-dp2-zero3": "full",
}
"""Layouts whose stages 2 and 3 compute activations again in backward."""
ANSWERS = {2: ("tp2-sp", "pp2", "cp2", "dp2"), 4: ("tp2-cp2", "cp2-pp2")}
"""Layouts that also learn the answers of conversations alone; "dp2" is data parallelism only."""
OBJECTIVES = {
    "reverse_kl": {"kind": "reverse_kl"},
    "jensen_shannon": {"kind": "jensen_shannon", "beta": 0.3},
    "top_k": {"kind": "top_k", "k": 5},
    "forward_kl": {"kind": "forward_kl"},
}
"""What stage 3 minimises beside cross entropy; all but the last in stage 2 too."""
BESIDE_TEACHER = {2: ("tp2-sp", "pp2", "cp2"), 4: ("tp2-cp2",)}
"""Layouts of stage 3 beside a teacher with each objective; stage 2 has them on the first."""
VARIANTS = {"": {}, "free": {"stage_changes": {"clip_grad": 0.0}}}
"""As the tests' settings are, and without clipping."""


def cases(layouts, variants, stages=STAGES, **more):
    return [
        {
            "name": name + ("-" + kind if kind else ""),
            "stage": stage,
            "parallel": parallel,
            "head_changes": {"recompute": RECOMPUTE.get(name, "none")},
            **changes,
            **more,
        }  # fmt: skip
        for name, parallel in layouts.items()
        for kind, changes in variants.items()
        for stage in stages
    ]


def finished(processes, folder, wanted, module="tests.distributed.layout_worker"):
    result = start(processes, str(folder), json.dumps(wanted), module=module)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Provide checkpoints, and the runs of one process that all others are compared with."""
    root = tmp_path_factory.mktemp("parity")
    write_models(root)
    finished(1, root, cases({"one": {}}, VARIANTS))
    alone = {"one": {}}
    wanted = gradient_cases(alone) + answer_cases(alone) + objective_cases(alone)
    finished(1, root, wanted, GRADIENTS)
    return root


def differences(want, got):
    """Return the largest difference of losses and gradient norms (relative), largest and root mean
    square difference of weights."""
    pairs = list(
        zip(read_losses(want / "losses.jsonl"), read_losses(got / "losses.jsonl"), strict=True)
    )
    assert len(pairs) == 5
    relative = {
        key: max(abs(a[key] - b[key]) / abs(a[key]) for a, b in pairs)
        for key in ("loss", "grad_norm")
    }
    first, second = read_weights(want / "checkpoints"), read_weights(got / "checkpoints")
    assert set(first) == set(second)
    apart = torch.cat([(first[name] - second[name]).flatten() for name in first])
    return {
        **relative,
        "weights": float(apart.abs().max()),
        "weights_rms": float(apart.square().mean().sqrt()),
    }


@pytest.mark.parametrize("processes", [2, 4])
def test_layouts_reproduce_one_process(folder, processes):
    layouts = LAYOUTS[processes]
    unclipped = {name: layouts[name] for name in ("cp2-pp2", "tp2-sp") if name in layouts}
    wanted = cases(layouts, {"": {}}) + cases(unclipped, {"free": VARIANTS["free"]})
    finished(processes, folder, wanted)
    table = {}
    for case in wanted:
        reference = "one-free" if case["name"].endswith("-free") else "one"
        table[case["name"], case["stage"]] = differences(
            folder / reference / case["stage"], folder / case["name"] / case["stage"]
        )
    print(
        "\n".join(
            f"{name:20} {stage:9} " + "  ".join(f"{k} {v:.1e}" for k, v in found.items())
            for (name, stage), found in table.items()
        )
    )
    too_far = {
        place: found
        for place, found in table.items()
        if any(not found[key] <= LIMITS[key] for key in LIMITS)
    }
    assert not too_far, too_far
    if processes == 4:
        assert read_manifest(resolve(folder / "pp4-uneven" / "align")).extra["pipeline_layout"] == [
            1,
            2,
            1,
            1,
        ]


def gradient_cases(layouts, **more):
    return [
        {
            "name": name,
            "stage": stage,
            "parallel": parallel,
            "documents": documents,
            "head_changes": {"recompute": RECOMPUTE.get(name, "none")},
            **more,
        }  # fmt: skip
        for name, parallel in layouts.items()
        for stage in STAGES
        for documents in (False, True)
    ]


def answer_cases(layouts):
    """Return cases of stages 2 and 3 in which a part of the tokens counts; one of the two keeps
    documents apart."""
    wanted = gradient_cases(layouts, answers=True)
    return [
        case
        for case in wanted
        if case["stage"] != "align" and case["documents"] == (case["stage"] == "finetune")
    ]


def objective_cases(layouts):
    """Return cases of stages 2 and 3 with other objectives, a part of the tokens, and in stage 3
    documents apart."""
    first = next(iter(layouts))
    return [
        {
            "name": name,
            "stage": stage,
            "parallel": parallel,
            "documents": stage == "finetune",
            "answers": True,
            "head_changes": {"objective": objective},
        }
        for name, parallel in layouts.items()
        for kind, objective in OBJECTIVES.items()
        for stage in ("distill", "finetune")
        if stage == "finetune" or (name == first and kind != "forward_kl")
    ]


@pytest.mark.parametrize("processes", [2, 4])
def test_losses_gradients_and_scores_agree_in_float64(folder, processes):
    layouts = {
        name: parallel for name, parallel in LAYOUTS[processes].items() if "zero" not in name
    }
    masked = {name: layouts.get(name, {}) for name in ANSWERS[processes]}
    taught = {name: layouts[name] for name in BESIDE_TEACHER[processes]}
    wanted = gradient_cases(layouts) + answer_cases(masked) + objective_cases(taught)
    found = [
        json.loads(line)
        for line in finished(processes, folder, wanted, GRADIENTS).splitlines()
        if line.startswith("{")
    ]
    print(
        "\n".join(
            f"{row['name']:14} {row['stage']:9} documents {row['documents']!s:6} {row['error']:.1e}"
            for row in found
        )
    )
    assert len(found) == len(wanted)
    assert [row for row in found if not row["error"] <= 1e-12] == []


def test_answers_alone_and_other_objectives_give_another_loss(folder):
    """So the layouts above were compared with the mask and the objective in effect."""
    for stage, documents in (("distill", False), ("finetune", True)):
        losses = [
            torch.load(folder / f"{stage}-{documents}{kind}.pt", weights_only=True)["loss"]
            for kind in ("", "-answers", *(f"-answers-{objective}" for objective in OBJECTIVES))
            if kind != "-answers-forward_kl" or stage == "finetune"
        ]
        pairs = itertools.combinations(losses, 2)
        assert all(abs(one - other) > 1e-3 * one for one, other in pairs)
