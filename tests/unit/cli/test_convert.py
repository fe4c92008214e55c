import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from megatron_hypenet.cli.convert import parse_scaling
from megatron_hypenet.cli.main import run
from megatron_hypenet.errors import UsageError


@pytest.fixture(scope="session")
def golden(repo_root):
    return repo_root / "tests/golden/data/tied_pow2"


@pytest.fixture
def convert(capsys):
    """convert(*words) -> (exit code, stdout, stderr)."""

    def call(*words):
        code = run(["convert", *map(str, words)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def ckpt(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "ckpt"
    assert run(["convert", "import", str(golden / "hypenet"), str(folder)]) == 0
    return folder


def test_import_export_round_trip(convert, golden, tmp_path):
    code, out, _ = convert("import", golden / "qwen3", tmp_path / "ckpt")
    assert (
        code == 0
        and "teacher: 4 layers (4 softmax), hidden 64, heads 4/2, vocabulary 320, tied head, "
        "46 tensors"
        in out
    )
    code, out, _ = convert("export", tmp_path / "ckpt", tmp_path / "hf")
    assert code == 0 and out.startswith("qwen3: 4 layers") and f"wrote {tmp_path / 'hf'} in" in out
    found = load_file(tmp_path / "hf/model.safetensors")
    want = load_file(golden / "qwen3/model.safetensors")
    assert found.keys() == want.keys() and all((found[name] == want[name]).all() for name in want)


def test_json_is_the_only_thing_on_stdout(convert, golden, ckpt, tmp_path):
    code, out, err = convert("import", golden / "hypenet", tmp_path / "ckpt", "--json")
    record = json.loads(out)
    assert (
        code == 0
        and record["kind"] == "student"
        and record["tensors"] == 52
        and record["model"]["num_layers"] == 4
    )
    assert (
        record["parameters"] == 217_920
        and record["dry_run"] is False
        and record["seconds"] >= 0
        and "reading" in err
    )
    code, out, _ = convert("export", ckpt, tmp_path / "hf", "--json", "--max-shard-gb", "0.001")
    record = json.loads(out)
    assert (
        code == 0
        and record["kind"] == "hypenet"
        and record["files"] == 1
        and record["bytes"] == 4 * 217_920
    )


def test_dry_run_writes_nothing(convert, golden, ckpt, tmp_path):
    for words in (
        ("import", golden / "hypenet", tmp_path / "x"),
        ("export", ckpt, tmp_path / "x"),
        ("verify", golden / "hypenet", ckpt),
    ):
        code, out, _ = convert(*words, "--dry-run")
        assert code == 0 and "dry run" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_fails_where_the_command_would(convert, golden, ckpt, tmp_path):
    assert convert("import", golden / "hypenet", ckpt, "--dry-run")[0] == 5
    assert convert("import", tmp_path / "nothing", tmp_path / "x", "--dry-run")[0] == 5
    assert convert("export", ckpt, ckpt, "--dry-run")[0] == 5
    assert (
        convert("export", ckpt, tmp_path / "x", "--attn-logits-scaling", "hype 0.5", "--dry-run")[0]
        == 2
    )
    assert convert("export", ckpt, tmp_path / "x", "--dtype", "fp8", "--dry-run")[0] == 2


def test_logits_scaling_and_dtype_reach_the_folder(convert, ckpt, tmp_path):
    code, _, _ = convert(
        "export", ckpt, tmp_path / "hf", "--attn-logits-scaling", "hype 500", "--dtype", "bfloat16"
    )
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (
        code == 0
        and config["attn_logits_scaling"] == "hype 500"
        and config["torch_dtype"] == "bfloat16"
    )


def test_verify_agrees(convert, golden, ckpt):
    code, out, _ = convert("verify", golden / "hypenet", ckpt, "--num-tokens", "16")
    assert (
        code == 0
        and "tensors  52 of 52 equal bit for bit" in out
        and "layers   all agree" in out
        and "verdict  same model" in out
    )


def test_verify_finds_a_difference_and_exits_with_6(convert, golden, ckpt, tmp_path):
    shutil.copytree(golden / "hypenet", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, tmp_path / "hf/model.safetensors")
    code, out, err = convert("verify", tmp_path / "hf", ckpt, "--num-tokens", "16", "--json")
    record = json.loads(out)
    assert code == 6 and not record["ok"] and record["logits"]["first_diverging"] == "layer 2"
    assert record["tensors"]["different"] == ["model.layers.2.mlp.up_proj.weight"]
    assert "error:" in err and "are not the same model" in err
    code, out, _ = convert("verify", tmp_path / "hf", ckpt, "--tensors-only")
    assert (
        code == 6
        and "51 of 52 equal" in out
        and "verdict  DIFFERENT" in out
        and "logits" not in out
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "Usage"),
        (("improt",), 2, "improt"),
        (("import", "only-one"), 2, "CKPT_DIR"),
        (("verify", "a", "b", "--dtype", "int8"), 2, "--dtype int8: use one of float32, bfloat16"),
        (("import", "nowhere", "x"), 5, "nowhere: no config.json"),
        (("export", "nowhere", "x"), 5, "nowhere does not exist"),
    ],
)
def test_mistakes(convert, words, code, message):
    found, out, err = convert(*words)
    assert found == code and message in out + err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("keep", "keep"),
        ("off", None),
        ("hype 500", "hype 500"),
        ("hype", "hype"),
        ("1.5", 1.5),
        ("2e0", 2.0),
    ],
)
def test_scaling_words(text, value):
    assert parse_scaling(text) == value


@pytest.mark.parametrize("text", ["hyper", "hype 1", "0", "-3", "", "inf", "nan"])
def test_scaling_refuses(text):
    with pytest.raises(UsageError, match="attn-logits-scaling"):
        parse_scaling(text)


def test_script_is_the_same_command(repo_root):
    done = subprocess.run(
        [sys.executable, repo_root / "tools/convert.py", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "Import a Hugging Face model" in done.stdout
