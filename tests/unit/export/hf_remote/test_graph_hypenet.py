import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hypenet.export.hf_remote import graph_hypenet as remote
from megatron_hypenet.export.hf_remote import modeling_hypenet

from .conftest import close, padded, tokens

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Replayed:
    """In the place of a CUDA graph: runs the function each time, without the host's part."""

    def __init__(self, function):
        self.function = function
        self.result = torch.empty(0, dtype=torch.float64)
        self.replays = 0

    def replay(self):
        self.replays += 1
        found = self.function()
        self.result.resize_(found.shape).copy_(found)


class NoReads(TorchDispatchMode):
    """Refuses what would make the host wait for the device."""

    reads = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        assert name not in self.reads, f"{name} reads a value"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def graphs(monkeypatch):
    """Provide all graphs that are captured, on a CPU, where single tokens then run in place."""
    made = []

    def record(function):
        made.append(Replayed(function))
        return made[-1], made[-1].result

    monkeypatch.setattr(remote, "record", record)
    monkeypatch.setattr(remote, "can_be_captured", lambda model, ids: remote.is_plain(model))
    monkeypatch.setattr(modeling_hypenet, "_IN_PLACE_DEVICES", ("cpu",))
    return made


@torch.no_grad()
def whole(model, ids, count):
    for _ in range(count):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    return ids


def test_generation_through_a_graph(graphs, model):
    ids = tokens(2, 9)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, **GREEDY)
    assert torch.equal(got, whole(model, ids, 9))
    assert [graph.replays for graph in graphs] == [8 - remote._WARM_UP_STEPS]


def test_a_padded_batch_through_a_graph(graphs, model, rows):
    rows = [row for row in rows if len(row) > 1]
    ids, mask = padded(rows, 14)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    for index, row in enumerate(rows):
        assert torch.equal(got[index, 14:], whole(model, row[None], 8)[0, len(row) :])
    assert len(graphs) == 1 and graphs[0].replays == 7 - remote._WARM_UP_STEPS


@torch.no_grad()
def test_single_tokens_read_nothing_and_stay_in_place(graphs, model):
    """The calls are a loop written by hand, with a mask of all columns and padding that comes
    late."""
    ids = tokens(2, 30)
    cache = model(ids[:, :8]).get("past_key_values")
    mask = torch.ones(2, 30)
    mask[1, 13] = 0
    found = []
    places = set()
    for t in range(8, 30):
        with NoReads():
            out = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
        found.append(out.logits)
        memory = (*remote.kept(cache.slots), cache._real, cache.num_real, cache.at)
        places.add(tuple(remote.addresses(memory)))
    want = model(ids, attention_mask=mask, use_cache=False).logits[:, 8:]
    real = mask[:, 8:].bool()
    close(torch.cat(found, 1)[real], want[real])
    assert len(places) == 1 and graphs[0].replays == 22 - remote._WARM_UP_STEPS
    assert cache.get_seq_length() == 30 and {slot.length for slot in cache.slots} == {30}


@torch.no_grad()
def test_growth_of_the_buffers_captures_anew(graphs, make_model):
    model = make_model()
    ids = tokens(1, 268)
    cache = model(ids[:, :250]).past_key_values
    found = []
    for t in range(250, 268):
        found.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    close(torch.cat(found, 1), model(ids, use_cache=False).logits[:, 250:])
    assert [graph.replays for graph in graphs] == [6 - 2, 12 - 2]


def test_known_lengths_leave_no_need_to_grow(graphs, make_model):
    out = make_model().generate(
        tokens(1, 250), max_new_tokens=20, return_dict_in_generate=True, **GREEDY
    )
    assert len(graphs) == 1
    assert out.past_key_values.slots[1].keys.shape[2] == 512


def test_beams_run_without_a_graph(graphs, model):
    ids = tokens(1, 9)
    beams = {"num_beams": 3, "max_new_tokens": 8, **GREEDY}
    got = model.generate(ids, **beams)
    assert not graphs
    assert torch.equal(got, model.generate(ids, use_cache=False, **beams))


@torch.no_grad()
def test_turns_and_copies_after_a_graph(graphs, model):
    """A prompt follows single tokens, and a cache that was captured is copied."""
    ids = tokens(1, 30)
    cache = model(ids[:, :5]).get("past_key_values")
    for t in range(5, 12):
        model(ids[:, t : t + 1], past_key_values=cache)
    other = copy.deepcopy(cache)
    assert other.steps.graph is None and cache.steps.graph is graphs[0]
    for memory in (cache, other):
        found = [model(ids[:, 12:24], past_key_values=memory).logits]
        for t in range(24, 30):
            found.append(model(ids[:, t : t + 1], past_key_values=memory).logits)
        close(torch.cat(found, 1), model(ids, use_cache=False).logits[:, 12:])


