import pytest

from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.tokenizer_files import check_settings, read_tokenizer

KIND = FileKind(error=DataError, advice="fetch it again")


def test_files_are_returned_as_they_are(tmp_path):
    assert read_tokenizer(KIND, tmp_path) == {}
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>", "other": [1]}')
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / "weights.bin").write_text("x")
    assert read_tokenizer(KIND, tmp_path) == {
        "tokenizer_config.json": b'{"eos_token": "<end>", "other": [1]}',
        "merges.txt": b"a b\n",
    }
    check_settings(KIND, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", b'{"tokenizer_class": 5}', "tokenizer_class: should be a valid"),
        ("special_tokens_map.json", b'{"pad_token": []}', "pad_token"),
        ("added_tokens.json", b'{"<a>": "1"}', "should be a valid integer, got '1'"),
        ("chat_template.json", b"[]", "expected a JSON object at the top, got list"),
    ],
)
def test_settings_of_a_wrong_type_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    for check in (check_settings, read_tokenizer):
        with pytest.raises(DataError) as caught:
            check(KIND, tmp_path)
        assert name in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b'{"version": "1.0"}', "it has no 'model'"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "not a tokenizer"),
        ("merges.txt", b"\xff\xfe", "not UTF-8 text"),
        ("tokenizer.model", b"", "an empty file"),
    ],
)
def test_files_that_are_copied_are_checked_whole(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_tokenizer(KIND, tmp_path)


def test_only_files_of_the_folder_are_copied_while_a_loaded_one_may_lie_anywhere(tmp_path):
    (tmp_path / "elsewhere.json").write_text("{}")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "elsewhere.json")
    check_settings(KIND, folder)
    with pytest.raises(DataError, match="leads out of the folder"):
        read_tokenizer(KIND, folder)
