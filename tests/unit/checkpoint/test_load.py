"""Reading parts of a checkpoint, and filling a model strictly."""

import threading

import pytest
import torch

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint import load, save
from megatron_hypenet.checkpoint import manifest as mf
from megatron_hypenet.checkpoint.state import TrainState
from megatron_hypenet.errors import CheckpointError


def test_read_weights_takes_a_subset_and_names_what_is_missing(run, tensors):
    got = load.read_weights(run, ["norm.weight"])
    assert list(got) == ["norm.weight"] and torch.equal(got["norm.weight"], tensors["norm.weight"])
    with pytest.raises(CheckpointError, match="lacks nope"):
        load.read_weights(run, ["nope"])


def test_load_model_splits_fused_parameters(run, tensors, fused_model):
    load.load_model(fused_model, run)
    assert torch.equal(fused_model.embed, tensors["embed.weight"])
    assert torch.equal(
        fused_model.linear, torch.cat([tensors["linear.weight.q"], tensors["linear.weight.k"]])
    )
    assert torch.equal(fused_model.norm, tensors["norm.weight"])


def test_load_model_casts_floating_dtypes(run, tensors, fused_model):
    load.load_model(fused_model.to(torch.bfloat16), run)
    assert torch.equal(fused_model.embed, tensors["embed.weight"].to(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("linear.weight.k"),
            "1 tensors of the model are not in it: linear.weight.k",
        ),
        (
            lambda t: t.update(extra=torch.ones(1)),
            "1 stored tensors have no place in the model: extra",
        ),
        (
            lambda t: t.update({"embed.weight": torch.ones(12, 8)}),
            r"stored \(12, 8\), model \(11, 8\)",
        ),
        (
            lambda t: t.update({"embed.weight": torch.ones(11, 8, dtype=torch.int64)}),
            "dtypes differ",
        ),
    ],
)
def test_load_model_is_strict(tmp_path, tensors, model_config, fused_model, change, message):
    change(tensors)
    save.write_weights(tmp_path / "ck", tensors, model_config, kind="student")
    with pytest.raises(CheckpointError, match=message):
        load.load_model(fused_model, tmp_path / "ck")
    assert torch.count_nonzero(fused_model.embed) == 0


def test_load_model_can_leave_stored_tensors_unused(tmp_path, tensors, model_config, fused_model):
    save.write_weights(
        tmp_path / "ck", {**tensors, "extra": torch.ones(1)}, model_config, kind="student"
    )
    load.load_model(fused_model, tmp_path / "ck", allow_unused=True)
    assert torch.equal(fused_model.embed, tensors["embed.weight"])


@pytest.fixture
def saved(tmp_path, make_engine, model_config):
    engine = make_engine().randomize(1)
    state = TrainState(stage="distill", step=7, samples=56, adam_step=7)
    return engine, save.begin_save(
        tmp_path / "iter_0000007", engine, state, model_config=model_config, kind="student"
    ).commit()


def test_load_training_restores_weights_states_and_generators(saved, make_engine, model_config):
    engine, folder = saved
    want = torch.rand(4)
    other = make_engine().randomize(2)
    state = load.load_training(folder, other, model_config=model_config, stage="distill")
    assert (state.step, state.samples, other.adam_step()) == (7, 56, 7)
    assert torch.equal(torch.rand(4), want)
    for mine, theirs in zip(other.template, engine.template, strict=True):
        assert torch.equal(mine.parameter, theirs.parameter)
    assert all(torch.equal(other.states[key], engine.states[key]) for key in engine.states)


def test_load_training_refuses_damage_and_other_runs(saved, make_engine, model_config):
    _, folder = saved
    engine = make_engine()
    with pytest.raises(CheckpointError, match="stage distill, not align"):
        load.load_training(folder, engine, model_config=model_config, stage="align")
    with pytest.raises(CheckpointError, match="another shape"):
        load.load_training(
            folder, engine, model_config=model_config.replace(vocab_size=12), stage="distill"
        )
    engine.module.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match="another precision"):
        load.load_training(folder, engine, model_config=model_config, stage="distill")
    data = next((folder / "optimizer").glob("*.distcp"))
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        load.load_training(folder, make_engine(), model_config=model_config, stage="distill")


