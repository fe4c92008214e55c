"""One process needs no torch.distributed; tests/distributed/test_checkpoint_layouts.py has
several."""

import errno

import pytest

from megatron_hypenet.checkpoint.format import error_of_save
from megatron_hypenet.errors import CheckpointError, SetupError
from megatron_hypenet.parallel import agreement


def test_one_process_is_first_and_alone():
    assert not agreement.distributed() and agreement.is_first() and agreement.rank() == 0
    assert (
        agreement.from_first(3) == 3
        and agreement.gather_to_first(3) == [3]
        and agreement.gather_to_all("x") == ["x"]
    )


def test_own_failures_stay_what_they_are():
    agreement.agree(None)
    with pytest.raises(ZeroDivisionError):
        agreement.agree(ZeroDivisionError("x"))


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, SetupError), (errno.EIO, CheckpointError)]
)
def test_failures_of_the_disk_become_errors_for_the_user(tmp_path, number, kind):
    with (
        pytest.raises(kind, match="older checkpoints are untouched"),
        agreement.failing_together(error_of_save(tmp_path / "iter_0000001")),
    ):
        raise OSError(number, "no luck")


def test_another_process_s_failure_is_raised_here_with_its_exit_code(monkeypatch):
    for of_machine, kind in ((True, SetupError), (False, CheckpointError)):
        monkeypatch.setattr(
            agreement,
            "gather_to_all",
            lambda own, told=of_machine: [own, (told, "disk of the other one")],
        )
        with pytest.raises(kind, match="disk of the other one"):
            agreement.agree(None)


def test_what_the_first_decides_holds_for_all_its_failures_too(monkeypatch):
    assert agreement.decided_by_first(lambda: (1, None)) == (1, None)
    with pytest.raises(ZeroDivisionError):
        agreement.decided_by_first(lambda: 1 / 0)
    monkeypatch.setattr(agreement, "is_first", lambda: False)
    monkeypatch.setattr(agreement, "from_first", lambda own: "the first one's")
    assert agreement.decided_by_first(pytest.fail) == "the first one's"
