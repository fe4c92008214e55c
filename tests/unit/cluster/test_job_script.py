import subprocess
import sys

import pytest

from megatron_hypenet.cluster.job_script import (
    job_scripts,
    missing_variables,
    render,
    sbatch_quoted,
)
from megatron_hypenet.config.cluster import ClusterConfig, load_cluster_config
from megatron_hypenet.errors import ConfigError

FULL = {
    "nodes": 4,
    "gpus_per_node": 8,
    "gpu_type": "h100",
    "cpus_per_task": 12,
    "memory": 0,
    "time": "24:00:00",
    "partition": "big",
    "account": "lab",
    "qos": "high",
    "exclude": ["n3", "n7"],
    "grace_seconds": 600,
    "environment": ["HF_HOME"],
    "variables": {"NCCL_DEBUG": "WARN", "ODD": "it's $HOME"},
    "setup": ["module load cuda"],
    "sbatch_args": ["--comment=x"],
    "srun_args": ["--cpu-bind=none"],
    "container": {"image": "/images/a b.sqsh", "mounts": ["/a:/a", "/b:/c:ro"]},
}


def script(folder, **values):
    return job_scripts(folder, ClusterConfig.model_validate(values), chain=False)[0]


def directives(text):
    return [
        line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")
    ]


def test_slurm_is_asked_to_mail(tmp_path):
    assert not any(
        line.startswith("--mail") for line in directives(script(tmp_path / "run", **FULL).text)
    )
    mailing = {**FULL, "mail_user": "me@lab.org", "mail_type": ["END", "REQUEUE"]}
    said = directives(script(tmp_path / "run", **mailing).text)
    assert "--mail-user=me@lab.org" in said and "--mail-type=END,REQUEUE" in said


def test_everything_in_the_profile_reaches_the_script(tmp_path):
    text = script(tmp_path / "run", **FULL).text
    said = directives(text)
    for line in [
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=h100:8", "--cpus-per-task=12",
        "--mem=0", "--exclusive", "--time=24:00:00",
        "--partition=big", "--account=lab", "--qos=high", "--exclude=n3,n7", "--signal=USR2@600",
        "--requeue", "--comment=x",
        "--export=PATH,HOME,USER,LANG,HF_HOME", f"--output={tmp_path}/run/logs/job-%j.log",
    ]:  # fmt: skip
        assert line in said
    assert text.index(
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$HYPENET_ATTEMPT_LOGS/nccl-trace-rank-"
    ) < text.index("export NCCL_DEBUG=WARN")
    assert "\nmodule load cuda\n" in text and "\nexport NCCL_DEBUG=WARN\n" in text
    assert "\n  --cpus-per-task=12 \\\n" in text  # srun does not take it from sbatch
    assert (
        "--container-image='/images/a b.sqsh'" in text
        and "--container-mounts=/a:/a,/b:/c:ro" in text
    )
    assert (
        f"  --cpu-bind=none \\\n  python3 -m launchers.slurm run {tmp_path}/run/config.yaml &\n"
        in text
    )


def test_what_the_profile_leaves_open_is_not_mentioned(tmp_path):
    said = directives(
        script(
            tmp_path, nodes=1, gpus_per_node=0, tasks_per_node=2, exclusive=False, time="10"
        ).text
    )
    assert (
        "nccl" not in script(tmp_path, nodes=1, gpus_per_node=0, tasks_per_node=2, time="10").text
    )
    names = {line.partition("=")[0] for line in said}
    assert names == {
        "--job-name",
        "--nodes",
        "--ntasks-per-node",
        "--time",
        "--chdir",
        "--output",
        "--open-mode",
        "--requeue",
        "--signal",
        "--export",
    }


