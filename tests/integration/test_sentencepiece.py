"""A teacher whose tokenizer is a SentencePiece model and nothing else: prepared, trained, exported
and loaded again."""

import io
import json
from dataclasses import dataclass

import pytest
import sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_hypenet.cli.main import run
from megatron_hypenet.data.encode import token_lists
from megatron_hypenet.data.indexed import open_tokens
from tests import tiny_run
from tests.tiny import tiny_teacher_config

ADDED = "<|turn|>"
TEXTS = [
    "Hello world, this is a test.",
    "two lines\nand a\ttab",
    "caf\u00e9 \U0001f600 \u4f60\u597d",
    "",
]


@dataclass
class Trained:
    """A tokenizer that was trained here."""

    content: bytes
    pieces: sentencepiece.SentencePieceProcessor


@pytest.fixture(scope="module")
def trained(repo_root):
    text = (repo_root / "assets" / "tiny-qwen3" / "sample.txt").read_text()[:150_000]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in text.splitlines() if line.strip()]),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    content = model.getvalue()
    return Trained(content, sentencepiece.SentencePieceProcessor(model_proto=content))


@pytest.fixture
def teacher(tmp_path, trained):
    """Provide a random teacher with the tokenizer, which has one added token."""
    folder = tiny_run.write_teacher(
        tmp_path / "qwen3", shape=tiny_teacher_config(3, vocab_size=608)
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "tokenizer.model").write_bytes(trained.content)
    token = {"content": ADDED, "special": True, "lstrip": False, "rstrip": False}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "added_tokens_decoder": {
                    "600": {**token, "normalized": False, "single_word": False}
                },
            }
        )
    )
    config |= {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check_ids(tokenizer, pieces):
    """Ids are those of the sentencepiece library; characters that it lacks are bytes."""
    lists = token_lists(tokenizer, TEXTS)
    assert lists == [pieces.encode(text) for text in TEXTS]
    assert any(pieces.is_byte(token) for token in lists[2])
    assert [tokenizer.decode(ids) for ids in lists] == TEXTS
    (marked,) = token_lists(tokenizer, [f"one{ADDED}two"])
    assert marked.count(600) == 1 and len(tokenizer) == 601


@pytest.mark.slow
def test_from_text_to_an_exported_model(tmp_path, teacher, trained, capsys, repo_root):
    assert not (teacher / "tokenizer.json").exists()
    check_ids(AutoTokenizer.from_pretrained(teacher), trained.pieces)
    lines = (repo_root / "assets" / "tiny-qwen3" / "sample.txt").read_text()[:60_000].split("\n\n")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{ADDED}{line}"}) + "\n" for line in lines))
    words = ["data", "prepare", str(corpus), str(tmp_path / "ready"), "--tokenizer", str(teacher)]
    assert run(words) == 0
    tokens = open_tokens(tmp_path / "ready").tokens
    assert (tokens == 600).sum() == (tokens == 2).sum() == len(lines)

    small = {"recall_pairs": 1, "recall_sequences": 2, "heldout_sequences": 2, "batch_size": 2}
    stage = {**tiny_run.STAGE, "seq_length": 32}
    config = tiny_run.write_config(
        tmp_path,
        data={"train": [str(tmp_path / "ready")], "recall_pairs": 1},
        select={**small, "seq_length": 32},
        eval={**small, "seq_length": 32, "length_multiples": [1]},
        align=stage,
        distill=stage,
        finetune=stage,
        checkpoint={"finished": "weights"},
    )
    code = run(["run", str(config)])
    assert code == 0, capsys.readouterr().err
    # of finished stages the weights stay, and that is enough for every later step
    saves = sorted((tmp_path / "run").glob("*/checkpoints/*"))
    assert [path.parent.parent.name for path in saves] == ["align", "distill", "finetune"]
    assert not list((tmp_path / "run").glob("*/checkpoints/*/optimizer"))
    assert run(["run", str(config)]) == 0
    export = tmp_path / "run" / "export"
    assert (export / "tokenizer.model").read_bytes() == trained.content
    assert not (export / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(export)
    check_ids(tokenizer, trained.pieces)
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    made = model.generate(
        **tokenizer("Once upon", return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    assert made.shape[1] > 4 and isinstance(tokenizer.decode(made[0]), str)
