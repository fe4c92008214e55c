"""What a run says before it begins."""

import pytest

from megatron_hypenet.cli import pipeline
from megatron_hypenet.cli.banner import banner, short
from tests.unit.halo.test_run_folder import STAGE, config


def test_sizes_are_those_of_the_weights(repo_root):
    from safetensors import safe_open

    shape = pipeline.teacher_shape(repo_root / "assets" / "tiny-qwen3")
    stored = 0
    for path in (repo_root / "assets" / "tiny-qwen3").glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            stored += sum(tensors.get_tensor(name).numel() for name in list(tensors.keys()))
    assert shape.num_parameters == stored


def test_device_processes_tokens_and_disk_are_said(tmp_path, repo_root):
    shape = pipeline.teacher_shape(repo_root / "assets" / "tiny-qwen3")
    stage = {**STAGE, "train_iters": 1000, "seq_length": 512}
    run = config(
        tmp_path,
        device="cpu",
        finetune=stage,
        parallel={"tensor_model_parallel_size": 2, "zero_stage": 2},
    )
    lines = banner(run, shape, 4)
    assert lines[0].startswith("CPU, ") and ", float32; 4 processes" in lines[0]
    assert lines[0].endswith("(tensor 2, data 2), ZeRO 2")
    assert lines[1].startswith("teacher 1.08 M parameters, ") and "lightning_attn" in lines[1]
    assert lines[4] == "finetune 2 x 512 = 1,024 tokens a step, 1,000 steps, 1.02 M tokens"
    assert lines[5].startswith("1.02 M tokens in all; takes up to ") and str(tmp_path) in lines[5]
    assert lines[5].endswith(" are free") and len(lines) == 6


def test_a_disk_that_may_become_full_is_said(tmp_path, repo_root, monkeypatch):
    shape = pipeline.teacher_shape(repo_root / "assets" / "tiny-qwen3")
    monkeypatch.setattr("megatron_hypenet.planning.disk.free_bytes", lambda folder: 3 << 20)
    *_, disk, warning = banner(config(tmp_path, device="cpu"), shape, 1)
    assert disk.endswith("where 3.0 MiB are free")
    assert warning.startswith("warning: the disk may become full; `hypenet plan ")


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12"), (1720, "1.72 k"), (1.72e9, "1.72 B"), (2.4e12, "2.4 T")]
)
def test_counts_have_three_digits(value, text):
    assert short(value) == text