@pytest.mark.parametrize("name", ["h100_infiniband", "h100_pyxis", "testcluster"])
def test_the_script_is_shell(repo_root, tmp_path, name):
    cluster = load_cluster_config(repo_root / "configs" / "cluster" / f"{name}.yaml")
    for one in job_scripts(tmp_path / "a run", cluster, chain=True):
        done = subprocess.run(
            ["bash", "-n"], input=one.text, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "\n\n\n" not in one.text and not any(
            line.endswith(" ") for line in one.text.splitlines()
        )


def test_values_arrive_as_they_are(tmp_path):
    text = script(tmp_path, **FULL).text
    line = next(line for line in text.splitlines() if line.startswith("export ODD="))
    assert (
        subprocess.run(
            ["bash", "-c", f'{line}; printf %s "$ODD"'], capture_output=True, text=True, check=True
        ).stdout
        == "it's $HOME"
    )


def test_a_chain_has_a_job_per_stage_and_one_for_the_end(tmp_path):
    cluster = ClusterConfig(nodes=1, gpus_per_node=1, time="10")
    scripts = job_scripts(tmp_path, cluster, chain=True)
    assert [one.part for one in scripts] == ["align", "distill", "finetune", "finish"]
    assert [one.path.name for one in scripts] == [f"job_{one.part}.sbatch" for one in scripts]
    config = tmp_path / "config.yaml"
    commands = [
        f"{sys.executable} -m launchers.slurm train {config} --stage {stage} &\n"
        for stage in ("align", "distill", "finetune")
    ]
    for one, command in zip(
        scripts, [*commands, f"{sys.executable} -m launchers.slurm run {config} &\n"], strict=True
    ):
        assert command in one.text


def test_a_value_that_nobody_gives_is_an_error():
    with pytest.raises(Exception, match="undefined"):
        render(title="x")


def test_variables_that_the_shell_lacks():
    cluster = ClusterConfig(nodes=1, gpus_per_node=1, time="10", environment=("A", "B"))
    assert missing_variables(cluster, {"A": "1"}) == ["B"]


def test_words_of_sbatch_lines():
    assert sbatch_quoted("n[1-3],n7") == "n[1-3],n7"
    assert sbatch_quoted("a b") == '"a b"'
    # seen with a real sbatch: \\ escapes, $ does nothing
    assert sbatch_quoted("a\\b\"c'#$") == '"a\\\\b\\"c\'#$"'


def test_values_make_no_options_of_their_own(tmp_path):
    said = directives(
        script(
            tmp_path / "r",
            **{**FULL, "partition": "x --wrap=y", "sbatch_args": ["--comment='a b' -C gpu"]},
        ).text
    )
    assert (
        '--partition="x --wrap=y"' in said
        and '--comment="a b" -C gpu' not in said
        and '"--comment=a b" -C gpu' in said
    )


def test_an_odd_run_folder_keeps_its_logs(tmp_path):
    odd = tmp_path / "a b%j$(touch X)'\"#ü"
    text = script(odd, nodes=1, gpus_per_node=1, time="10").text
    assert f'--output="{tmp_path}/a b%%j$(touch X)\'\\"#ü/logs/job-%j.log"' in directives(text)
    line = next(line for line in text.splitlines() if line.startswith("run="))
    assert subprocess.run(
        ["bash", "-c", f'{line}; printf %s "$run"'], capture_output=True, text=True, check=True
    ).stdout == str(odd)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"x{one}y", "output_dir: .* holds the control character")
        for one in ("\n", "\x1b", "\u2028", "\x85", "\ud800")
    ]
    + [("a\\b", "output_dir: .* holds a backslash")],
)
def test_a_run_folder_that_no_script_can_hold(tmp_path, name, says):
    with pytest.raises(ConfigError, match=says):
        script(tmp_path / name, nodes=1, gpus_per_node=1, time="10")


def test_the_current_folder_reaches_the_script_too(tmp_path, monkeypatch):
    (tmp_path / "x\n#SBATCH --wrap=y").mkdir()
    monkeypatch.chdir(tmp_path / "x\n#SBATCH --wrap=y")
    with pytest.raises(ConfigError, match="the current folder: .* holds the control character"):
        script(tmp_path / "run", nodes=1, gpus_per_node=1, time="10")
