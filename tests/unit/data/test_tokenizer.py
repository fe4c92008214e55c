import json
import shutil

import pytest

from megatron_hypenet.data.tokenizer import (
    EndOfText,
    encode,
    end_of_text,
    load_tokenizer,
    model_end_of,
    model_vocabulary,
    recall_vocabulary,
)
from megatron_hypenet.errors import DataError


@pytest.fixture(scope="module")
def teacher(repo_root):
    return load_tokenizer(repo_root / "assets" / "tiny-qwen3")


def test_bundled_tokenizer_round_trips(teacher):
    text = "It is a truth universally acknowledged,\n\nthat 1813 was a year. \u00e9\u4e2d"
    assert teacher.decode(encode(teacher, text)) == text
    assert end_of_text(teacher, None) == EndOfText(0) and len(teacher) == 2048


def test_recall_words_are_whole_tokens(teacher):
    vocabulary = recall_vocabulary(teacher)
    assert len(vocabulary.words) > 500
    for word in vocabulary.words[::50]:
        assert encode(teacher, teacher.decode([word])) == [word]
    key, value = vocabulary.words[3], vocabulary.words[5]
    ids = [*vocabulary.opening, key, *vocabulary.separator, value, *vocabulary.closing]
    assert teacher.decode(ids) == f"\n[{teacher.decode([key])}{teacher.decode([value])} ]\n"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("tokenizer.json", "[]", "cannot be loaded .TypeError"),
        ("tokenizer.json", "[" * 100_000, "cannot be loaded .RecursionError"),
        ("tokenizer_config.json", "null", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token.str: should be a valid string"),
        ("tokenizer_config.json", '{"model": 1}', "cannot be loaded .AttributeError"),
        ("config.json", "[]", "config.json: expected an object"),
        ("config.json", '{"model_type": []}', "cannot be loaded .TypeError"),
    ],
)
def test_any_damage_ends_in_one_error(tmp_path, repo_root, name, text, says):
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(repo_root / "assets" / "tiny-qwen3" / file, tmp_path / file)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says) as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_and_damaged_folders(tmp_path, repo_root):
    with pytest.raises(DataError, match="no tokenizer files"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(repo_root / "assets" / "tiny-qwen3" / name, tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_code_of_strangers_is_not_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


class Chat:
    """A tokenizer that names a chat token as its end."""

    eos_token_id = 7

    def __len__(self):
        return 10

    def convert_ids_to_tokens(self, index):
        return {2: "<|endoftext|>", 7: "<|im_end|>"}.get(index, "?")


class Nameless(Chat):
    eos_token_id = None


@pytest.mark.parametrize("model_end", [None, 7, [2, 7], [7]])
def test_the_tokenizers_end_token_is_used_where_the_model_has_it_too(model_end):
    assert end_of_text(Chat(), model_end) == EndOfText(7)


def test_the_models_end_token_wins_and_the_user_is_told():
    for model_end in (2, [2, 3]):
        end = end_of_text(Chat(), model_end)
        assert (
            end.id == 2
            and "documents end with <|endoftext|> (2)" in end.note
            and "<|im_end|> (7)" in end.note
        )
    assert end_of_text(Nameless(), 2).id == 2


def test_no_end_token():
    with pytest.raises(DataError, match="eos_token"):
        end_of_text(Nameless(), None)
    with pytest.raises(DataError, match="eos_token_id=12, but the tokenizer has 10 tokens"):
        end_of_text(Chat(), 12)


def test_the_models_files_are_found_beside_the_tokenizer(tmp_path, repo_root):
    assert model_end_of(tmp_path) is None and model_vocabulary(tmp_path) is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert model_end_of(tmp_path) == [5, 6]
    (tmp_path / "config.json").write_text('{"eos_token_id": 4, "vocab_size": 9}')
    assert model_end_of(tmp_path) == [4] and model_vocabulary(tmp_path) == 9
    (tmp_path / "config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(DataError, match="expected a token id"):
        model_end_of(tmp_path)
    (tmp_path / "ckpt/tokenizer").mkdir(parents=True)
    (tmp_path / "ckpt/model.json").write_text('{"eos_token_id": 3, "vocab_size": 8}')
    assert (
        model_end_of(tmp_path / "ckpt/tokenizer") == [3]
        and model_vocabulary(tmp_path / "ckpt/tokenizer") == 8
    )
    assert model_end_of(repo_root / "assets/tiny-qwen3") == [0]
