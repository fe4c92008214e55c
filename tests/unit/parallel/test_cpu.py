import torch

from megatron_hypenet.parallel.cpu import device, enable_cpu


def test_without_cuda_megatron_sees_a_cpu_and_torch_still_knows_there_is_no_gpu():
    enable_cpu()
    enable_cpu()
    assert device().type == "cpu" and torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    before = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(before)
    assert torch.equal(torch.rand(3), first)
