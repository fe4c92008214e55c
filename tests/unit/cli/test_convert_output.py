"""What every conversion prints: progress on stderr, one summary or one JSON object on stdout."""

import json
import time

from megatron_hypenet.cli import convert_output
from tests.tiny import tiny_teacher_config

RESULT = {"kind": "teacher", "tensors": 23, "dry_run": False, "source": "a", "destination": "b"}


def test_a_summary_names_the_model_and_the_result(capsys, tmp_path):
    convert_output.announce("reading", tmp_path)
    convert_output.finish(RESULT, tiny_teacher_config(), time.monotonic(), False)
    out, err = capsys.readouterr()
    assert err == f"reading {tmp_path}\n"
    assert (
        "teacher: 2 layers (2 softmax), hidden 24, heads 6/3" in out and "wrote b in 0.0 s" in out
    )
    convert_output.finish({**RESULT, "dry_run": True}, tiny_teacher_config(), 0.0, False)
    assert "nothing was written to b" in capsys.readouterr().out


def test_json_has_the_whole_result(capsys):
    convert_output.finish(RESULT, tiny_teacher_config(), time.monotonic(), True)
    record = json.loads(capsys.readouterr().out)
    assert record.items() >= RESULT.items() and record["model"]["num_layers"] == 2
    assert record["peak_memory_gib"] > 0
