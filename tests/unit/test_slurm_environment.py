from megatron_hypenet.slurm_environment import own_environment


def test_options_of_the_shell_go_and_the_choice_of_the_cluster_stays():
    stale = dict.fromkeys(
        (
            "SLURM_JOB_ID",
            "SLURMD_NODENAME",
            "SBATCH_PARTITION",
            "SQUEUE_USERS",
            "PMIX_RANK",
            "SALLOC_QOS",
        ),
        "1",
    )
    kept = {"PATH": "/bin", "SLURM_CONF": "/c", "SLURM_CLUSTERS": "c", "SLURM_JWT": "t"}
    assert own_environment(stale | kept) == kept
