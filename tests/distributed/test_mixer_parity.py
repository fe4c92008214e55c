"""The other mixers on the layouts of `test_parity.py`: gradients and scores of every stage in
float64, and five training steps under ZeRO."""

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

MIXERS = {
    "gated_delta_net": {},
    "kimi_delta_attention": {"conv": True, "conv_size": 3},
}
"""Settings that say most: grouped keys and values, a convolution that reads over chunk borders."""
SPLITS = {2: ("tp2-sp", "pp2", "cp2"), 4: ("cp4", "tp2-cp2", "cp2-pp2")}
SMALL_STEPS = {"stage_changes": {"lr": 1e-5, "min_lr": 1e-6}}
"""Adam's first step is the sign of the gradient, also of gradients that are rounding errors, and a
delta rule whose writes may overshoot (beta up to 2) amplifies what follows from them. At a learning
rate of 1e-4 one process differs by up to 1.8e-4 in the gradient norm from itself with other vector
instructions (ATEN_CPU_CAPABILITY=default or avx2), as much as every layout does; the first step
agrees to all digits."""
STEP_LIMITS = LIMITS | {
    "weights": LIMITS["weights"] / 10,
    "weights_rms": LIMITS["weights_rms"] / 100,
}
"""Five steps move a weight by up to 5e-5 here, a thousandth of what they do there. The root mean
square shrinks with that; a single weight whose first gradient changes its sign is 2e-5 apart."""
ZERO = {2: ("dp2-zero2", "dp2-zero3"), 4: ("tp2-sp-dp2-zero3",)}


@pytest.fixture(scope="module", params=MIXERS)
def world(request, tmp_path_factory):
    """Provide checkpoints of a student with the mixer, and what one process computes from them."""
    settings = MIXERS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    chosen = {"align_changes": {"mixer": request.param, "mixer_settings": settings}}
    write_models(root, request.param, settings)
    finished(1, root, gradient_cases({"one": {}}, **chosen), GRADIENTS)
    finished(1, root, cases({"one": {}}, {"": {}}, **chosen, **SMALL_STEPS))
    return root, chosen


@pytest.mark.parametrize("processes", [2, 4])
def test_losses_gradients_and_scores_agree_in_float64(world, processes):
    root, chosen = world
    layouts = {name: LAYOUTS[processes][name] for name in SPLITS[processes]}
    wanted = gradient_cases(layouts, **chosen)
    found = [
        json.loads(line)
        for line in finished(processes, root, wanted, GRADIENTS).splitlines()
        if line.startswith("{")
    ]
    assert len(found) == len(wanted)
    assert [row for row in found if not row["error"] <= 1e-11] == []


@pytest.mark.parametrize("processes", [2, 4])
def test_training_under_zero_reproduces_one_process(world, processes):
    root, chosen = world
    layouts = {name: LAYOUTS[processes][name] for name in ZERO[processes]}
    wanted = cases(layouts, {"": {}}, **chosen, **SMALL_STEPS)
    finished(processes, root, wanted)
    too_far = {}
    for case in wanted:
        found = differences(root / "one" / case["stage"], root / case["name"] / case["stage"])
        if any(not found[key] <= STEP_LIMITS[key] for key in STEP_LIMITS):
            too_far[case["name"], case["stage"]] = found
    assert not too_far, too_far