@torch.no_grad()
def test_what_a_graph_would_miss_is_run_plainly(graphs, model):
    ids = tokens(1, 30)
    cache = model(ids[:, :5]).get("past_key_values")

    def step(t):
        return model(ids[:, t : t + 1], past_key_values=cache).logits

    for t in range(5, 10):
        step(t)
    assert graphs[0].replays == 3
    seen = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    step(10)
    assert seen == [1] and graphs[0].replays == 3
    for t in range(11, 15):
        step(t)
    handle.remove()
    assert len(seen) == 5 and len(graphs) == 1
    for t in range(15, 19):
        step(t)
    assert len(graphs) == 2
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data * 2  # elsewhere in memory
    found = step(19)
    assert graphs[1].replays == 4 and len(graphs) == 2
    replays = [graph.replays for graph in graphs]
    model.use_cuda_graph = False
    hidden = model(ids[:, 20:21], past_key_values=cache, output_hidden_states=True)
    assert len(hidden.hidden_states) == 4 and replays == [graph.replays for graph in graphs]
    assert torch.isfinite(found).all()


@torch.no_grad()
def test_a_capture_that_fails_is_reported_once(graphs, monkeypatch, model):
    def fails(function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(remote, "record", fails)
    ids = tokens(1, 7)
    with pytest.warns(UserWarning, match="without a CUDA graph, slower: operation not") as caught:
        model.generate(ids, max_new_tokens=8, **GREEDY)
    assert len([w for w in caught if "CUDA graph" in str(w.message)]) == 1


@torch.no_grad()
def test_a_layer_that_moves_its_cache_is_not_captured(graphs, monkeypatch, make_model):
    model = make_model()
    ids = tokens(1, 6)
    mixer = type(model.model.layers[0].self_attn)
    forward = mixer.forward

    def moves(self, x, step, slot):
        y = forward(self, x, step, slot)
        slot.state = slot.state.clone()
        return y

    monkeypatch.setattr(mixer, "forward", moves)

    def record(function):
        function()
        return Replayed(function), torch.empty(0)

    monkeypatch.setattr(remote, "record", record)
    cache = model(ids).past_key_values
    # memory that moves at every step is not even tried
    for t in range(4):
        model(ids[:, t : t + 1], past_key_values=cache)
    assert cache.steps.graph is None


def test_only_plain_modules_are_captured(make_model):
    model = make_model()
    assert remote.is_plain(model) and not remote.can_be_captured(model, tokens(1, 1))
    handle = model.lm_head.register_forward_pre_hook(lambda *args: None)
    assert not remote.is_plain(model)
    handle.remove()
    mlp = model.model.layers[0].mlp
    mlp.forward = mlp.forward
    assert not remote.is_plain(model)
    del mlp.forward
    assert remote.is_plain(model)

    class Wrapped(torch.nn.Linear):
        pass

    model.lm_head = Wrapped(32, 53, bias=False)
    assert not remote.is_plain(model)


@torch.no_grad()
def test_inference_mode_and_no_grad_take_turns(graphs, model):
    ids = tokens(1, 20)
    with torch.inference_mode():
        cache = model(ids[:, :5]).get("past_key_values")
        for t in range(5, 9):
            model(ids[:, t : t + 1], past_key_values=cache)
    found = []
    for t in range(9, 14):
        found.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    with torch.inference_mode():
        for t in range(14, 20):
            found.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    close(torch.cat(found, 1), model(ids, use_cache=False).logits[:, 9:])


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_cuda_graph_does_what_plain_steps_do(make_model, rows, dtype):
    model = make_model(head_dim=64, max_position_embeddings=4096).to("cuda", dtype)
    rows = [row for row in rows if len(row) > 1]
    ids, mask = (x.cuda() for x in padded(rows, 14))
    found = []
    for captures in (True, False):
        model.use_cuda_graph = captures
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=20,
            return_dict_in_generate=True,
            output_logits=True,
            **GREEDY,
        )
        assert (out.past_key_values.steps.graph is not None) == captures
        found.append((out.sequences, torch.stack(out.logits)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
