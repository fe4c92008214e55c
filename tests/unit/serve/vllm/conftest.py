"""A real vLLM against the exported code: greedy tokens of both."""

import pytest

from tests import vllm_engine as vllm


@pytest.fixture
def same_tokens(tmp_path):
    """Provide same_tokens(mixer, options, **changes of the model): serve a random model, and
    require the exported code's tokens for one prompt by itself, for five together (four at a time,
    the longest in chunks), and for the same five again; returns, of that last round, the number of
    tokens that came from the prefix cache, by prompt."""

    def check(mixer, options=None, **changes):
        folder = vllm.write_folder(tmp_path / "folder", mixer, **changes)
        given = vllm.prompts()
        right = vllm.reference(folder, given)
        assert len({tuple(ids) for ids in right}) == len(right), "the model repeats itself"
        found = vllm.engine(tmp_path, folder, [given[2:3], given, given], **(options or {}))
        assert found["tokens"] == [right[2:3], right, right]
        return found["cached"][-1]

    return check