def test_a_model_is_built_only_when_the_checkpoint_holds_as_many_values(tmp_path, model_config):
    values = {"all": torch.zeros(model_config.least_values)}
    save.write_weights(tmp_path / "whole", values, model_config, kind="teacher")
    assert load.read_whole_config(tmp_path / "whole") == model_config
    huge = model_config.replace(vocab_size=1 << 31, hidden_size=1 << 24)
    save.write_weights(tmp_path / "huge", values, huge, kind="teacher")
    with pytest.raises(
        CheckpointError, match="values, a model as its model.json describes has more than"
    ):
        load.read_whole_config(tmp_path / "huge")


def test_newest_of_run_cleans_up_and_takes_what_is_whole(run, tmp_path):
    folder = run / "checkpoints"
    assert load.newest_of_run(tmp_path / "nothing yet") is None
    (folder / ".iter_0000030.tmp-7").mkdir()
    assert load.newest_of_run(folder).name == "iter_0000020"
    assert sorted(entry.name for entry in folder.iterdir()) == ["iter_0000010", "iter_0000020"]
    # killed before the last rename
    (folder / "iter_0000020").rename(folder / ".iter_0000020.tmp-7")
    assert load.newest_of_run(folder).name == "iter_0000020"
    for entry in folder.iterdir():
        (entry / fmt.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        load.newest_of_run(folder)


@pytest.fixture
def ranks(monkeypatch):
    """Provide a function that runs a function on several ranks, which are threads, and gives what
    each returned or raised."""

    def run(size, work):
        own = threading.local()
        barrier = threading.Barrier(size, timeout=30)
        slots = [None] * size
        ended = [None] * size

        def gather(value):
            slots[own.rank] = value
            barrier.wait()
            everyone = list(slots)
            barrier.wait()
            return everyone

        monkeypatch.setattr(load, "distributed", lambda: True)
        monkeypatch.setattr(load.dist, "get_rank", lambda: own.rank)
        monkeypatch.setattr(load.dist, "get_world_size", lambda: size)
        monkeypatch.setattr(load, "gather_to_all", gather)
        monkeypatch.setattr("megatron_hypenet.parallel.agreement.gather_to_all", gather)

        def one(rank):
            own.rank = rank
            try:
                ended[rank] = work()
            except Exception as error:
                ended[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ended

    return run


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_share_the_hashing_and_all_hear_of_damage(run, ranks, monkeypatch, size):
    folder = run / "checkpoints" / "iter_0000020"
    hashed = []
    hash_file = mf.hash_file
    monkeypatch.setattr(mf, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    for _ in range(2):
        assert ranks(size, lambda: load.verify_together(folder)) == [None] * size
    assert sorted(hashed) == sorted(path.rsplit("/")[-1] for path in mf.read_manifest(folder).files)
    data = next(folder.rglob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)  # between two steps of one command
    for error in ranks(size, lambda: load.verify_together(folder)):
        assert isinstance(error, CheckpointError) and f"{data.name}: sha256 differs" in str(error)
    data.unlink()
    for error in ranks(size, lambda: load.verify_together(folder)):
        assert isinstance(error, CheckpointError) and f"{data.name}: missing" in str(error)


def test_one_rank_that_cannot_read_the_manifest_is_heard_by_all(run, ranks, monkeypatch):
    seen = []
    read = load.read_manifest

    def failing_once(folder):
        seen.append(folder)
        if len(seen) == 1:
            raise CheckpointError("no manifest on one rank")
        return read(folder)

    monkeypatch.setattr(load, "read_manifest", failing_once)
    ended = ranks(3, lambda: load.verify_together(run / "checkpoints" / "iter_0000020"))
    assert [str(error) for error in ended] == ["no manifest on one rank"] * 3
