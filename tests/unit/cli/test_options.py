import pytest

from megatron_hypenet.cli.main import run
from megatron_hypenet.cli.options import collect_overrides


def test_layout_options_become_overrides_after_the_words():
    words = collect_overrides(["seed=1", "parallel.tensor_model_parallel_size=4"], tp=2, cp=8)
    assert words == [
        "seed=1",
        "parallel.tensor_model_parallel_size=4",
        "parallel.tensor_model_parallel_size=2",
        "parallel.context_parallel_size=8",
    ]


def test_nothing_given():
    assert collect_overrides(None) == []


@pytest.mark.parametrize("axis", ["--tp", "--pp", "--cp"])
def test_an_axis_has_at_least_one_process(axis, capsys):
    assert run(["score", "ckpt", "--tokens", "ids", "--out", "out", axis, "0"]) == 2
    assert axis in capsys.readouterr().err


def test_paths_of_every_verb_are_expanded_or_refused_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path / "there"))
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.yaml").write_text("num_layers: 1\n")
    for _ in range(2):
        assert run(["config", "validate", "~/model.yaml"]) == 3
        assert f"{tmp_path}/model.yaml: hidden_size: missing" in capsys.readouterr().err
    assert (
        run(["data", "merge", "out", "a", "${PLACE}/b", "--dry-run"]) == 5
        and "a.bin: no such file" in capsys.readouterr().err
    )
    assert (
        run(["data", "merge", "out", "$PLACE/a", "b"]) == 5
        and f"{tmp_path}/there/a.bin: no such file" in capsys.readouterr().err
    )
    for words in (
        ["data", "merge", "$UNSET/x", "a"],
        ["ckpt", "ls", "${UNSET}"],
        ["score", "c", "--tokens", "t", "--out=$UNSET/o"],
    ):
        assert run(words) == 2 and "the variable UNSET, which is not set" in capsys.readouterr().err
    assert (
        run(["ckpt", "ls", "~nosuchuser/x"]) == 2
        and "there is no such user" in capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.yaml"]
