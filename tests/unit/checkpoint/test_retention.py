"""Old saves go, the newest and the marked ones stay."""

import shutil

import pytest

from megatron_hypenet.atomic_files import sweep
from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import read_manifest, verify_files, write_manifest
from megatron_hypenet.checkpoint.retention import drop_optimizer, finish, prune


@pytest.fixture
def parent(tmp_path):
    for step in (10, 20, 30, 40, 50):
        with fmt.staged(tmp_path / fmt.iteration_name(step)):
            pass
    (tmp_path / fmt.iteration_name(60)).mkdir()  # never committed
    (tmp_path / fmt.iteration_name(70)).symlink_to(tmp_path / fmt.iteration_name(10))
    return tmp_path


def left(parent):
    return sorted(fmt.iteration_of(entry) for entry in parent.iterdir())


def test_keeps_the_newest_and_never_touches_uncommitted_or_links(parent):
    prune(parent, keep_last=2)
    assert left(parent) == [40, 50, 60, 70]


def test_keeps_multiples(parent):
    assert [folder.name for folder in prune(parent, keep_last=1, keep_every=20)] == [
        "iter_0000010",
        "iter_0000030",
    ]
    assert left(parent) == [20, 40, 50, 60, 70]


def test_never_removes_the_newest(parent):
    prune(parent, keep_last=0)
    assert left(parent) == [50, 60, 70]


def test_a_deletion_that_was_cut_short_is_not_undone(parent, monkeypatch):
    """Killed while files go: the marker may still be there, the weights not."""

    def killed(folder, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(parent, keep_last=4)
    monkeypatch.undo()
    (half,) = parent.glob(".iter_0000010.*")
    assert fmt.is_committed(half)
    assert fmt.remove_stale(parent) == [half]
    assert left(parent) == [20, 30, 40, 50, 60, 70]


def test_a_sweep_deletes_the_rest(parent, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: None)
    prune(parent, keep_last=4)
    monkeypatch.undo()
    sweep(parent)
    assert left(parent) == [20, 30, 40, 50, 60, 70]


def save(folder, step):
    target = folder / fmt.iteration_name(step)
    with fmt.staged(target) as temporary:
        for name in ("weights/a", "optimizer/a", "optimizer/b", "model.json"):
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(f"{name} {step}")
        write_manifest(temporary, kind="student", stage="align")
    return target


def test_the_optimizer_state_goes_and_the_rest_is_verified(tmp_path):
    folder = save(tmp_path, 10)
    before = read_manifest(folder)
    assert drop_optimizer(folder) == 2 * len("optimizer/a 10")
    verify_files(folder, hashes=True)
    after = read_manifest(folder)
    assert set(after.files) == {"weights/a", "model.json"} and not (folder / "optimizer").exists()
    assert (after.created, after.git_commit, after.stage) == (
        before.created,
        before.git_commit,
        before.stage,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000010"]
    assert drop_optimizer(folder) == 0


def test_a_finished_stage_keeps_the_weights_of_its_last_save(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    assert finish(tmp_path) > 0 and left(tmp_path) == [20] and finish(tmp_path) == 0
    (tmp_path / "empty").mkdir()
    assert finish(tmp_path / "empty") == 0
