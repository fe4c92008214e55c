import pytest

from megatron_hypenet.data.questions import read_questions
from megatron_hypenet.errors import DataError


def test_both_kinds_are_read(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question": "Colour?", "choices": ["green", "blue"], "answer": 1}\n\n'
        '{"prompt": "The sky is", "answer": "blue"}\n'
    )
    choice, exact = read_questions(file)
    assert choice.lettered == "Question: Colour?\nA. green\nB. blue\nAnswer:"
    assert choice.letter == "B" and choice.answer == "blue"
    assert exact.choices == () and exact.answer == "blue"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "has no questions"),
        ("[1]", ":1: list, not a JSON object"),
        ('{"prompt": "a"}', "prompt and answer must be texts"),
        ('{"question": "", "choices": ["a", "b"], "answer": 0}', "question must be a text"),
        ('{"question": "q", "choices": ["a", "a"], "answer": 0}', "different texts"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "choices must be 2 to 26"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "place of the right choice"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "place of the right choice"),
        ("{", "q.jsonl"),
    ],
)
def test_what_is_no_question_is_named_with_its_line(tmp_path, line, says):
    file = tmp_path / "q.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=says):
        read_questions(file)


def test_other_encodings_are_refused(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_questions(file)
