import pytest

from megatron_hypenet.data.probes import TASKS, Probes, score
from megatron_hypenet.errors import DataError


def encode(text):
    """Encode one token per character."""
    return [ord(letter) for letter in text]


def text_of(probe):
    return "".join(map(chr, probe.ids))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_documents_have_their_length_and_hold_the_answers(task, depth):
    probes = Probes(encode, seed=3)
    probe = probes.document(task, 1, 3000, depth)
    assert len(probe.ids) == 3000 and probe.answers
    text = text_of(probe)
    assert all(answer in text for answer in probe.answers)
    assert score(text, probe.answers) == 1 and score("nothing", probe.answers) == 0
    assert probe == probes.document(task, 1, 3000, depth)
    assert probe != probes.document(task, 2, 3000, depth)
    assert probe != Probes(encode, seed=4).document(task, 1, 3000, depth)


@pytest.mark.parametrize("task", ["needle", "needle_multikey", "pairs"])
def test_the_answer_lies_at_its_depth(task):
    probes = Probes(encode, encode("filler "), seed=0)
    places = []
    for depth in (0.0, 0.5, 1.0):
        probe = probes.document(task, 0, 4000, depth)
        places.append(text_of(probe).index(probe.answers[0]) / 4000)
    assert places[0] < 0.1 and 0.35 < places[1] < 0.65 and places[2] > 0.85


def test_a_question_asks_for_what_was_stated():
    text = text_of(Probes(encode, seed=0).document("needle", 0, 600, 0.5))
    key = text.split("special magic numbers for ")[1].split(" is:")[0]
    assert text.endswith(f"The special magic number for {key} mentioned in the text is:")
    words = text_of(Probes(encode, seed=0).document("common_words", 0, 4000, 0.5))
    listed = [line.split(". ")[1] for line in words.split("\n") if line[:1].isdigit()]
    probe = Probes(encode, seed=0).document("common_words", 0, 4000, 0.5)
    least = min(listed.count(word) for word in probe.answers)
    assert least > max(listed.count(word) for word in set(listed) - set(probe.answers))
    chain = text_of(Probes(encode, seed=0).document("variables", 0, 4000, 0.2))
    stated = [line for line in chain.split("\n") if line.startswith("VAR ")]
    names = [line.split()[1] for line in stated]
    assert [line.split()[-1].rstrip(".") for line in stated[1:]] == names[:-1]


def test_part_of_several_answers_counts_in_part():
    assert score("12 and 34", ("12", "34", "56", "78")) == 0.5


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="needle: its statements and its question take .* has 64"):
        Probes(encode, seed=0).document("needle", 0, 64, 0.5)
    with pytest.raises(DataError, match="has no tokens"):
        Probes(encode, [], seed=0)
