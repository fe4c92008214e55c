import pytest

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.find import resolve
from megatron_hypenet.checkpoint.places import is_run, run_around, run_of, trained_in
from megatron_hypenet.errors import CheckpointError, DataError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that has saved in all its stages, seen from the folder that holds runs/."""
    monkeypatch.chdir(tmp_path)
    for part in ("align/checkpoints/iter_0000002", "distill/checkpoints/iter_0000003", "assembled"):
        folder = tmp_path / "runs" / "a" / part
        folder.mkdir(parents=True)
        (folder / fmt.COMMITTED).touch()
        (folder / fmt.CONFIG).touch()  # as training leaves it
    (tmp_path / "runs" / "a" / fmt.CONFIG).write_text("x: 1\n")
    (tmp_path / "runs" / "a" / "export").mkdir()
    return tmp_path / "runs" / "a"


@pytest.mark.parametrize(
    "inside", ["", "distill", "export", "distill/checkpoints", "distill/checkpoints/iter_0000003"]
)
def test_the_run_around_a_folder_is_found(run, inside, monkeypatch):
    assert run_of(run / inside) == run
    relative = (run / inside).relative_to(run.parents[1])
    assert str(run_of(relative)) == "runs/a"
    monkeypatch.chdir(run / inside)
    assert run_of(relative.__class__(".")).resolve() == run


def test_what_is_no_run_is_refused_with_what_was_looked_for(run):
    with pytest.raises(DataError, match=r"runs is not a run folder, .*config.yaml.* runs: a$"):
        run_of(run.parent)
    with pytest.raises(DataError, match="nothing does not exist; give the output_dir of a run$"):
        run_of(run.parents[1] / "nothing")
    far = run / "align" / "checkpoints" / "iter_0000002" / "weights"
    far.mkdir()
    assert run_around(far) is None and not is_run(far.parent)


def test_a_run_stands_for_the_student_that_it_made_last(run, monkeypatch):
    names = [folder.name for folder in trained_in(run)]
    assert names == ["distill", "assembled", "align"]
    # to start from, the newest of something is a guess
    with pytest.raises(CheckpointError, match=r"is a run; say which .*distill, .*assembled, .*al"):
        resolve(run, fall_back=False)


def test_a_run_without_a_checkpoint_says_how_to_go_on(run, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / fmt.CONFIG).touch()
    with pytest.raises(CheckpointError, match="no checkpoint .* `hypenet run .*new/config.yaml`"):
        resolve(tmp_path / "new")
