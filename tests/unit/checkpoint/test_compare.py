"""Equal means every bit; a difference is named with its size."""

import math

import pytest
import torch

from megatron_hypenet.checkpoint import compare, save
from megatron_hypenet.checkpoint.state import TrainState
from megatron_hypenet.errors import CheckpointError


@pytest.fixture
def write(tmp_path, model_config):
    return lambda name, tensors, config=model_config: save.write_weights(
        tmp_path / name, tensors, config, kind="student"
    )


def test_a_checkpoint_equals_itself(write, tensors):
    tensors["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    report = compare.compare(write("a", tensors), write("b", tensors))
    assert report.equal and report.compared == 5 and report.as_dict()["equal"]


def test_every_kind_of_difference(write, tensors, model_config):
    other = dict(tensors)
    other["embed.weight"] = tensors["embed.weight"].clone()
    other["embed.weight"][3, 2] += 0.5
    other["linear.weight.q"] = tensors["linear.weight.q"].double()  # another dtype, the same values
    other["norm.weight"] = torch.ones(9)
    other["more"] = other.pop("linear.weight.k")
    report = compare.compare(
        write("a", tensors), write("b", other, model_config.replace(rotary_base=5.0))
    )
    assert (
        not report.equal
        and report.model == {"rotary_base": (model_config.rotary_base, 5.0)}
        and report.compared == 3
    )
    assert (report.only_in_first, report.only_in_second) == (["linear.weight.k"], ["more"])
    embed, q, norm = report.differing
    assert embed.max_abs_diff == pytest.approx(0.5, rel=1e-6)
    assert embed.max_rel_diff == pytest.approx(
        0.5 / float(tensors["embed.weight"].abs().max()), rel=1e-6
    )
    assert (q.dtypes, q.max_abs_diff) == (("float32", "float64"), 0.0)
    assert (norm.shapes, norm.max_abs_diff) == (((8,), (9,)), None)


@pytest.mark.parametrize(
    ("a", "b", "largest"),
    [
        ([1.0, 2.0], [1.0, 2.25], 0.25),
        ([0.0], [-0.0], 0.0),  # a difference of bits alone is one
        ([float("nan"), 1.0], [float("nan"), 2.0], 1.0),
        ([float("inf"), 1.0], [float("inf"), 3.0], 2.0),
        ([1.0], [float("nan")], math.nan),
        ([0.0], [1.0], 1.0),
    ],
)
def test_size_of_a_difference(write, a, b, largest, monkeypatch):
    monkeypatch.setattr(compare, "_CHUNK_ELEMENTS", 1)
    report = compare.compare(write("a", {"w": torch.tensor(a)}), write("b", {"w": torch.tensor(b)}))
    assert (
        report.differing[0].max_abs_diff == pytest.approx(largest, nan_ok=True) and not report.equal
    )


def training(folder, engine, model_config, **changes):
    state = TrainState(**{"stage": "distill", "step": 7, "tokens": 56, "adam_step": 7, **changes})
    return save.begin_save(
        folder,
        engine,
        state,
        model_config=model_config,
        kind="distill",
        config_yaml=f"output_dir: {folder.name}\n",
    ).commit()


def test_optimizer_and_progress_count_run_settings_do_not(tmp_path, make_engine, model_config):
    engine = make_engine().randomize(0)
    one = training(tmp_path / "a", engine, model_config)
    report = compare.compare(
        one, training(tmp_path / "b", engine, model_config, layout={"tensor": 2}, lr=0.1)
    )
    assert (
        report.equal
        and report.compared == 4 + 12
        and report.run_settings == {"output_dir": ("a", "b")}
    )
    engine.states[0, "exp_avg"] += 1
    other = training(tmp_path / "c", engine, model_config, tokens=57)
    report = compare.compare(one, other)
    assert report.progress == {"tokens": (56, 57)} and [d.name for d in report.differing] == [
        "optim.exp_avg.embed.weight"
    ]
    assert compare.compare(one, other, weights_only=True).equal


def test_missing_optimizer_and_damage(tmp_path, write, make_engine, model_config):
    one = training(tmp_path / "t", make_engine().randomize(0), model_config)
    tensors = {"embed.weight": torch.zeros(11, 8)}
    report = compare.compare(write("w", tensors), one)
    assert sum(name.startswith("optim.") for name in report.only_in_second) == 12
    next(one.rglob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        compare.compare(one, one)
