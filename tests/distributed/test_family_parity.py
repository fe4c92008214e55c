"""Students of a teacher with biases of q, k and v and with scaled RoPE, on several processes:
gradients and scores of every stage in float64, and five training steps under ZeRO."""

import json

import pytest

from tests.distributed.layouts import write_models
from tests.distributed.test_parity import (
    GRADIENTS,
    LAYOUTS,
    LIMITS,
    cases,
    differences,
    finished,
    gradient_cases,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHAPE = {
    "add_qkv_bias": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
"""Norms of q and k stay: without them the bias of k shifts all scores of a query in a NoPE layer
alike, so its gradient is zero, and a relative error of it says nothing."""
SPLITS = ("tp2-sp", "pp2", "cp2")
ZERO = ("dp2-zero2", "dp2-zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Provide checkpoints, and what one process computes from them."""
    root = tmp_path_factory.mktemp("families")
    write_models(root, **SHAPE)
    finished(1, root, gradient_cases({"one": {}}), GRADIENTS)
    finished(1, root, cases({"one": {}}, {"": {}}, stages=("distill",)))
    return root


def test_losses_gradients_and_scores_agree_in_float64(folder):
    wanted = gradient_cases({name: LAYOUTS[2][name] for name in SPLITS})
    found = [
        json.loads(line)
        for line in finished(2, folder, wanted, GRADIENTS).splitlines()
        if line.startswith("{")
    ]
    assert len(found) == len(wanted)
    assert [row for row in found if not row["error"] <= 1e-11] == []


def test_training_under_zero_reproduces_one_process(folder):
    wanted = cases({name: LAYOUTS[2][name] for name in ZERO}, {"": {}}, stages=("distill",))
    finished(2, folder, wanted)
    for case in wanted:
        found = differences(folder / "one" / "distill", folder / case["name"] / "distill")
        assert all(found[key] <= LIMITS[key] for key in LIMITS), (case["name"], found)
