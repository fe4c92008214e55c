"""Layer selection by KL and by gates gives one process's numbers on every layout, in float64."""

import json

import pytest

from tests.distributed.layouts import write_models
from tests.distributed.test_parity import CHUNKS, CP, PP, TP, finished

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAYOUTS = {
    2: {
        "tp2": {TP: 2},
        "tp2-sp": {TP: 2, "sequence_parallel": True},
        "pp2": {PP: 2},
        "cp2": {CP: 2},
        "dp2": {"zero_stage": 3},
    },
    4: {
        "dp4": {},  # one rank has no rows
        "tp2-sp-pp2": {TP: 2, PP: 2, "sequence_parallel": True},
        "cp2-pp2-chunks": {CP: 2, PP: 2, CHUNKS: 2},
        "tp2-dp2": {TP: 2},
    },
}


def computed(processes, folder, layouts):
    """Return what the worker prints of each layout."""
    cases = [{"name": name, "parallel": parallel} for name, parallel in layouts.items()]
    said = finished(processes, folder, cases, "tests.distributed.selection_worker")
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Provide the teacher, and the numbers of one process."""
    root = tmp_path_factory.mktemp("selection")
    write_models(root)
    computed(1, root, {"one": {}})
    numbers = json.loads((root / "selection.json").read_text())
    assert min(numbers["kl"]) > 1e-3 and min(map(abs, numbers["gradient"])) > 1e-4
    return root


@pytest.mark.parametrize("processes", [2, 4])
def test_layouts_reproduce_one_process_in_float64(folder, processes):
    found = computed(processes, folder, LAYOUTS[processes])
    print("\n".join(map(str, found)))
    assert [row["name"] for row in found] == list(LAYOUTS[processes])
    assert [row for row in found if not row["error"] <= 1e-12] == []
