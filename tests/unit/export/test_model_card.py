import os

import pytest
import yaml

from megatron_hypenet.checkpoint import load, save
from megatron_hypenet.checkpoint.manifest import TEACHER_LICENSE
from megatron_hypenet.export import model_card
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.to_hf import export_hf

REPORT = {
    "seq_length": 256,
    "rows": [
        {"model": "teacher", "heldout_loss": 3.1, "recall": {"1": 100.0, "4": 1.25}},
        {"model": "student after stage 3", "heldout_loss": 3.2, "recall": {"1": 99.0, "4": 90.0}},
    ],
}


@pytest.fixture
def exported(hf_model, tmp_path):
    """exported(card of the source folder) -> the Hugging Face folder of a student."""

    def run(card=None):
        source = hf_model(student=True).write(tmp_path / "source")
        if card is not None:
            (source / "README.md").write_text(card)
        import_hf(source, tmp_path / "ckpt")
        export_hf(tmp_path / "ckpt", tmp_path / "hf")
        return tmp_path / "hf"

    return run


def header_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_says_what_the_model_is_and_how_to_use_it(exported):
    card = (exported() / "README.md").read_text()
    assert header_of(card)["library_name"] == "transformers" and "license" not in header_of(card)
    for line in (
        "| layers | 1 attn, 2 lightning-attn |",
        "| softmax attention in layers | 1 |",
        "| licence of the teacher | not recorded |",
        "trust_remote_code=True",
        "vllm serve .",
    ):
        assert line in card
    assert "Figures" not in card and "tokens of training" not in card


def test_names_teacher_tokens_and_licence_of_a_run(tmp_path, hf_model):
    model = hf_model(student=True)
    stage = "{train_iters: 10, global_batch_size: 4, seq_length: 100}"
    import_hf(model.write(tmp_path / "source"), tmp_path / "first")
    save.write_weights(
        tmp_path / "ckpt",
        load.read_weights(tmp_path / "first"),
        model.model,
        kind="finetune",
        extra={TEACHER_LICENSE: "apache-2.0"},
    )
    (tmp_path / "ckpt" / "config.yaml").write_text(
        f"teacher: /models/Qwen3\nalign: {stage}\nfinetune: {{train_iters: many}}\n"
    )
    manifest = load.read_manifest(tmp_path / "ckpt")
    card = model_card.model_card(model.model, tmp_path / "ckpt", manifest)
    assert header_of(card)["license"] == "apache-2.0"
    assert "| teacher | /models/Qwen3 |" in card
    assert "| licence of the teacher | apache-2.0 |" in card
    assert "| tokens of training | align 4,000, finetune: not recorded |" in card


def test_figures_follow_and_replace_earlier_ones(exported):
    folder = exported()
    before = (folder / "README.md").read_text()
    model_card.add_figures(folder, {**REPORT, "rows": REPORT["rows"][:1]})
    model_card.add_figures(folder, REPORT)
    after = (folder / "README.md").read_text()
    assert after.startswith(before) and after.count("## Figures") == 1
    assert "| model | held-out loss | recall at 256 | recall at 1,024 |" in after
    assert "| student after stage 3 | 3.2000 | 99.0 | 90.0 |" in after


def test_a_folder_without_a_card_stays_without(tmp_path):
    model_card.add_figures(tmp_path, REPORT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: apache-2.0\n---\ntext", "apache-2.0"),
        ("---\r\ntags: [a]\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("# text\nlicense: mit\n", None),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("---\nlicense: [mit, x]\n---\n", None),
        ("---\nlicense: mit\n", None),
        (None, None),
    ],
)
def test_licence_of_a_card(exported, tmp_path, card, found):
    card_of_student = (exported(card) / "README.md").read_text()
    assert model_card.stated_license(tmp_path / "source") == found
    assert header_of(card_of_student).get("license") == found


def test_a_card_that_is_no_file_of_the_folder_states_nothing(tmp_path):
    private = tmp_path / "private.md"
    private.write_text("---\nlicense: secret\n---\n")
    folder = tmp_path / "model"
    folder.mkdir()
    card = folder / "README.md"
    card.symlink_to(private)
    assert model_card.stated_license(folder) is None
    card.unlink()
    os.mkfifo(card)
    assert model_card.stated_license(folder) is None
