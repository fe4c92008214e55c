"""hypenet plan: memory per stage, layouts that fit, and an exit code for scripts."""

import json
import re

import pytest

from megatron_hypenet.cli.main import run

WORDS = ("configs/run/distill_2b.yaml", "teacher=T", "data=D", "--model")


@pytest.fixture
def hypenet(capsys, monkeypatch, repo_root):
    monkeypatch.chdir(repo_root)

    def call(*words):
        code = run(["plan", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_run_that_fits(hypenet):
    code, out, _ = hypenet(*WORDS, "configs/model/hypenet_2b.yaml", "--world-size", "8")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("8 GPUs: tensor 1, pipeline 1, context 1, data 8, ZeRO 1")
    assert [line.split()[0] for line in lines[2:5]] == ["align", "distill", "finetune"]
    assert (
        "--tp 1 --pp 1 --cp 1 parallel.zero_stage=1 distill.recompute=none finetune.recompute=none"
        in out
    )


def test_one_that_does_not_names_a_layout_that_does(hypenet):
    words = (*WORDS, "configs/model/hypenet_9b.yaml", "--world-size", "8")
    code, out, err = hypenet(*words)
    assert (
        code == 3
        and "finetune needs" in err
        and "use --tp" in err
        and "layouts that fit 79.1 GiB" in out
    )
    advised = err.split("; use ")[1].split()
    assert hypenet(*words, *advised)[0] == 0, "the advice is itself checked"


def test_json(hypenet):
    code, out, err = hypenet(
        *WORDS,
        "configs/model/hypenet_9b.yaml",
        "--world-size",
        "8",
        "--gpu-memory",
        "140",
        "--json",
    )
    answer = json.loads(out)
    assert code == 0 and err == ""
    assert (
        answer["fits"]
        and answer["data_parallel_size"] == 8
        and set(answer["stages"]) == {"align", "distill", "finetune"}
    )
    finetune = answer["stages"]["finetune"]
    assert finetune["total"] == pytest.approx(
        sum(
            finetune[part] for part in ("weights", "gradients", "optimizer", "activations", "work")
        ),
        rel=1e-6,
    )
    assert finetune["needed"] <= 140 * 2**30 and len(answer["layouts_that_fit"]) > 10


@pytest.mark.parametrize("size", ["06b", "2b", "5b", "9b"])
def test_each_preset_fits_the_gpus_that_it_names(hypenet, size):
    gpus = "1" if size == "06b" else "8"
    words = (f"distill_{size}", "teacher=T", "data=D", "--world-size", gpus)
    code, out, err = hypenet(*words, "--model", f"configs/model/hypenet_{size}.yaml", "--json")
    assert code == 0 and json.loads(out)["fits"], err


def test_a_teachers_shape_and_its_students_take_the_same_hours(hypenet, tmp_path, repo_root):
    """Otherwise the work of the teacher would be counted as that of the student."""
    student = repo_root / "configs/model/hypenet_2b.yaml"
    text = student.read_text(encoding="utf-8").replace("lightning_attn", "attn")
    for key, value in (("attn_use_rope", "true"), ("attn_use_output_gate", "false")):
        text = re.sub(f"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
    text = re.sub("^attn_logits_scaling: .*$", "attn_logits_scaling: null", text, flags=re.M)
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(text)
    hours = [
        json.loads(hypenet(*WORDS, str(shape), "--world-size", "8", "--json")[1])["hours"]
        for shape in (student, teacher)
    ]
    assert hours[0] == hours[1]


def test_hours_and_costs_follow_from_gpus_and_price(hypenet):
    words = [*WORDS, "configs/model/hypenet_2b.yaml", "--world-size", "8"]
    code, out, _ = hypenet(*words, "--price", "2.5")
    assert code == 0 and "estimated hours on 8 H100" in out and "whole run" in out and "cost" in out
    answers = [
        json.loads(hypenet(*words, "--gpu", gpu, "--json")[1])["hours"] for gpu in ("H100", "A100")
    ]
    distill = [answer["distill"]["gpu_hours"] for answer in answers]
    assert 3.35 / 2.0 < distill[1] / distill[0] < 989 / 312, "between memory's and products' ratio"
    seconds = answers[0]["distill"]["seconds"]
    assert answers[0]["distill"]["step_seconds"] == pytest.approx(sum(seconds.values()), abs=1e-4)
    code, _, err = hypenet(*words, "--gpu", "Voodoo2")
    assert code == 2 and "use one of H100 PCIe, " in err


def test_the_example_of_the_readme_fits(hypenet, repo_root):
    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"hypenet plan configs/run/(?:.*\\\n)*.*", readme)
    words = command.replace("\\\n", " ").replace("...", "X").split()[2:]
    assert hypenet(*words)[0] == 0


def test_nothing_fits(hypenet):
    code, out, err = hypenet(*WORDS, "configs/model/hypenet_9b.yaml")
    assert code == 3 and "no layout on these GPUs fits" in out and "use more than 1 GPUs" in err


def test_a_shape_is_needed(hypenet):
    code, _, err = hypenet("configs/run/distill_2b.yaml", "teacher=missing", "data=D")
    assert code == 5 and "--model" in err


def test_disk_space_is_part_of_the_plan(tmp_path, capsys, repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    words = ["plan", "configs/run/distill_2b.yaml", "teacher=T", "data=D", "--world-size", "8"]
    words += ["--model", "configs/model/hypenet_2b.yaml", f"output_dir={tmp_path}/run"]
    assert run(words) == 0
    assert f"GiB in {tmp_path}/run (distill " in capsys.readouterr().out.splitlines()[-1]
    assert run([*words, "--json"]) == 0
    disk = json.loads(capsys.readouterr().out)["disk"]
    parts = sum(size for name, size in disk.items() if name not in ("peak", "free"))
    assert disk["peak"] == parts > 100e9 and disk["free"] > 0


def test_a_number_of_gpus_gets_the_fastest_layout(hypenet):
    words = [*WORDS, "configs/model/hypenet_9b.yaml", "--gpus", "64"]
    code, out, err = hypenet(*words, "--scale-batch", "--json")
    assert code == 0 and err == ""
    answer = json.loads(out)
    best = answer["layouts_that_fit"][0]
    assert answer["processes"] == 64 and answer["fits"]
    assert best["hours"] == min(fit["hours"] for fit in answer["layouts_that_fit"])
    model = best["parallel.tensor_model_parallel_size"] * (
        best["parallel.pipeline_model_parallel_size"] * best["parallel.context_parallel_size"]
    )
    assert answer["data_parallel_size"] == 64 // model
    code, _, err = hypenet(*words, "--world-size", "8")
    assert code == 2 and "give one" in err
    code, _, err = hypenet(*WORDS, "configs/model/hypenet_9b.yaml", "--scale-batch")
    assert code == 2 and "--gpus N" in err


def test_too_many_gpus_for_the_batches_are_told_what_helps(hypenet):
    code, _, err = hypenet(*WORDS, "configs/model/hypenet_2b.yaml", "--gpus", "1021")
    assert code == 3 and "no layout on 1021 GPUs" in err and "--scale-batch" in err
