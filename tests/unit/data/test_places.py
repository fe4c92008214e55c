"""The place of a record keeps apart from the text of its error."""

import pickle

from megatron_hypenet.data.places import RecordError, Where


def test_an_error_survives_the_way_between_processes_and_can_be_moved():
    error = pickle.loads(pickle.dumps(RecordError(Where("a.jsonl", "line", 3), "not JSON")))
    assert str(error) == "a.jsonl, line 3: not JSON" and error.exit_code == 5
    assert str(error.moved(40)) == "a.jsonl, line 43: not JSON"
