"""The benchmark of settings trains with each of them, and compares what comes out."""

import json

import pytest

from tests.processes import tiny_benchmark


@pytest.mark.slow
@pytest.mark.distributed
def test_settings_of_a_layout_give_the_same_losses(tmp_path):
    names = ["ZeRO-3, overlap, small buckets", "ZeRO-3, overlap, MLPs whole"]
    words = [word for name in names for word in ("--case", name)]
    tiny_benchmark("layout_settings.py", tmp_path, *words)
    (file,) = tmp_path.glob("layout_settings_*.json")
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == names
    one, other = (row["measured"]["finetune"] for row in rows)
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert other["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-6)
    assert "| ZeRO-3, overlap, MLPs whole |" in next(tmp_path.glob("*.md")).read_text()
