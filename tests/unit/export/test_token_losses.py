import torch
from torch.nn import functional as F

from megatron_hypenet.export.hf_model import load_model, read_config
from megatron_hypenet.export.token_losses import token_losses


@torch.no_grad()
def test_pieces_give_the_losses_of_the_whole(repo_root):
    folder = repo_root / "assets" / "tiny-qwen3"
    model = load_model(folder, read_config(folder), "float64", "cpu")
    ids = torch.randint(200, (2, 41), generator=torch.Generator().manual_seed(0))
    logits = model(ids[:, :-1]).logits
    want = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    for piece in (7, 20, 64):
        got = token_losses(model, ids, piece)
        torch.testing.assert_close(got, want.view(2, 40).float(), rtol=1e-5, atol=1e-5)
