"""Every parallel axis and pair of axes gives one process's numbers: losses, gradient norms and weights over five steps of each HALO stage.

Real stages from real checkpoints through the training loop and DeepSpeed in float32; the clipping threshold is below the gradient norms,
and one more run without clipping shows that no scale error hides behind it."""

import json

import pytest

from megatron_hypenet.checkpoint.load import read_manifest, read_weights, resolve
from megatron_hypenet.engine.metrics import read_losses
from tests.distributed.layouts import STAGES, start, write_models

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
LAYOUTS = {
    2: {
        "tp2": {TP: 2},
        "tp2-sp": {TP: 2, "sequence_parallel": True},
        "pp2": {PP: 2},
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
        "tp2-sp-pp2": {TP: 2, PP: 2, "sequence_parallel": True},
        "tp2-cp2": {TP: 2, CP: 2},
        "cp2-pp2": {CP: 2, PP: 2},
        "tp2-dp2-zero1": {TP: 2},
        "tp2-sp-dp2-zero3": {TP: 2, "sequence_parallel": True, "zero_stage": 3},
    },
}
VARIANTS = {"": {}, "free": {"stage_changes": {"clip_grad": 0.0}}}
"""As the tests' settings are, and without clipping."""


def cases(layouts, variants):
    return [
        {"name": name + ("-" + kind if kind else ""), "stage": stage, "parallel": parallel, **changes}
        for name, parallel in layouts.items()
        for kind, changes in variants.items()
        for stage in STAGES
    ]


def finished(processes, folder, wanted):
    result = start(processes, str(folder), json.dumps(wanted))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, and the runs of one process that all others are compared with."""
    root = tmp_path_factory.mktemp("parity")
    write_models(root)
    finished(1, root, cases({"one": {}}, VARIANTS))
    return root


def differences(want, got):
    """Largest difference of losses and gradient norms (relative) and of weights (absolute)."""
    pairs = list(zip(read_losses(want / "losses.jsonl"), read_losses(got / "losses.jsonl"), strict=True))
    assert len(pairs) == 5
    relative = {key: max(abs(a[key] - b[key]) / abs(a[key]) for a, b in pairs) for key in ("loss", "grad_norm")}
    first, second = read_weights(want / "checkpoints"), read_weights(got / "checkpoints")
    assert set(first) == set(second)
    return {**relative, "weights": max(float((first[name] - second[name]).abs().max()) for name in first)}


@pytest.mark.parametrize("processes", [2, 4])
def test_layouts_reproduce_one_process(folder, processes):
    layouts = LAYOUTS[processes]
    wanted = cases(layouts, {"": {}}) + cases(
        {name: layouts[name] for name in ("cp2-pp2", "tp2-sp") if name in layouts}, {"free": VARIANTS["free"]}
    )
    finished(processes, folder, wanted)
    table = {}
    for case in wanted:
        reference = "one" + case["name"].removeprefix(case["name"].removesuffix("-free"))
        table[case["name"], case["stage"]] = differences(folder / reference / case["stage"], folder / case["name"] / case["stage"])
    print(
        "\n".join(f"{name:20} {stage:9} " + "  ".join(f"{k} {v:.1e}" for k, v in found.items()) for (name, stage), found in table.items())
    )
    limits = {"loss": 1e-5, "grad_norm": 1e-4, "weights": 1e-4}
    too_far = {place: found for place, found in table.items() if any(not found[key] <= limits[key] for key in limits)}
    assert not too_far, too_far
    if processes == 4:
        assert read_manifest(resolve(folder / "pp4-uneven" / "align")).extra["pipeline_layout"] == [1, 2, 1, 1]
