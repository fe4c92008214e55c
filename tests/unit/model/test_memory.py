import weakref

import torch
from torch import nn

from megatron_hypenet.model import memory
from megatron_hypenet.model.memory import release_memory


def test_a_model_that_refers_to_itself_is_released(monkeypatch):
    emptied = []
    trimmed = []
    monkeypatch.setattr(memory, "_trim", trimmed.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    model = nn.Linear(2, 2)
    model.circle = [model]
    gone = weakref.ref(model)
    del model
    release_memory()
    assert gone() is None and emptied == [True] and trimmed == [0]
