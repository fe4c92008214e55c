"""Files and words become a configuration, or one error with all problems; one file, because nearly
all of it is tables of inputs."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hypenet.config.loader import (
    completed,
    dump_config,
    load_model_config,
    load_run_config,
    read_stored,
    read_yaml,
)
from megatron_hypenet.errors import ConfigError

STAGE = (
    "{train_iters: 10, seq_length: 64, micro_batch_size: 2, global_batch_size: 8, lr: 1e-3, "
    "min_lr: 1e-5}"
)
RUN = (
    f"output_dir: runs/x\nteacher: t\ndata: {{train: [a.txt]}}\nalign: {STAGE}\ndistill: "
    f"{STAGE}\nfinetune: {STAGE}\n"
)


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def test_exponent_without_dot_is_a_number(run_file):
    run = load_run_config(run_file, ["align.lr=3e-4", "distill.lr=2E-3", "finetune.clip_grad=.5e0"])
    assert (run.align.lr, run.distill.lr, run.finetune.clip_grad, run.align.min_lr) == (
        3e-4,
        2e-3,
        0.5,
        1e-5,
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e5", 1e5),
        ("-1e-5", -1e-5),
        ("1.5e3", 1500.0),
        ("12", 12),
        ("1.0", 1.0),
        ("e5", "e5"),
        ("1e5x", "1e5x"),
    ],
)
def test_numbers(tmp_path, text, value):
    path = tmp_path / "x.yaml"
    path.write_text(f"key: {text}\n")
    assert read_yaml(path) == {"key": value}


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_python_prints_reads_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "float.yaml"
    path.write_text(f"key: {value!r}\n")
    assert read_yaml(path) == {"key": value}


def test_includes_merge_left_to_right_then_file_then_cli(tmp_path, run_file):
    (tmp_path / "one.yaml").write_text("seed: 1\nalign: {train_iters: 1, log_interval: 1}\n")
    (tmp_path / "two.yaml").write_text(
        "seed: 2\nalign: {log_interval: 2}\nselect: {seq_length: 128}\n"
    )
    run_file.write_text("include: [one.yaml, two.yaml]\n" + RUN)
    run = load_run_config(run_file, ["align.save_interval=7"])
    assert run.seed == 2 and run.select.seq_length == 128
    assert run.align.train_iters == 10  # the file itself is later than its includes
    assert run.align.log_interval == 2  # and leaves alone what it does not name
    assert run.align.save_interval == 7
    assert load_run_config(run_file, ["seed=9", "seed=10"]).seed == 10


def test_include_goes_one_level_deep(tmp_path, run_file):
    (tmp_path / "one.yaml").write_text("include: two.yaml\n")
    run_file.write_text("include: one.yaml\n" + RUN)
    with pytest.raises(ConfigError, match=r"one\.yaml: include: .*one level only"):
        load_run_config(run_file)


def test_data_sugar(run_file):
    assert load_run_config(run_file, ["data=b.txt"]).data.train == (Path("b.txt"),)
    assert load_run_config(run_file, ["data=[b.txt, c.jsonl]"]).data.train == (
        Path("b.txt"),
        Path("c.jsonl"),
    )
    assert load_run_config(run_file, ["data.train=b.txt"]).data.train == (Path("b.txt"),)
    assert load_run_config(run_file, ["data=b.txt", "data.seed=5"]).data.seed == 5
    assert load_run_config(run_file, ["--teacher=elsewhere"]).teacher == Path("elsewhere")


def test_all_problems_at_once_with_origin(run_file):
    run_file.write_text(RUN.replace("teacher: t\n", "") + "algin: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(run_file, ["align.lr=-1", "paralel.zero_stage=1", "word", "seed=[1"])
    text = str(caught.value)
    for line in (
        "6 problems",
        f"{run_file}: teacher: missing",
        f"{run_file}: algin: unknown key; did you mean 'align'?",
        "CLI: align.lr: should be greater than 0, got int -1",
        "CLI: paralel: unknown key; did you mean 'parallel'?",
        "CLI: 'word': expected key.sub=value",
        "CLI: seed: should be a valid integer, got str '[1'",
    ):
        assert line in text, text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a\n- b\n", "expected keys and values at the top, got list"),
        ("a: [1\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "'seed' is written twice"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("include: 5\n", "include: expected a list of file names"),
        ("include: missing.yaml\n", r"missing\.yaml: no such configuration file"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        ("", "missing"),
    ],
)
def test_bad_files(tmp_path, content, says):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=says):
        load_run_config(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_run_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run_config(tmp_path)


def test_dump_reads_back_equal(run_file, tmp_path):
    run = load_run_config(
        run_file,
        ["export.attn_logits_scaling=null", "align.lr=1.23456789012345e-05", "align.min_lr=0"],
    )
    again = tmp_path / "config.yaml"
    again.write_text(dump_config(run))
    assert load_run_config(again) == run
    assert list(yaml.safe_load(dump_config(run)))[:2] == ["output_dir", "teacher"]


def test_a_bundled_teacher_is_found_outside_the_repository(tmp_path, monkeypatch, run_file):
    monkeypatch.chdir(tmp_path)
    found = load_run_config(run_file, ["teacher=assets/tiny-qwen3"]).teacher
    assert found.is_absolute() and (found / "config.json").is_file()
    (tmp_path / "assets/tiny-qwen3").mkdir(parents=True)  # the current directory comes first
    found = load_run_config(run_file, ["teacher=assets/tiny-qwen3"]).teacher
    assert found == Path("assets/tiny-qwen3")


def test_presets_are_known_by_name_from_any_folder(tmp_path, monkeypatch, repo_root):
    monkeypatch.chdir(tmp_path)
    words = ["teacher=T", "data=D"]
    named = load_run_config("distill_2b", words)  # which includes other files
    assert named == load_run_config(repo_root / "configs/run/distill_2b.yaml", words)
    assert named == load_run_config("configs/run/distill_2b.yaml", words)
    assert load_model_config("tiny") == load_model_config(repo_root / "configs/model/tiny.yaml")
    with pytest.raises(ConfigError, match="none: no such configuration file"):
        load_run_config("none", words)
    (tmp_path / "distill_2b").write_text("output_dir: mine")  # a file of yours comes first
    with pytest.raises(ConfigError, match="distill_2b: teacher: missing|missing"):
        load_run_config("distill_2b")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("hypenet_2b", (2, 3, 6, 8, 9, 21, 25)),
        ("hypenet_5b", (0, 1, 7, 14, 15, 22, 24, 31, 33)),
        ("hypenet_9b", (1, 2, 4, 6, 7, 10, 24, 33, 34)),
        ("tiny", (1,)),
    ],
)
def test_shipped_models_are_the_published_ones(repo_root, name, kept):
    config = load_model_config(repo_root / f"configs/model/{name}.yaml")
    assert config.attention_layers == kept
    assert len(kept) == config.num_layers // 4
    assert config.share_embeddings_and_output_weights == (name != "hypenet_9b")
    assert not config.attn_use_rope and config.attn_use_output_gate


def test_model_file_problems_name_the_nearest_key(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("num_layer: 4\n")
    with pytest.raises(ConfigError, match="unknown key; did you mean 'num_layers'?"):
        load_model_config(path)


def test_shipped_runs_need_only_what_they_say(repo_root):
    assert load_run_config(repo_root / "configs/run/demo.yaml")
    for name in ("quickstart", "distill_06b", "distill_2b", "distill_5b", "distill_9b"):
        path = repo_root / f"configs/run/{name}.yaml"
        assert load_run_config(path, ["teacher=t", "data=x.txt"])
        with pytest.raises(ConfigError) as caught:
            load_run_config(path)
        assert "2 problems" in str(caught.value) and "teacher: missing" in str(caught.value)


@pytest.mark.parametrize(("size", "lr"), [("2b", 1e-4), ("5b", 5e-5), ("9b", 3e-5), ("06b", 1e-4)])
def test_paper_scale_is_the_papers(repo_root, size, lr):
    path = repo_root / f"configs/run/distill_{size}.yaml"
    run = load_run_config(path, ["teacher=t", "data=x.txt"])
    tokens = {
        name: run.stage(name).tokens_per_step * run.stage(name).train_iters
        for name in ("align", "distill", "finetune")
    }
    assert tokens == {"align": 327_680_000, "distill": 983_040_000, "finetune": 1_048_576_000}
    assert (run.align.lr, run.distill.lr, run.finetune.lr) == (1e-3, lr, 1e-5)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5000),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(), max_size=3),
)
NAMES = [
    "align",
    "data",
    "parallel",
    "select",
    "export",
    "train",
    "lr",
    "min_lr",
    "zero_stage",
    "seed",
    "teacher",
    "attn_logits_scaling",
]
KEYS = st.sampled_from([*NAMES, "device", "heldout", "?"])
TREES = st.recursive(SCALARS, lambda below: st.dictionaries(KEYS, below, max_size=4), max_leaves=12)


@settings(max_examples=60, deadline=None)
@given(
    tree=st.dictionaries(KEYS, TREES, max_size=3), words=st.lists(st.text(max_size=12), max_size=2)
)
def test_whatever_the_file_and_words_say_only_config_errors_come_out(tmp_path_factory, tree, words):
    folder = tmp_path_factory.getbasetemp()
    (folder / "base.yaml").write_text(RUN)
    (folder / "fuzz.yaml").write_text(yaml.safe_dump({**tree, "include": ["base.yaml"]}))
    try:
        run = load_run_config(folder / "fuzz.yaml", words)
    except ConfigError as error:
        assert str(error)
    else:
        (folder / "again.yaml").write_text(dump_config(run))
        assert load_run_config(folder / "again.yaml") == run


def test_what_was_written_earlier_is_completed_with_the_defaults_of_today(run_file):
    """A file with nothing but what is required becomes the resolved configuration; other keys and
    missing required ones are left alone."""
    now = load_run_config(run_file).model_dump(mode="json")
    written = read_yaml(run_file)
    assert completed(written) == now
    written["align"]["warp"] = 9
    assert completed(written)["align"] == {**now["align"], "warp": 9}
    assert "teacher" not in completed({}) and completed({"align": None})["align"] is None


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf", "1e999"])
def test_settings_are_finite(run_file, value):
    with pytest.raises(ConfigError, match="align.lr"):
        load_run_config(run_file, [f"align.lr={value}"])


def test_merge_keys_take_over_another_stage(tmp_path):
    (tmp_path / "stages.yaml").write_text(
        f"align: &stage {STAGE}\ndistill: {{<<: *stage, lr: 2e-3}}\n"
    )
    (tmp_path / "run.yaml").write_text(
        f"include: stages.yaml\n{RUN.split('align')[0]}finetune: &f\n  <<: [{{seq_length: 128}}, "
        f"{STAGE}]\n  lr: 5e-4\n"
    )
    run = load_run_config(tmp_path / "run.yaml", ["distill.lr=1e-4", "finetune.train_iters=3"])
    assert (run.align.lr, run.distill.lr, run.finetune.lr) == (1e-3, 1e-4, 5e-4)
    assert (run.align.train_iters, run.finetune.train_iters, run.finetune.seq_length) == (
        10,
        3,
        128,
    )


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "align.train_iters=1e3",
            "CLI: align.train_iters: should be a valid integer, got float 1e3; "
            "write 1000 if that is meant",
        ),
        ("align.train_iters=1.0", "got float 1.0; write 1"),
        ("align.train_iters=true", "should be a valid integer, got bool true"),
        ("align.train_iters=0755", "got str '0755'; YAML 1.1 reads a leading zero as octal"),
        ("align.train_iters=1:30", "base 60"),
        ("seed=" + "9" * 5000, "CLI: seed: should be a valid integer"),
        ("align.lr=true", "CLI: align.lr: should be a valid number, got bool true"),
        ("align.lr=3e-4 #x", "got str '3e-4 #x'"),
        ("align.lr=" + "[" * 3000, "CLI: align.lr: should be a valid number"),
        ("align.adam_betas=" + "[" * 3000 + "]", "nested more than"),
        ("align.cuda_graphs=1", "should be a valid boolean, got int 1"),
        (
            "parallel.zero_stage=true",
            "CLI: parallel.zero_stage: should be 0, 1, 2 or 3, got bool true",
        ),
        ("parallel.zero_stage=1.0", "got float 1.0; write 1"),
        ("teacher=~nosuchuser/x", "CLI: teacher: the path '~nosuchuser/x' begins with ~nosuchuser"),
        (
            "output_dir=${UNSET_VARIABLE}/x",
            "CLI: output_dir: .*variable UNSET_VARIABLE, which is not set",
        ),
        ("output_dir=", "CLI: output_dir: the value is empty"),
        ("output_dir==x", "CLI: output_dir: two equals signs"),
        ("data.heldout=", "CLI: data.heldout: the value is empty"),
    ],
)
def test_what_has_two_meanings_is_refused_by_name(run_file, word, says):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")) as caught:
        load_run_config(run_file, [word])
    assert len(str(caught.value)) < 400


def test_values_mean_what_their_setting_is(run_file):
    words = [
        "align.train_iters=1_000",
        "seed=0x1F",
        "checkpoint.async_save=yes",
        "data=my#file.txt",
        "output_dir=runs/a #b",
        "teacher=12.10",
    ]
    run = load_run_config(run_file, words)
    assert (run.align.train_iters, run.seed, run.checkpoint.async_save) == (1000, 31, True)
    assert (run.data.train, run.output_dir, run.teacher) == (
        (Path("my#file.txt"),),
        Path("runs/a #b"),
        Path("12.10"),
    )
    run_file.write_text(
        RUN.replace("runs/x", "2024-01-01")
        .replace("teacher: t", "teacher: 0755")
        .replace("lr: 1e-3", 'lr: "1e-3"')
    )
    run = load_run_config(run_file, ["data.train=[a=b.txt, 'c #d.txt']", "data.heldout=null"])
    assert (run.output_dir, run.teacher, run.align.lr, run.data.heldout) == (
        Path("2024-01-01"),
        Path("0755"),
        1e-3,
        None,
    )
    assert run.data.train == (Path("a=b.txt"), Path("c #d.txt"))


def test_paths_are_expanded_once_and_stored_so(run_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/base.yaml").write_text("seed: 7\ndata: {heldout: $SCRATCH/h.txt}\n")
    run_file.write_text(
        "include: ~/base.yaml\n"
        + RUN.replace("runs/x", "~/runs/x").replace("[a.txt]", "['${SCRATCH}/a.txt', ~/b]")
    )
    run = load_run_config(run_file, ["teacher=~/t"])
    assert (
        run.output_dir == tmp_path / "home/runs/x"
        and run.teacher == tmp_path / "home/t"
        and run.seed == 7
    )
    assert (
        run.data.train == (tmp_path / "scratch/a.txt", tmp_path / "home/b")
        and run.data.heldout == tmp_path / "scratch/h.txt"
    )
    (tmp_path / "stored.yaml").write_text(dump_config(run))
    monkeypatch.delenv("SCRATCH")
    assert load_run_config(tmp_path / "stored.yaml") == run
    assert read_stored(tmp_path / "stored.yaml") == run.model_dump(mode="json")
    run_file.write_text("include: $SCRATCH/base.yaml\n" + RUN)
    with pytest.raises(ConfigError, match=r"run\.yaml: include: .*SCRATCH, which is not set"):
        load_run_config(run_file)


@pytest.mark.parametrize(
    "include", ["/dev/zero", ".", "pipe", '"a\\0b"', "run.yaml", "~nosuchuser/x"]
)
def test_includes_that_are_no_files_are_refused_at_once(run_file, include):
    os.mkfifo(run_file.parent / "pipe")
    run_file.write_text(f"include: [{include}]\n" + RUN)
    with pytest.raises(
        ConfigError,
        match=r"not a regular file|cannot be read|not valid YAML|one level only|no such user",
    ):
        load_run_config(run_file)
