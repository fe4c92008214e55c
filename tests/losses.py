"""What a run's losses.jsonl says, for tests that compare runs."""

from dataclasses import asdict

from megatron_hypenet.training.step_files import loss_lines


def read_losses(path):
    """Return the records without skipped steps: step, loss, grad_norm, lr."""
    return [asdict(record) for _, record in loss_lines(path) if record.loss is not None]
