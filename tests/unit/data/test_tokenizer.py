import json
import shutil

import pytest

from megatron_hypenet.data.tokenizer import encode, end_of_text_id, load_tokenizer, recall_vocabulary
from megatron_hypenet.errors import DataError


@pytest.fixture(scope="module")
def teacher(repo_root):
    return load_tokenizer(repo_root / "assets" / "tiny-qwen3")


def test_bundled_tokenizer_round_trips(teacher):
    text = "It is a truth universally acknowledged,\n\nthat 1813 was a year. \u00e9\u4e2d"
    assert teacher.decode(encode(teacher, text)) == text
    assert end_of_text_id(teacher) == 0 and len(teacher) == 2048


def test_recall_words_are_whole_tokens(teacher):
    vocabulary = recall_vocabulary(teacher)
    assert len(vocabulary.words) > 500
    for word in vocabulary.words[::50]:
        assert encode(teacher, teacher.decode([word])) == [word]
    key, value = vocabulary.words[3], vocabulary.words[5]
    ids = [*vocabulary.opening, key, *vocabulary.separator, value, *vocabulary.closing]
    assert teacher.decode(ids) == f"\n[{teacher.decode([key])}{teacher.decode([value])} ]\n"


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


def test_no_end_token():
    class Tokenizer:
        eos_token_id = None

    with pytest.raises(DataError, match="eos_token"):
        end_of_text_id(Tokenizer())
