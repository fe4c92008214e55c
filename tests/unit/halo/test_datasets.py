"""The text of a run, from files to training sequences and held-out text."""

import pytest
import torch

from megatron_hypenet.cli.pipeline import import_teacher
from megatron_hypenet.errors import DataError
from megatron_hypenet.halo import datasets
from megatron_hypenet.halo.run_folder import RunFolder
from tests import tiny_run
from tests.unit.halo.test_run_folder import STAGE, config

SHORT = {"recall_sequences": 2, "heldout_sequences": 2, "seq_length": 128, "recall_pairs": 2}


@pytest.fixture(scope="module")
def world(repo_root, tmp_path_factory):
    """Provide a run folder with the bundled teacher imported, and a text of its own."""
    root = tmp_path_factory.mktemp("datasets")
    folder = RunFolder(root / "run")
    import_teacher(repo_root / "assets" / "tiny-qwen3", folder.teacher)
    text = root / "text.txt"
    text.write_text((repo_root / "assets" / "tiny-qwen3" / "sample.txt").read_text()[:60_000])
    return folder, text


def run_config(folder, text, seq_length=128, **data):
    stage = {**STAGE, "seq_length": seq_length}
    sections = {name: stage for name in ("align", "distill", "finetune")}
    return config(
        folder.root,
        data={"train": [str(text)], "heldout_fraction": 0.3, **data},
        **sections,
        select=SHORT,
        eval=SHORT,
    )


def test_text_becomes_sequences_and_heldout_material(world):
    folder, text = world
    run = run_config(folder, text, recall_fraction=0.5)
    counts = datasets.prepare(run, folder, lambda line: None)
    assert counts["train_tokens"] > 10_000
    source = datasets.training_data(run, folder)
    batch = source.batch(6, 4, 128)
    assert batch.shape == (4, 129) and batch.dtype == torch.int64 and int(batch.max()) < 2048
    assert torch.equal(batch[2:], source.batch(8, 2, 128))
    measured = datasets.measure(run, folder)
    assert measured.heldout(3, 64).shape == (3, 65)
    ids, answers = measured.task(4).batch(0, 2, 128)
    assert ids.shape == (2, 129) and answers.shape == (2, 4)


def test_text_too_short_to_hold_out_is_found_at_once(world, tmp_path):
    folder, _ = world
    short = tmp_path / "short.txt"
    short.write_text("one line\n")
    with pytest.raises(DataError, match="no held-out text"):
        datasets.prepare(
            run_config(folder, short), RunFolderWith(folder, tmp_path / "data"), lambda line: None
        )


def test_what_does_not_fit_a_late_stage_is_found_at_once(world, tmp_path):
    folder, text = world
    elsewhere = RunFolderWith(folder, tmp_path / "data")
    with pytest.raises(DataError) as caught:
        datasets.prepare(run_config(folder, text, seq_length=100_000), elsewhere, lambda line: None)
    for name in ("align", "distill", "finetune"):
        assert f"{name}.seq_length=100000: the training text has" in str(caught.value)
    # recall documents need no text to be tokenized first
    said = []
    with pytest.raises(
        DataError, match="align.seq_length=32: a recall document with 8 facts needs at least"
    ):
        datasets.prepare(
            run_config(folder, text, seq_length=32, recall_fraction=0.5),
            RunFolderWith(folder, tmp_path / "other"),
            said.append,
        )
    assert not any("tokenizing" in line for line in said)


def test_only_what_the_method_of_selection_reads_has_to_fit(world):
    """uniform reads nothing, gates training text, and halo held-out text and recall documents."""
    folder, text = world
    datasets.prepare(run_config(folder, text), folder, lambda line: None)

    def check(**select):
        run = run_config(folder, text)
        run = run.model_copy(update={"select": run.select.model_copy(update=select)})
        datasets.check_lengths(run, folder)

    for method, said in [
        ("halo", "select.seq_length=100000: the held-out text has"),
        ("kl", "select.seq_length=100000: the held-out text has"),
        ("gates", "select.seq_length=100000: the training text has"),
    ]:
        check(method=method)
        with pytest.raises(DataError, match=said):
            check(method=method, seq_length=100_000)
    check(method="uniform", seq_length=100_000, recall_pairs=1000)
    check(method="kl", recall_pairs=100)
    for method in ("halo", "gates"):
        with pytest.raises(DataError, match="needs at least"):
            check(method=method, recall_pairs=100)


def test_gates_learn_from_recall_documents_in_a_share_of_their_own(world):
    folder, text = world
    run = run_config(folder, text)
    assert run.data.recall_fraction == 0.0
    samples = datasets.selection_samples(run, folder)
    counted = samples.predicted(0, 4, 128).sum(dim=1)
    assert sorted(counted.tolist())[2:] == [128, 128] and 2 <= counted.min() <= counted.max()
    assert sorted(counted.tolist())[1] < 128


def test_a_teacher_without_tokenizer_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    import_teacher(tiny_run.write_teacher(tmp_path / "qwen3"), folder.teacher)
    text = tmp_path / "text.txt"
    text.write_text("text\n")
    with pytest.raises(DataError, match="has no tokenizer files"):
        datasets.prepare(run_config(folder, text), folder, lambda line: None)


class RunFolderWith:
    """A run folder's teacher with data elsewhere."""

    def __init__(self, folder, data):
        self.teacher = folder.teacher
        self.data = data
