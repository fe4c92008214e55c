"""The two verbs end to end: outcome, exit code, and nothing written where they refuse."""

import json

import pytest

from megatron_hypenet.cli.main import run


@pytest.fixture(scope="module")
def golden(repo_root):
    return repo_root / "tests/golden/data/tied_pow2"


@pytest.fixture(scope="module")
def ckpt(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron") / "ckpt"
    assert run(["convert", "import", str(golden / "qwen3"), str(folder)]) == 0
    return folder


@pytest.fixture
def convert(capsys):
    """convert(*words) -> (exit code, stdout, stderr)."""

    def call(*words):
        code = run(["convert", *map(str, words)])
        return code, *capsys.readouterr()

    return call


def test_to_megatron_and_back(convert, golden, ckpt, tmp_path):
    code, out, err = convert("to-megatron", ckpt, tmp_path / "m", "--tp", 2, "--json")
    record = json.loads(out)
    assert code == 0, err
    assert (record["kind"], record["tensors"], record["padded_vocab_size"]) == ("megatron", 34, 512)
    code, out, err = convert("from-megatron", tmp_path / "m", tmp_path / "back")
    assert code == 0 and "note: a Megatron checkpoint has no tokenizer" in err
    assert out.startswith("teacher: 4 layers (4 softmax), hidden 64, heads 4/2, vocabulary 320")
    words = ("--hf", golden / "qwen3", "--overwrite", "--json")
    code, out, _ = convert("from-megatron", tmp_path / "m", tmp_path / "back", *words)
    assert code == 0 and json.loads(out)["notes"] == []
    assert run(["ckpt", "diff", str(ckpt), str(tmp_path / "back")]) == 0


def test_dry_runs_write_nothing(convert, ckpt, tmp_path):
    code, out, _ = convert("to-megatron", ckpt, tmp_path / "m", "--dry-run")
    assert code == 0 and f"nothing was written to {tmp_path / 'm'}" in out
    assert list(tmp_path.iterdir()) == []
    assert convert("to-megatron", ckpt, tmp_path / "m")[0] == 0
    code, out, _ = convert("from-megatron", tmp_path / "m", tmp_path / "x", "--dry-run")
    assert code == 0 and "nothing was written" in out
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_refusals_have_the_code_of_a_checkpoint_that_does_not_fit(convert, golden, ckpt, tmp_path):
    code, _, err = convert("to-megatron", golden / "qwen3", tmp_path / "m")
    assert code == 5 and "import it first" in err
    code, _, err = convert("from-megatron", ckpt, tmp_path / "x")
    assert code == 5 and "is no Megatron checkpoint" in err
    (tmp_path / "m").mkdir()
    code, _, err = convert("to-megatron", ckpt, tmp_path / "m")
    assert code == 5 and "already exists" in err
    assert convert("import", golden / "hypenet", tmp_path / "student")[0] == 0
    code, _, err = convert("to-megatron", tmp_path / "student", tmp_path / "n")
    assert code == 5 and "is a HypeNet student" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "student"]


@pytest.mark.parametrize("words", [["--tp", "0"], ["--make-vocab-size-divisible-by", "0"]])
def test_a_padding_of_nothing_is_a_usage_error(convert, ckpt, tmp_path, words):
    assert convert("to-megatron", ckpt, tmp_path / "m", *words)[0] == 2
