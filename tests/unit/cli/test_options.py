import pytest

from megatron_hypenet.cli.main import run
from megatron_hypenet.cli.options import collect_overrides


def test_layout_options_become_overrides_after_the_words():
    words = collect_overrides(["seed=1", "parallel.tensor_model_parallel_size=4"], tp=2, cp=8)
    assert words == [
        "seed=1",
        "parallel.tensor_model_parallel_size=4",
        "parallel.tensor_model_parallel_size=2",
        "parallel.context_parallel_size=8",
    ]


def test_nothing_given():
    assert collect_overrides(None) == []


@pytest.mark.parametrize("axis", ["--tp", "--pp", "--cp"])
def test_an_axis_has_at_least_one_process(axis, capsys):
    assert run(["score", "ckpt", "--tokens", "ids", "--out", "out", axis, "0"]) == 2
    assert axis in capsys.readouterr().err
