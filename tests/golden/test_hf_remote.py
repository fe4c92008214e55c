"""Exported folders under the installed transformers and under 4.57: the reference's numbers,
caching, padding and generation.

Each check runs in a process of its own where this package cannot be imported, on a folder that was
moved after the export."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_hypenet.export import tokenizer
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.hf_remote.configuration_hypenet import HypeNetConfig
from megatron_hypenet.export.hf_remote.modeling_hypenet import HypeNetForCausalLM
from megatron_hypenet.export.remote_code import remote_files
from megatron_hypenet.export.to_hf import export_hf

from .cases import CASES, DATA, export_case

HERE = Path(__file__).parent
COMPAT = HERE.parents[1] / ".compat" / "transformers-4.57"
RELATIVE = 1e-5  # largest difference; the reference's RoPE tables are fp32
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4}


def environment(version: str, modules: Path) -> dict[str, str]:
    """Return the variables of a process that sees that transformers; fails, rather than skips, when
    the older one was not installed."""
    found = {
        **os.environ,
        "HF_MODULES_CACHE": str(modules),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    found.pop("PYTHONPATH", None)
    if version == "4.57":
        assert COMPAT.is_dir(), f"{COMPAT} is missing: run tools/install_compat.sh"
        found["PYTHONPATH"] = str(COMPAT)
    return found


@pytest.fixture(params=["installed", "4.57"])
def version(request):
    return request.param


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def case(request):
    return request.param


def measure(case, kind, name, version, tmp_path):
    export_case(case, kind, tmp_path / "hf")
    elsewhere = (tmp_path / "hf").rename(tmp_path / "elsewhere")
    command = [
        sys.executable,
        HERE / "hf_remote_worker.py",
        elsewhere,
        case / "golden.safetensors",
        name,
    ]
    done = subprocess.run(
        command,
        env=environment(version, tmp_path / "modules"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["transformers"].startswith("4.57.") == (version == "4.57")
    assert result["unfit_keys"] == []
    return result


def test_student_is_the_reference(case, version, tmp_path):
    result = measure(case, "hypenet", "student_logits", version, tmp_path)
    assert result["class"] == "transformers_modules.HypeNetForCausalLM"
    assert result["logits"] < RELATIVE and result["hidden"] < RELATIVE and result["loss"] < RELATIVE
    assert result["cache"] < 1e-11, "token by token differs from the whole prompt"
    assert result["padding"] < 1e-11, "a left-padded batch differs from its rows"
    assert result["padded_generation"] and result["generation"]


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_modelling_code_is_the_reference(case, dtype):
    golden = load_file(case / "golden.safetensors")
    ids = golden["input_ids"]
    model, info = HypeNetForCausalLM.from_pretrained(
        case / "hypenet", dtype=dtype, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    out = model.eval()(ids, labels=ids, output_hidden_states=True)
    assert error(out.logits, golden["student_logits"]) < LIMITS[dtype]
    assert error(out.loss, golden["stage3_loss"]) < LIMITS[dtype]
    for got, want in zip(out.hidden_states, golden["student_hidden"], strict=True):
        assert error(got, want) < LIMITS[dtype]


def test_folders_of_one_name_with_other_mixers_load_in_one_process(version, tmp_path):
    """transformers 4.57 copies the code of both to one place."""
    want = []
    for index, name in enumerate(("tied_pow2", "gdn", "kda", "tied_pow2")):
        export_case(DATA / name, "hypenet", tmp_path / str(index) / "model")
        want.append(json.loads((tmp_path / str(index) / "model/config.json").read_text()))
    code = (
        "import json, sys\nfrom transformers import AutoModelForCausalLM as Auto\n"
        "for folder in sys.argv[1:]:\n"
        "    model = Auto.from_pretrained(folder, trust_remote_code=True)\n"
        "    mixers = [type(layer.self_attn).hf_names[0] for layer in model.model.layers]\n"
        "    print(json.dumps(mixers))"
    )
    # Python takes bytecode for fresh by size and whole second: copies of one size that are made
    # within one would run the code of the one before
    env = environment(version, tmp_path / "modules") | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *(tmp_path / str(index) / "model" for index in range(4))],
        env=env, cwd=tmp_path,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [config["mixer_types"] for config in want]


def test_teacher_is_plain_qwen3(case, version, tmp_path):
    result = measure(case, "qwen3", "teacher_logits", version, tmp_path)
    assert result["class"] == "transformers.Qwen3ForCausalLM" and result["logits"] < RELATIVE


def test_modelling_code_passes_its_unit_tests_under_4_57(repo_root, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/unit/export/hf_remote",
    ]
    done = subprocess.run(
        command,
        env=environment("4.57", tmp_path),
        cwd=repo_root,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def write_tokenizers_of_transformers_5(source, folder):
    """Write two tokenizer folders as transformers 5 saves them: with a list of special tokens, and
    of its own class."""
    model = json.loads((source / "tokenizer.json").read_text())
    common = {
        "backend": "tokenizers",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 10**30,
    }
    chat = ["<|im_start|>", "<|im_end|>"]
    configs = {
        "listed": {**common, "tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": chat},
        "backend": {**common, "tokenizer_class": "TokenizersBackend", "extra_special_tokens": chat},
    }
    plain = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    vocabulary = model["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.get)[-2:]
    model["model"]["merges"] = [
        pair
        for pair in model["model"]["merges"]
        if "".join(pair if isinstance(pair, list) else pair.split(" ")) not in last
    ]
    model["added_tokens"] += [
        {"id": vocabulary.pop(old), "content": new, **plain}
        for old, new in zip(last, chat, strict=True)
    ]
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "tokenizer.json").write_text(json.dumps(model))
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
    return [folder / name for name in configs]


def test_model_card_code_runs_without_warnings_and_tokenizers_agree(repo_root, tmp_path):
    """Text, ids and tokens are the same in both versions, from tokenizers that transformers 5
    saved."""
    teacher = repo_root / "assets/tiny-qwen3"
    raw = {**json.loads((DATA / "tied_pow2/hypenet/config.json").read_text()), "vocab_size": 2048}
    config = HypeNetConfig(
        **{
            key: value
            for key, value in raw.items()
            if key not in ("architectures", "auto_map", "model_type")
        }
    )
    torch.manual_seed(0)
    HypeNetForCausalLM(config).save_pretrained(tmp_path / "made")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(teacher / file, tmp_path / "made" / file)
    import_hf(tmp_path / "made", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "hf")
    exported = []
    for folder in write_tokenizers_of_transformers_5(teacher, tmp_path / "saved"):
        exported.append(tmp_path / "exported" / folder.name)
        exported[-1].mkdir(parents=True)
        tokenizer.export(folder, exported[-1])
        shutil.copyfile(tmp_path / "hf/config.json", exported[-1] / "config.json")
        for code in tmp_path.glob("hf/*.py"):
            shutil.copyfile(code, exported[-1] / code.name)
    found = []
    for version in ("installed", "4.57"):
        warn = [
            f"-Werror::{kind}"
            for kind in (
                "FutureWarning",
                "DeprecationWarning:transformers",
                "DeprecationWarning:transformers_modules",
            )
        ]
        command = [sys.executable, *warn, HERE / "hf_use_worker.py", tmp_path / "hf", *exported]
        done = subprocess.run(
            command,
            env=environment(version, tmp_path / version),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
        assert found[-1].pop("transformers").startswith("4.57.") == (version == "4.57")
    assert found[0] == found[1]
    assert found[0]["continued"] and found[0]["round_trip"] and found[0]["warnings"] == []
    assert found[0]["saved"] == sorted(remote_files(set(config.mixer_types)))
    for one in found[0]["tokenizers"]:
        assert (
            one["ids"][-1] == one["end"] == 0
            and {2046, 2047} & set(one["ids"])
            and one["others"] == ["attention_mask"]
        )
