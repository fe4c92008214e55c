import json

import pytest
import torch

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint import save
from megatron_hypenet.cli.main import run
from megatron_hypenet.config.model import ModelConfig
from tests.tiny import tiny_teacher_config


@pytest.fixture
def ckpt(capsys):
    """ckpt(*words) -> (exit code, stdout, stderr)."""

    def call(*words):
        code = run(["ckpt", *map(str, words)])
        return code, *capsys.readouterr()

    return call


def write(folder, *, scale=1.0, config: ModelConfig | None = None):
    weight = torch.arange(6.0).view(2, 3) * scale
    tensors = {"a.weight": weight, "b.weight": torch.ones(4, dtype=torch.bfloat16)}
    return save.write_weights(folder, tensors, config or tiny_teacher_config(), kind="teacher")


@pytest.fixture
def stage(tmp_path):
    for step, scale in ((10, 1.0), (20, 2.0)):
        write(tmp_path / "run" / "distill" / "checkpoints" / fmt.iteration_name(step), scale=scale)
    return tmp_path / "run" / "distill"


def test_ls_shows_every_checkpoint_and_its_state(ckpt, stage):
    (stage / "checkpoints" / "iter_0000010" / fmt.COMMITTED).unlink()
    code, out, _ = ckpt("ls", stage.parent)
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == [
        "CHECKPOINT",
        "STAGE",
        "STEP",
        "SIZE",
        "STATE",
        "WRITTEN",
        "BY",
        "DATE",
    ]
    assert "distill/checkpoints/iter_0000010" in lines[1] and " uncommitted " in lines[1]
    assert (
        " 20 " in lines[2]
        and " committed " in lines[2]
        and lines[3].startswith("iter_0000010: uncommitted: ")
    )
    code, out, _ = ckpt("ls", stage, "--json")
    assert [one["state"] for one in json.loads(out)["checkpoints"]] == ["uncommitted", "committed"]


def test_ls_of_nothing(ckpt, tmp_path):
    assert ckpt("ls", tmp_path)[:2] == (0, f"no checkpoint in {tmp_path}\n")
    assert ckpt("ls", tmp_path / "none")[0] == 5


def test_inspect_shows_what_it_holds(ckpt, stage):
    code, out, _ = ckpt("inspect", stage, "--hashes", "--tensors")
    assert code == 0 and "iter_0000020" in out and "all hashes verified" in out
    assert (
        "mixers      0-1 attn" in out
        and "weights     2 tensors, 10 elements, bfloat16, float32" in out
    )
    assert "weights/a.weight  float32 [2, 3] in 1 piece" in out
    code, out, _ = ckpt("inspect", stage / "checkpoints" / "iter_0000010", "--json", "--tensors")
    shown = json.loads(out)
    assert shown["step"] == 10 and shown["tensors"]["weights"]["b.weight"] == {
        "shape": [4],
        "dtype": "bfloat16",
        "pieces": 1,
    }
    assert "tensors" not in json.loads(ckpt("inspect", stage, "--json")[1])


def test_inspect_of_damage_exits_5(ckpt, stage):
    newest = stage / "checkpoints" / "iter_0000020"
    data = next(newest.rglob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert ckpt("inspect", newest)[0] == 0  # sizes agree
    code, out, err = ckpt("inspect", newest, "--hashes")
    assert code == 5 and "state       damaged" in out and "sha256 differs" in err
    data.unlink()
    code, out, err = ckpt("inspect", newest, "--json")
    assert code == 5 and json.loads(out)["state"] == "damaged" and "missing" in err
    assert ckpt("inspect", stage / "nowhere")[0] == 5


def test_diff_says_same_or_exits_6(ckpt, stage, tmp_path):
    one, other = (stage / "checkpoints" / f"iter_00000{step}" for step in (10, 20))
    code, out, _ = ckpt("diff", one, one)
    assert code == 0 and out.endswith("verdict     same: 2 of 2 common tensors equal bit for bit\n")
    code, out, err = ckpt("diff", one, stage)
    assert (
        code == 6
        and "tensor      a.weight: max abs diff 5, relative 1" in out
        and "verdict     DIFFERENT: 1 of 2" in out
    )
    assert "differ" in err
    code, out, _ = ckpt("diff", one, other, "--json", "--weights-only")
    assert code == 6 and json.loads(out)["differing"][0]["max_abs_diff"] == 5.0
    bigger = write(tmp_path / "bigger", config=tiny_teacher_config(3))
    code, out, _ = ckpt("diff", one, bigger)
    assert code == 6 and "model       num_layers: 2 | 3" in out


def test_long_lists_are_cut(ckpt, tmp_path):
    for name, at in (("a", 0.0), ("b", 1.0)):
        save.write_weights(
            tmp_path / name,
            {f"w{i:02}": torch.full((2,), at * i) for i in range(30)},
            tiny_teacher_config(),
            kind="t",
        )
    code, out, _ = ckpt("diff", tmp_path / "a", tmp_path / "b")
    assert (
        code == 6
        and "... and 9 more (see --json)" in out
        and "largest     w29: max abs diff 29" in out
    )


def test_prune_deletes_older_saves_and_leaves_damaged_ones(ckpt, stage):
    saves = stage / "checkpoints"
    write(saves / fmt.iteration_name(30))
    write(saves / fmt.iteration_name(40))
    (saves / fmt.iteration_name(40) / "model.json").unlink()
    write(stage.parent / "teacher")
    code, out, _ = ckpt("prune", stage.parent, "--keep-every", "10", "--dry-run")
    assert code == 0 and out.startswith("0 checkpoints")
    code, out, _ = ckpt("prune", stage.parent, "--dry-run", "--json")
    would = json.loads(out)
    assert [path[-2:] for path in would["deleted"]] == ["10", "20"] and would["bytes"] > 0
    assert len(list(saves.iterdir())) == 4
    code, out, _ = ckpt("prune", stage.parent, "--weights-only")
    assert code == 0 and out.count("\ndeleted") == 1 and "iter_0000030" in out
    assert sorted(path.name[-2:] for path in saves.iterdir()) == ["30", "40"]
    assert ckpt("inspect", saves / fmt.iteration_name(30), "--hashes")[0] == 0


def test_a_run_under_way_is_not_pruned(ckpt, stage):
    from megatron_hypenet.ownership import owning

    with owning(stage.parent, inside=True):
        import subprocess
        import sys

        done = subprocess.run(
            [sys.executable, "-m", "megatron_hypenet", "ckpt", "prune", str(stage)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2 and "is in use by" in done.stderr
    assert ckpt("prune", stage.parent / "nowhere")[0] == 5
