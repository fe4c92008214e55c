import pytest
from pydantic import ValidationError

from megatron_hypenet.config.loader import load_run_config
from megatron_hypenet.config.problems import describe, section_keys, section_type
from megatron_hypenet.config.schema import DataConfig, ParallelConfig, RunConfig
from megatron_hypenet.errors import ConfigError


def lines(values, origins=None):
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(values)
    return describe(caught.value, origins or {}, default_origin="run.yaml")


def test_each_finding_carries_its_origin():
    values = {"output_dir": "x", "teacher": "t", "data": {"train": ["a"], "seeed": 1}, "seed": -1}
    found = lines(values, {("seed",): "CLI", ("data",): "base.yaml"})
    assert "base.yaml: data.seeed: unknown key; did you mean 'seed'?" in found
    assert "CLI: seed: should be greater than or equal to 0, got int -1" in found
    assert "run.yaml: align: missing; set it in the file or as align=..." in found


def test_what_is_null_is_called_so():
    values = {"output_dir": None, "teacher": 5, "seed": None}
    found = lines(values)
    assert "run.yaml: output_dir: should be a path, got null" in found
    assert "run.yaml: teacher: should be a path, got int 5" in found
    assert "run.yaml: seed: should be a valid integer, got null" in found


def test_key_of_another_section_is_pointed_to():
    found = lines({"tensor_model_parallel_size": 2})
    assert (
        "run.yaml: tensor_model_parallel_size: unknown key; "
        "it exists as parallel.tensor_model_parallel_size" in found
    )


def test_hopeless_key_lists_the_section():
    found = lines({"guard": {"qqq": 1}})
    assert (
        "run.yaml: guard.qqq: unknown key; keys here are max_teacher_loss, max_fp8_kl, "
        "max_skipped_steps, hang_timeout_seconds" in found
    )


def test_section_lookup():
    assert section_keys(("data",))[:2] == ["train", "heldout"]
    assert section_keys(("nowhere", "below")) == []
    assert section_type(ParallelConfig | None) is ParallelConfig
    assert section_type(int) is None
    assert section_keys((), DataConfig)[0] == "train"


def test_a_message_stays_short_whatever_it_repeats(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: {"
        + "x" * 900
        + ": 1}\nalign: {"
        + ", ".join(f"key{number}: 1" for number in range(3000))
        + "}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    text = str(caught.value)
    assert (
        len(text) < 50_000
        and "more" in text.splitlines()[-1]
        and max(map(len, text.splitlines())) < 3000
    )
