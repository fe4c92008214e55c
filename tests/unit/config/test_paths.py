import pwd
from pathlib import Path

import pytest

from megatron_hypenet.config.paths import download_hint, expanded


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("AGAIN", "/x/$SCRATCH")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs/x", "/home/me/runs/x"), ("~", "/home/me"),
        ("~root/x", f"{pwd.getpwnam('root').pw_dir}/x"), ("a/~b", "a/~b"),
        ("$SCRATCH/x", "/scratch/x"), ("${SCRATCH}/x", "/scratch/x"),
        ("a-${SCRATCH}b$SCRATCH", "a-/scratchb/scratch"),
        ("cost$", "cost$"), ("a$1", "a$1"), ("a b #c", "a b #c"), (".", "."), ("runs/x", "runs/x"),
    ],
)  # fmt: skip
def test_paths_mean_what_they_mean_in_a_shell(text, path):
    assert expanded(text) == Path(path) == expanded(expanded(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("~nosuchuser/x", "begins with ~nosuchuser, and there is no such user"),
        ("$UNSET/x", "names the variable UNSET, which is not set"),
        ("${UNSET}/x", "UNSET, which is not set"),
        ("$EMPTY/x", "EMPTY, which is empty"),
        ("${SCRATCH:-x}/x", "which is no variable"),
        ("${SCRATCH/x", "which is no variable"),
        ("${}/x", "which is no variable"),
        ("./~", "begins with ~"),
        ("$AGAIN", "variables stand again"),
        ("", "is empty"), ("  ", "is empty"), ("a\nb", "control character"),
        ("a\0b", "control character"),
    ],
)  # fmt: skip
def test_what_stands_for_nothing_is_refused_by_name(text, says):
    with pytest.raises(ValueError, match=r".") as caught:
        expanded(text)
    assert says in str(caught.value)


def test_names_of_the_hub_get_the_command_that_downloads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hint = download_hint(Path("Qwen/Qwen3-0.6B"))
    assert "`hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B`, then name Qwen3-0.6B" in hint
    assert "--repo-type dataset --local-dir text" in download_hint("lab/text", what="dataset")
    (tmp_path / "runs").mkdir()
    for other in ("runs/missing", "Qwen3-0.6B", "/models/x", "a/b/c", "../x", "./Qwen/x y"):
        assert download_hint(other) == ""
