"""What a run takes on the disk, against the weights of its models."""

import pytest

from megatron_hypenet.config.loader import load_model_config, load_run_config
from megatron_hypenet.errors import SetupError
from megatron_hypenet.export.mapping import num_parameters
from megatron_hypenet.planning.disk import (
    described,
    disk_need,
    free_bytes,
    refuse_small_disk,
    text_bytes,
)
from megatron_hypenet.planning.layout_search import teacher_and_student
from tests.tiny import tiny_teacher_config


@pytest.fixture
def run(repo_root, tmp_path, monkeypatch):
    monkeypatch.chdir(repo_root)
    words = ["teacher=T", f"data={tmp_path}/a.txt", f"output_dir={tmp_path}/run"]

    def load(*more):
        return load_run_config("configs/run/distill_2b.yaml", [*words, *more])

    return load


def test_parts_follow_from_the_weights(run, repo_root):
    shape = load_model_config(repo_root / "configs" / "model" / "hypenet_2b.yaml")
    settings = run("checkpoint.keep_last=2")
    need = disk_need(shape, settings, text_bytes=3e9)
    teacher, student = teacher_and_student(shape, settings.align.spec)
    weights = num_parameters(student)
    assert need.parts["teacher"] == 2 * num_parameters(teacher)
    assert need.parts["assemble"] == need.parts["export"] == 2 * weights
    assert need.parts["distill"] == 2 * 14 * weights and need.saving == 14 * weights
    assert need.parts["data"] == 4e9 and need.parts["align"] < need.parts["distill"]
    assert need.peak == sum(need.parts.values()) + need.saving
    assert described(need).startswith(f"distill {28 * weights / 2**30:,.1f} GiB, ")
    small = disk_need(shape, run("checkpoint.finished=weights", "export.dtype=float32"))
    assert small.parts["distill"] == 2 * weights and small.parts["export"] == 4 * weights
    marked = disk_need(shape, run("checkpoint.keep_every=1"))
    made = -(-settings.distill.train_iters // settings.distill.save_interval)
    assert marked.parts["distill"] == made * 14 * weights


def test_a_small_disk_is_refused(run, repo_root, tmp_path):
    shape = load_model_config(repo_root / "configs" / "model" / "hypenet_2b.yaml")
    need = disk_need(shape, run())
    refuse_small_disk(disk_need(tiny_teacher_config(), run()), tmp_path)
    with pytest.raises(SetupError, match="takes about .* GiB on the disk .data .* are free"):
        refuse_small_disk(disk_need(shape, run(), text_bytes=1e18), tmp_path / "not" / "yet")
    before = free_bytes(tmp_path / "run")
    assert before > 0 and need.peak > 0


def test_text_that_is_tokenized(run, tmp_path):
    assert text_bytes(run()) == 0
    (tmp_path / "a.txt").write_text("x" * 100)
    assert text_bytes(run()) == 100
    (tmp_path / "b.txt.gz").write_bytes(b"\x1f\x8b" + bytes(98))
    assert text_bytes(run(f"data.heldout={tmp_path}/b.txt.gz")) == 500
