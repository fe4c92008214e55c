"""The file of an evaluation, and its table."""

import json

import pytest

from megatron_hypenet.errors import DataError
from megatron_hypenet.eval.results import read_results, table


def row(model, task, score, **more):
    """Return one measurement."""
    return {"model": model, "measure": "m", "task": task, "score": score, "count": 1, **more}


def test_the_table_lines_up():
    rows = [
        row("a", "loss", 1.23456, length=2048),
        row("b", "loss", 2.0, length=2048),
        row("a", "needle", 100.0, length=2048, depth=0.5),
    ]
    assert table(rows).splitlines() == [
        "task    where                        a      b",
        "loss    2,048 tokens             1.235  2.000",
        "needle  2,048 tokens, depth 0.5  100.0",
    ]


def test_what_was_written_is_read_and_damage_is_named(tmp_path):
    file = tmp_path / "eval.json"
    rows = [row("a", "loss", 1.5, length=64), row("a", "quiz", 50.0, way="generation")]
    file.write_text(json.dumps({"plan": {"seed": 0}, "rows": rows}))
    assert read_results(file) == ({"seed": 0}, rows)
    for damage in ({"score": "high"}, {"count": -1}, {"model": 3}):
        file.write_text(json.dumps({"plan": {}, "rows": [{**rows[0], **damage}]}))
        with pytest.raises(DataError, match=str(file)):
            read_results(file)
