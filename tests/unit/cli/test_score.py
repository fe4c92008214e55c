"""`hypenet score` as a user starts it."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.cli.main import run
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from tests.tiny import tiny_model_config, whole_tensors

# two processes can split it
CONFIG = tiny_model_config(attn_logits_scaling="hype 5", num_query_groups=2, vocab_size=62)


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, ParallelConfig(), dtype=torch.float64, seed=3)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("score") / "checkpoint"
    write_weights(folder, whole_tensors(model), model.model_config, kind="student")
    return folder


@pytest.fixture
def ids():
    return torch.randint(0, CONFIG.vocab_size, (3, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokens(tmp_path, ids):
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": ids}, path)
    return path


def score(checkpoint, tokens, out, *words):
    return run(["score", str(checkpoint), "--tokens", str(tokens), "--out", str(out), *words])


def test_float64_scores_are_those_of_the_model(model, checkpoint, tokens, ids, tmp_path):
    with torch.no_grad():
        logits = model(ids)
    nll = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(3, 9)
    assert (
        score(
            checkpoint,
            tokens,
            tmp_path / "out.safetensors",
            "--dtype",
            "float64",
            "--batch-size",
            "2",
        )
        == 0
    )
    got = load_file(tmp_path / "out.safetensors")
    assert (
        set(got) == {"logits", "nll"} and got["logits"].dtype == got["nll"].dtype == torch.float64
    )
    torch.testing.assert_close(got["logits"], logits, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got["nll"], nll, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_other_dtypes_are_near(checkpoint, tokens, ids, tmp_path, dtype, tolerance):
    assert score(checkpoint, tokens, tmp_path / "exact", "--dtype", "float64") == 0
    assert score(checkpoint, tokens, tmp_path / "got", "--dtype", dtype) == 0
    exact, got = load_file(tmp_path / "exact"), load_file(tmp_path / "got")
    for name in exact:
        assert got[name].dtype == getattr(torch, dtype)
        torch.testing.assert_close(got[name].double(), exact[name], rtol=tolerance, atol=tolerance)


def test_int32_ids_and_json(checkpoint, ids, tmp_path, capsys):
    save_file({"input_ids": ids.int()}, tmp_path / "ids")
    assert score(checkpoint, tmp_path / "ids", tmp_path / "out", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["sequences"] == 3 and shown["mean_nll"] == pytest.approx(
        load_file(tmp_path / "out")["nll"].double().mean().item()
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": torch.tensor([[1, 62]])}, "first 62 at [0, 1]"),
        ({"input_ids": torch.tensor([[1, 2], [-1, 3]])}, "first -1 at [1, 0]"),
        ({"input_ids": torch.tensor([[1.0, 2.0]])}, "is float32"),
        ({"input_ids": torch.tensor([1, 2])}, "shape [2]"),
        ({"input_ids": torch.tensor([[1]])}, "T >= 2"),
        ({"ids": torch.tensor([[1, 2]])}, "no tensor named input_ids"),
    ],
)
def test_bad_ids_are_refused_and_nothing_is_written(checkpoint, tmp_path, tensors, message, capsys):
    save_file(tensors, tmp_path / "bad")
    assert score(checkpoint, tmp_path / "bad", tmp_path / "out") == 5
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_files_that_are_missing_or_in_the_way(checkpoint, tokens, tmp_path, capsys):
    assert score(checkpoint, tmp_path / "none", tmp_path / "out") == 5
    assert score(tmp_path / "none", tokens, tmp_path / "out") == 5
    (tmp_path / "out").write_text("mine")
    assert score(checkpoint, tokens, tmp_path / "out") == 2
    assert (tmp_path / "out").read_text() == "mine"
    assert score(checkpoint, tokens, tmp_path / "out", "--overwrite") == 0


def test_dry_run_checks_and_writes_nothing(checkpoint, tokens, tmp_path, capsys):
    assert score(checkpoint, tokens, tmp_path / "out", "--dry-run") == 0
    assert (
        json.loads(
            capsys.readouterr()
            .out.splitlines()[-1]
            .removeprefix("launch: ")
            .replace("None", "null")
        )
        is None
    )
    assert score(checkpoint, tokens, tmp_path / "out", "--dry-run", "--cp", "2", "--json") == 0
    launch = json.loads(capsys.readouterr().out)["launch"]
    assert launch["command"].endswith("--cp 2 --json") and [
        own["RANK"] for own in launch["processes"]
    ] == ["0", "1"]
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["--tp 2 --sp", "--pp 2", "--cp 2", "--tp 2 --pp 2"])
def test_any_layout_gives_the_numbers_of_one_process(checkpoint, tmp_path, layout, capfd):
    ids = torch.randint(0, CONFIG.vocab_size, (3, 11), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, tmp_path / "ids")
    words = ("--dtype", "float64", "--batch-size", "2", "--json")
    assert score(checkpoint, tmp_path / "ids", tmp_path / "one", *words) == 0
    capfd.readouterr()
    assert score(checkpoint, tmp_path / "ids", tmp_path / "many", *words, *layout.split()) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["sequences"] == 3  # one process speaks
    one, many = load_file(tmp_path / "one"), load_file(tmp_path / "many")
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-12, atol=1e-13)


@pytest.mark.distributed
def test_a_failure_in_several_processes_writes_nothing_and_keeps_its_code(
    checkpoint, tokens, tmp_path, capfd
):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    shard = next((damaged / "weights").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert score(damaged, tokens, tmp_path / "out", "--cp", "2") == 5
    assert (
        "sha256 differs from the manifest" in capfd.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_layouts_the_model_does_not_allow_are_refused(checkpoint, tokens, tmp_path, capsys):
    for words, rule in (
        ("--tp 3", "tensor-slices"),
        ("--pp 3", "pipeline-layers"),
        ("--sp", "sequence-parallel"),
    ):
        assert score(checkpoint, tokens, tmp_path / "out", *words.split()) == 3
        assert f"error: {rule}: " in capsys.readouterr().err


def test_places_that_cannot_be_written_are_refused_before_any_work(
    checkpoint, tokens, tmp_path, capsys
):
    (tmp_path / "file").write_text("x")
    assert score(checkpoint, tokens, tmp_path / "file" / "out") == 2
    assert "file is a file, not a folder" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert score(checkpoint, tokens, tmp_path / "folder", "--overwrite") == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


def test_a_flipped_byte_is_noticed(checkpoint, tokens, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    shard = next((damaged / "weights").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert score(damaged, tokens, tmp_path / "out") == 5
    assert (
        "sha256 differs from the manifest" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )
