import torch
from torch.nn import functional as F

from megatron_hypenet.export.hf_model import load_model, read_config
from megatron_hypenet.export.token_scores import token_scores


@torch.no_grad()
def test_pieces_give_the_losses_of_the_whole(repo_root):
    folder = repo_root / "assets" / "tiny-qwen3"
    model = load_model(folder, read_config(folder), "float64", "cpu")
    ids = torch.randint(200, (2, 41), generator=torch.Generator().manual_seed(0))
    logits = model(ids[:, :-1]).logits
    ids[0, 9] = logits[0, 8].argmax()  # a first choice; what comes later is computed again
    logits = model(ids[:, :-1]).logits
    want = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    for piece in (7, 20, 64):
        got, first = token_scores(model, ids, piece)
        assert torch.equal(first, logits.float().argmax(-1) == ids[:, 1:])
        torch.testing.assert_close(got, want.view(2, 40).float(), rtol=1e-5, atol=1e-5)
