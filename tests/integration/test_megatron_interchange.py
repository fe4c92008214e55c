"""Megatron's own reader and writer and our planners understand each other's files."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import megatron_hypenet

pytestmark = pytest.mark.slow

MEGATRON = textwrap.dedent("""
    import sys, torch
    import torch.distributed as dist
    from pathlib import Path
    from megatron.core import dist_checkpointing as dc
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron_hypenet.checkpoint.shard_writer import write_shards
    from megatron_hypenet.checkpoint.shards import Shard, ShardReader

    def main(folder):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        want = {"a": torch.arange(12.).view(4, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
        write_shards(folder / "ours", [Shard.whole(k, v) for k, v in want.items()])
        zeros = {k: torch.zeros_like(v) for k, v in want.items()}
        asked = {k: ShardedTensor.from_rank_offsets(k, v) for k, v in zeros.items()}
        got = dc.load(asked, str(folder / "ours"))
        assert all(torch.equal(got[k], want[k]) for k in want), got
        (folder / "theirs").mkdir()
        given = {k: ShardedTensor.from_rank_offsets(k, v) for k, v in want.items()}
        dc.save(given, str(folder / "theirs"))
        reader = ShardReader(folder / "theirs")
        assert all(torch.equal(reader[k], want[k]) for k in want)
        print("interchangeable", flush=True)
        import multiprocessing.util, os
        multiprocessing.util._exit_function()
        os._exit(0)

    if __name__ == "__main__":
        torch.cuda.current_device = lambda: torch.device("cpu")
        torch.cuda.synchronize = lambda *a: None
        main(Path(sys.argv[1]))
""")


def test_megatron_reads_ours_and_we_read_megatrons(tmp_path):
    script = tmp_path / "interchange.py"
    script.write_text(MEGATRON)
    env = os.environ | {"PYTHONPATH": str(Path(megatron_hypenet.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "interchangeable" in done.stdout, done.stderr[-2000:]
