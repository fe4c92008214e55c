"""End a process that used torch.distributed, with the right exit code and without hanging."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from megatron_hypenet.parallel import groups


def exit_process(code: int) -> NoReturn:
    """Flush the streams and end this process with `code`, skipping interpreter teardown.

    A gloo or NCCL group that is still alive at teardown aborts some exits ("terminate called
    without an active exception") and turns the exit code into a signal. Nothing is left to clean:
    checkpoints and logs are closed before, and this package starts no helper processes.
    """
    if code == 0 and groups.world_size() > 1:
        groups.barrier()  # no process ends while another still communicates with it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
