"""The whole pipeline from the command line: a random Qwen3 with a real tokenizer, real text, every
step, and a model at the end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

STAGE = {
    "train_iters": 3,
    "seq_length": 128,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "lr": 1e-3,
    "min_lr": 1e-4,
    "log_interval": 1,
    "save_interval": 2,
}


@pytest.fixture(scope="module")
def world(repo_root, tmp_path_factory):
    """Provide a folder with a random Qwen3 that has the bundled teacher's tokenizer, a text, and a
    run configuration."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    root = tmp_path_factory.mktemp("pipeline")
    bundled = repo_root / "assets" / "tiny-qwen3"
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(shape).save_pretrained(root / "qwen3")
    for file in bundled.glob("*.json"):
        if file.name.startswith(("tokenizer", "vocab")):
            shutil.copyfile(file, root / "qwen3" / file.name)
    shutil.copyfile(bundled / "merges.txt", root / "qwen3" / "merges.txt")
    (root / "text.txt").write_text((bundled / "sample.txt").read_text()[:80_000])
    small = {
        "recall_sequences": 2,
        "recall_pairs": 2,
        "heldout_sequences": 2,
        "seq_length": 128,
        "batch_size": 2,
    }
    values = {
        "output_dir": str(root / "run"),
        "teacher": str(root / "qwen3"),
        "device": "cpu",
        "data": {
            "train": [str(root / "text.txt")],
            "heldout_fraction": 0.3,
            "recall_fraction": 0.5,
            "recall_pairs": 3,
        },
        "align": STAGE,
        "distill": STAGE,
        "finetune": {**STAGE, "seq_length": 256},
        "select": small,
        "eval": {**small, "length_multiples": [1, 2]},
        "guard": {"max_teacher_loss": 20.0},
        "export": {"attn_logits_scaling": "hype 128"},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    return root


def hypenet(*words, processes=1, code=0):
    """Run the command in a process of its own (or several); returns what it printed on stdout and
    stderr."""
    launcher = (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
        if processes > 1
        else [sys.executable]
    )
    done = subprocess.run(
        [*launcher, "-m", "megatron_hypenet", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.mark.slow
def test_from_teacher_to_a_model_that_transformers_loads(world):
    hypenet("train", world / "run.yaml", "--stage", "align")
    out, err = hypenet("run", world / "run.yaml", "--json")
    assert err.count("done before, skipped") == 4, (
        "teacher, data, probe and align were done by `train`"
    )
    report = json.loads(out)
    assert [row["model"] for row in report["rows"]] == [
        "teacher",
        "all layers converted",
        "student after stage 2",
        "student after stage 3",
    ]
    run = world / "run"
    for file in (
        "report/report.png",
        "report/report.html",
        "selection/importance.png",
        "logs/hypenet.log",
        "tb/distill",
        "export/tokenizer.json",
        "config.yaml",
    ):
        assert (run / file).exists(), file

    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 2048, (2, 40), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(
        run / "export", trust_remote_code=True, dtype=torch.float32
    )
    with torch.no_grad():
        exported = model(input_ids=ids).logits
    save_file({"input_ids": ids}, world / "ids.safetensors")
    hypenet("convert", "import", run / "export", world / "again")
    hypenet(
        "score",
        world / "again",
        "--tokens",
        world / "ids.safetensors",
        "--out",
        world / "scores.safetensors",
    )
    torch.testing.assert_close(
        load_file(world / "scores.safetensors")["logits"], exported, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one(world):
    """Two data-parallel processes read the same samples per step, so their losses are the same up
    to summation order."""
    hypenet("train", world / "run.yaml", f"output_dir={world / 'one'}", "--stage", "distill")
    hypenet(
        "train",
        world / "run.yaml",
        f"output_dir={world / 'two'}",
        "--stage",
        "distill",
        processes=2,
    )
    for stage in ("align", "distill"):
        rows = [
            [
                json.loads(line)
                for line in (world / name / stage / "losses.jsonl").read_text().splitlines()
            ]
            for name in ("one", "two")
        ]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [1, 2, 3]
        for one, two in zip(*rows, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4) and two[
                "grad_norm"
            ] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_an_untrained_teacher_and_a_changed_configuration_are_refused(world):
    _, err = hypenet(
        "train",
        world / "run.yaml",
        f"output_dir={world / 'gate'}",
        "guard.max_teacher_loss=3",
        "--stage",
        "align",
        code=5,
    )
    assert "looks untrained" in err and not (world / "gate" / "align").exists()
    # nothing was trained yet, so that another seed loses nothing; afterwards it would
    train = ("train", world / "run.yaml", f"output_dir={world / 'gate'}", "--stage", "align")
    _, err = hypenet(*train, "seed=4")
    assert "seed: 1234 there, 4 now" in err and "no finished step is done again" in err
    _, err = hypenet(*train, "seed=5", code=3)
    assert "seed: 4 there, 5 now" in err and "--redo-from align" in err
