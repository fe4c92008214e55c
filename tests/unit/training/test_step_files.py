"""Losses are exact, lines of later steps go when a run continues, and damage is named."""

import math

import pytest

from megatron_hypenet.errors import DataError
from megatron_hypenet.training.step_files import LossLog, MetricsLog, metrics_lines
from tests.losses import read_losses


def test_losses_keep_every_bit_and_are_rewound(tmp_path):
    path = tmp_path / "losses.jsonl"
    log = LossLog(path, 0)
    for step in (1, 2, 3):
        log.append(step, 0.1 + 0.2, 1 / 3, 1e-3)
    log.close()
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')  # torn by a kill
    log = LossLog(path, 2)
    log.append(3, 7.0, 1.0, 1e-3)
    log.close()
    assert [(record["step"], record["loss"]) for record in read_losses(path)] == [
        (1, 0.1 + 0.2),
        (2, 0.1 + 0.2),
        (3, 7.0),
    ]


def test_points_are_rewound_and_a_step_may_have_several(tmp_path):
    path = tmp_path / "a" / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.append(1, {"train/kl": 0.1 + 0.2, "speed/mfu": math.nan})
    log.append(2, {"train/kl": 0.5})
    log.append(2, {"eval/kl": 0.4})
    log.append(3, {"train/kl": 0.6})
    log.close()
    MetricsLog(path, 2).close()
    assert [(line.step, line.values) for _, line in metrics_lines(path)] == [
        (1, {"train/kl": 0.1 + 0.2, "speed/mfu": None}),
        (2, {"train/kl": 0.5}),
        (2, {"eval/kl": 0.4}),
    ]
    path.write_text('{"step": 1, "values": {"x": "y"}}\n')
    with pytest.raises(DataError, match="metrics.jsonl, line 1: values.x"):
        metrics_lines(path)


def test_damage_in_the_losses_is_named_and_a_torn_end_is_not_damage(tmp_path, caplog):
    path = tmp_path / "losses.jsonl"
    lines = ['{"step": %d, "loss": 1.5, "grad_norm": 0.5, "lr": 0.1}' % step for step in (1, 2, 3)]  # noqa: UP031 - braces
    for bad, word in [
        ("{", "not valid JSON"),
        ("\0\0\0", "NUL"),
        ("\udcff", "not UTF-8"),
        ("", "not valid JSON"),
        ('{"step": 2, "loss": NaN, "grad_norm": 0.5, "lr": 0.1}', "NaN"),
        ('{"step": "2", "loss": 1.5, "grad_norm": 0.5, "lr": 0.1}', "step: "),
        ('{"step": 2, "grad_norm": 0.5, "lr": 0.1}', "loss: missing"),
        (lines[0], "step 1 follows step 1"),
        ("[]", "should be an object"),
    ]:
        path.write_bytes(
            ("\n".join([lines[0], bad, lines[2]]) + "\n").encode(errors="surrogateescape")
        )
        with pytest.raises(DataError, match=word) as caught:
            LossLog(path, 3)
        assert str(path) in str(caught.value)
        assert "losses.jsonl, line 2: " in str(caught.value)
        assert path.read_bytes().split(b"\n")[1] == bad.encode(errors="surrogateescape")
    path.write_text(lines[0] + "\n" + lines[1][:20])
    LossLog(path, 3).close()
    assert path.read_text() == lines[0] + "\n"
    assert "lacks 2 of the 3 steps that are done, first step 2" in caplog.text
    path.write_text(lines[0] + "\n" + lines[2] + "\n")
    LossLog(path, 3).close()
    assert "lacks 1 of the 3 steps that are done, first step 2" in caplog.text
