"""Job scripts for 64 nodes of 8 GPUs, judged by SLURM itself: `sbatch --test-only` on a cluster
that has such nodes on paper."""

import pytest

from tests.integration.slurm.runs import PROFILE, ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

BATCH = [
    f"{stage}.{key}={value}"
    for stage in ("align", "distill", "finetune")
    for key, value in (("global_batch_size", 512),)
]


@pytest.mark.parametrize(
    "name",
    sorted(path.stem for path in (ROOT / "configs" / "cluster").glob("*.yaml") if path != PROFILE),
)
@pytest.mark.parametrize("chain", [(), ("--chain",)])
def test_slurm_takes_the_scripts(paper_cluster, config, tmp_path, name, chain):
    words = (
        "--cluster",
        f"configs/cluster/{name}.yaml",
        "--nodes",
        "64",
        f"output_dir={tmp_path}/run",
        *BATCH,
        *chain,
        "--test-only",
    )
    said = paper_cluster.hypenet("submit", config, *words)
    assert (
        said.count("to start at") == (4 if chain else 1)
        and "on nodes h[001-064] in partition h100" in said
    )
    assert not (tmp_path / "run").exists()


def test_one_node_too_many_is_refused_with_slurms_words(paper_cluster, config, tmp_path):
    words = (
        "--cluster",
        "configs/cluster/h100_infiniband.yaml",
        "--nodes",
        "65",
        f"output_dir={tmp_path}/run",
        "--test-only",
    )
    batch = [word.replace("512", "520") for word in BATCH]
    assert "Requested node configuration is not available" in paper_cluster.hypenet(
        "submit", config, *words, *batch, code=4
    )
