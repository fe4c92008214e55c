import json

import pytest
from transformers import AutoTokenizer

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import tokenizer
from megatron_hypenet.export.from_hf import import_hf

from .conftest import TOKENIZER

CUT_OFF = TOKENIZER[: len(TOKENIZER) // 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", CUT_OFF, "not valid JSON"),
        ("tokenizer.json", "[]", "expected a JSON object at the top, got list"),
        ("tokenizer.json", "{}", "not a tokenizer: it has no 'model'"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}', "not a tokenizer"),
        (
            "tokenizer.json",
            '{"model": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "nested more than 64 levels",
        ),
        ("tokenizer.json", "", "not valid JSON"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "3", "expected a JSON object"),
        ("special_tokens_map.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", '{"eos_token": ["a"]}', "eos_token"),
        ("tokenizer_config.json", '{"unk_token": 1000}', "unk_token"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "a"}}}',
            "added_tokens_decoder",
        ),
        (
            "special_tokens_map.json",
            '{"additional_special_tokens": "a"}',
            "additional_special_tokens",
        ),
        ("vocab.json", '{"a": "b"}', "should be a valid integer"),
        ("vocab.json", '{"a": 1', "not valid JSON"),
        ("merges.txt", "a\0b", "NUL"),
        ("tokenizer.model", "", "an empty file"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_a_broken_file_is_refused_at_import_by_name(hf_model, tmp_path, name, content, message):
    model = hf_model()
    model.files = {"tokenizer.json": TOKENIZER, name: content}
    with pytest.raises(ConversionError, match=message) as failure:
        import_hf(model.write(tmp_path / "hf"), tmp_path / "ckpt")
    assert name in str(failure.value) and not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "merges.txt", "generation_config.json", "config.json"]
)
def test_a_link_to_a_private_file_is_not_followed(hf_model, tmp_path, name):
    folder = hf_model().write(tmp_path / "hf")
    private = tmp_path / "id_rsa"
    private.write_text(TOKENIZER)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private)
    with pytest.raises(
        ConversionError, match=f"{name}: a symbolic link that leads out of the folder, to {private}"
    ):
        import_hf(folder, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_a_folder_of_the_hub_cache_is_imported(hf_model, tmp_path):
    model = hf_model()
    model.files = {"tokenizer.json": TOKENIZER}
    blobs = model.write(tmp_path / "hub/blobs")
    snapshot = tmp_path / "hub/snapshots/abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    import_hf(snapshot, tmp_path / "ckpt")
    kept = tmp_path / "ckpt/tokenizer/tokenizer.json"
    assert kept.read_text() == TOKENIZER and not kept.is_symlink()


@pytest.fixture
def exported(tmp_path):
    """exported(config, **files) -> (tokenizer_config.json after the export, lines said)."""

    def run(config, **files):
        source = tmp_path / "source"
        target = tmp_path / "target"
        lines = []
        source.mkdir()
        target.mkdir()
        (source / "tokenizer.json").write_text(TOKENIZER)
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        for name, content in files.items():
            (source / f"{name}.json").write_text(json.dumps(content))
        tokenizer.export(source, target, lines.append)
        assert (target / "tokenizer.json").read_text() == TOKENIZER
        return json.loads((target / "tokenizer_config.json").read_text()), lines

    return run


def test_what_both_versions_read_is_copied_byte_by_byte(exported, tmp_path):
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": ["a"],
        "model_max_length": 10**30,
    }
    assert exported(config) == (config, [])
    assert (tmp_path / "target/tokenizer_config.json").read_bytes() == (
        tmp_path / "source/tokenizer_config.json"
    ).read_bytes()


def test_a_list_of_special_tokens_gets_its_older_name(exported, tmp_path):
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": ["a"],
        "extra_special_tokens": ["a", "b"],
    }
    found, lines = exported(
        config, special_tokens_map={"extra_special_tokens": ["b"], "eos_token": "<end>"}
    )
    assert (
        found == {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["a", "b"]}
        and lines == []
    )
    other = json.loads((tmp_path / "target/special_tokens_map.json").read_text())
    assert other == {"eos_token": "<end>", "additional_special_tokens": ["b"]}


def test_named_special_tokens_stay(exported):
    config = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image_token": "b"}}
    assert exported(config) == (config, [])


def test_the_class_of_transformers_5_gets_its_older_name(exported, tmp_path):
    found, lines = exported({"tokenizer_class": "TokenizersBackend", "eos_token": "<end>"})
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast" and lines == []
    loaded = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert (
        loaded("a b <end>") == {"input_ids": [0, 1, 2], "attention_mask": [1, 1, 1]}
        and loaded.eos_token_id == 2
    )


def test_a_tokenizer_that_needs_transformers_5_is_named(exported):
    config = {"tokenizer_class": "MistralCommonBackend"}
    found, lines = exported(config)
    assert (
        found == config
        and len(lines) == 1
        and "MistralCommonBackend" in lines[0]
        and "needs transformers 5" in lines[0]
    )
