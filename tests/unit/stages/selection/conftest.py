"""What methods measure with, in tests: tiny models and random tokens."""

import json

import pytest
import torch

from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.config.selection import SelectConfig
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.selection.method import SelectionWork
from tests.unit.stages.conftest import TEACHER


@pytest.fixture
def mixers(teacher):
    """Provide RNN mixers of the teacher's layers, as they are before stage 1."""
    return AlignedMixers.from_teacher(teacher, default_mixer(), seed=3)


class RandomSamples:
    """Random tokens; every second sample counts at some positions only, as recall documents do."""

    def batch(self, sample_start, count, seq_length):
        rows = [
            torch.randint(
                0,
                TEACHER.vocab_size,
                (seq_length + 1,),
                generator=torch.Generator().manual_seed(index),
            )
            for index in range(sample_start, sample_start + count)
        ]
        return torch.stack(rows)

    def predicted(self, sample_start, count, seq_length):
        places = torch.arange(seq_length)
        rows = [
            (places % 5 == index % 5) | torch.tensor(index % 2 == 0)
            for index in range(sample_start, sample_start + count)
        ]
        return torch.stack(rows)


@pytest.fixture
def selection_work():
    """Provide a function that makes the work of a method; what it saves is in its list `saved`."""

    def make(*, num_attention, models=None, known=None, saved=None, stop_after=None, **settings):
        saved = [] if saved is None else saved

        def save(content):
            saved.append(content)
            if len(saved) == stop_after:
                raise KeyboardInterrupt

        def nothing(*_):
            raise AssertionError("this method does not ask for it")

        samples = RandomSamples()
        return SelectionWork(
            settings=SelectConfig.model_validate({"seq_length": 11, **settings}),
            num_layers=TEACHER.num_layers,
            num_attention=num_attention,
            known=json.loads(json.dumps(known or {})),  # as it comes from a file
            save=save,
            progress=lambda done, total: None,
            models=nothing if models is None else lambda: models,
            evaluate=nothing,
            heldout=lambda: samples.batch(100, 3, 11),
            samples=lambda: samples,
        )

    return make
