"""HALO's steps on a random tiny teacher: what each leaves, and what stops a run."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_hypenet.checkpoint.load import read_manifest, read_model_config, read_weights, resolve
from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.config.loader import load_run_config
from megatron_hypenet.config.selection import SELECTION_METHODS
from megatron_hypenet.errors import CheckpointError, ConfigError, QualityError
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.to_hf import export_hf
from megatron_hypenet.export.verify import verify
from megatron_hypenet.halo.actions import Halo
from megatron_hypenet.halo.build_stage import load_hypenet
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import Runner
from megatron_hypenet.model.transformer_engine import PACKAGE, version_of
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.selection.scores import load_scores
from tests import tiny_run
from tests.tiny import whole_tensors

GATES = ("select.gates.train_iters=2", "select.gates.global_batch_size=2")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Provide a function from overrides to a Runner with its Halo."""
    tiny_run.fake_material(monkeypatch)
    tiny_run.write_teacher(tmp_path / "qwen3")
    path = tmp_path / "run.yaml"
    tiny_run.write_config(tmp_path)

    def build(*overrides):
        run = load_run_config(path, overrides)
        folder = RunFolder(run.output_dir)
        folder.prepare(run)
        groups.init_parallel(run.parallel)
        exported = []
        halo = Halo(
            run=run,
            folder=folder,
            import_teacher=lambda source, target: import_hf(source, target) and None,
            export_student=lambda source, target: exported.append(source) or target.mkdir(),
            note_figures=lambda target, report: (target / "noted").write_text(json.dumps(report)),
        )
        return Runner(run, folder, halo.steps()), halo

    return build


def test_every_step_leaves_what_the_next_one_needs(make):
    runner, halo = make()
    runner.run_all()
    folder = runner.folder
    assert list(folder.records()) == list(runner.steps)
    chosen = json.loads(folder.mixers_file.read_text())
    student = read_model_config(folder.assembled)
    assert (
        student.mixer_types == tuple(chosen["mixer_types"]) and len(chosen["attention_layers"]) == 1
    )
    for stage in ("distill", "finetune"):
        assert read_model_config(folder.stage(stage)) == student
        assert resolve(folder.stage(stage)).name == "iter_0000002"
    assert read_manifest(resolve(folder.stage("align"))).hf_config["model_type"] == "qwen3"
    assert all(".self_attention." in name for name in read_weights(folder.stage("align")))
    assert load_scores(folder.scores_file).num_layers == 3
    report = json.loads(folder.report_file.read_text())
    assert [row["model"] for row in report["rows"]] == [
        "teacher",
        "all layers converted",
        "student after stage 2",
        "student after stage 3",
    ]
    assert set(report["step_seconds"]) == set(runner.steps)
    assert json.loads((folder.export / "noted").read_text()) == report
    assert folder.report_plot.is_file() and folder.importance_plot.is_file()


LLAMA = {
    "qk_layernorm": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
QWEN2 = {"qk_layernorm": False, "add_qkv_bias": True}


@pytest.mark.parametrize(("family", "changes"), [("llama", LLAMA), ("qwen2", QWEN2)])
def test_a_teacher_of_another_family_becomes_a_student_that_keeps_its_kind(
    make, tmp_path, family, changes
):
    shape = tiny_run.TEACHER.replace(**changes)
    source = tiny_run.write_teacher(tmp_path / family, shape=shape)
    runner, halo = make(f"teacher={source}")
    folder = runner.folder
    exports = replace(halo, export_student=export_hf)
    Runner(runner.run, folder, exports.steps()).run_all()
    assert read_manifest(resolve(folder.stage("align"))).hf_config["model_type"] == family
    student = read_model_config(folder.stage("finetune"))
    assert student == shape.with_mixers(student.mixer_types).replace(
        max_position_embeddings=student.max_position_embeddings
    )
    report = verify(folder.export, folder.stage("finetune"), dtype="float64", num_tokens=24)
    report.require_ok()
    assert report.logits.max_rel_diff < 1e-6
    raw = json.loads((folder.export / "config.json").read_text())
    assert raw["attn_use_qk_norm"] is False
    assert raw.get("qkv_bias", False) == student.add_qkv_bias


def test_no_run_starts_from_a_teacher_with_yarn(make, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    shape = tiny_run.TEACHER.replace(rope_scaling=yarn)
    runner, _ = make(f"teacher={tiny_run.write_teacher(tmp_path / 'yarn', shape=shape)}")
    with pytest.raises(ConfigError, match="no student can be made of it"):
        runner.run_all()
    assert "align" not in runner.folder.records()


def test_a_gate_stops_a_run_and_another_bound_lets_it_go_on(make):
    runner, _ = make("eval.gate.distill.max_loss_ratio=1e-3", "eval.gate.finetune.min_recall=40")
    assert [name for name in runner.steps if "gate" in name] == ["distill-gate", "finetune-gate"]
    with pytest.raises(QualityError, match="eval.gate.distill.max_loss_ratio=0.001"):
        runner.run_all()
    before = runner.folder.records()
    assert list(before)[-1] == "distill"
    runner, _ = make("eval.gate.distill.max_loss_ratio=100", "eval.gate.finetune.min_recall=40")
    runner.run_all()
    after = runner.folder.records()
    assert {name: after[name] for name in before} == before
    assert 0 < after["distill-gate"]["loss_ratio"] < 100
    assert after["finetune-gate"]["recall"] == 50.0 and "report" in after
    # bounds decide no result: without them, nothing that was trained is done again
    runner, _ = make()
    assert all(row["state"] == "done" for row in runner.plan())


def test_training_moves_the_weights_of_its_stage(make):
    runner, _ = make()
    runner.run_through("distill")
    folder = runner.folder
    before = read_weights(folder.assembled)
    after = read_weights(folder.stage("distill"))
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "finetune" not in folder.records()


def test_no_step_reads_what_another_did_not_write(make):
    """One bit changes in what a finished step left, and the steps after it are done again: each
    stops and names the damaged checkpoint."""
    runner, _ = make()
    runner.run_all()
    folder = runner.folder
    record = json.loads(folder.manifest_file.read_text())
    after = list(record["steps"])
    last = "checkpoints/iter_0000002"
    for step, place, again in [
        ("teacher", folder.teacher, ("probe", "align", "select", "assemble", "distill", "report")),
        ("align", folder.stage("align") / last, ("select", "assemble", "report")),
        ("assemble", folder.assembled, ("distill",)),
        ("distill", folder.stage("distill") / last, ("finetune", "report")),
        ("finetune", folder.stage("finetune") / last, ("report",)),
    ]:
        data = next((place / "weights").glob("*.distcp"))
        good = data.read_bytes()
        content = bytearray(good)
        content[len(content) // 2] ^= 64
        data.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{place} is damaged"):
            runner.run_all()
        for name in again:  # by itself, as if nothing had looked at the checkpoint before
            forgotten = {
                key: value
                for key, value in record["steps"].items()
                if after.index(key) < after.index(name)
            }
            folder.manifest_file.write_text(json.dumps({**record, "steps": forgotten}))
            with pytest.raises(CheckpointError, match=f"{place} is damaged"):
                runner.steps[name].action()
        data.write_bytes(good)
        folder.manifest_file.write_text(json.dumps(record))
        assert step in folder.records()
    runner.run_all()


def test_an_untrained_teacher_stops_the_run_before_training(make):
    runner, _ = make("guard.max_teacher_loss=null")
    with pytest.raises(CheckpointError, match="looks untrained"):
        runner.run_all()
    assert "probe" not in runner.folder.records() and not runner.folder.stage("align").exists()


def test_a_hypenet_is_no_teacher(make, tmp_path):
    runner, _ = make()
    runner.run_through("assemble")
    halo = Halo(
        run=runner.run,
        folder=RunFolder(tmp_path / "other"),
        import_teacher=lambda *_: None,
        export_student=lambda *_: None,
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "teacher").symlink_to(runner.folder.assembled)
    with pytest.raises(CheckpointError, match="is not a teacher"):
        halo.do_probe()


def test_an_interrupted_sweep_continues(make, monkeypatch):
    runner, halo = make()
    runner.run_through("align")
    from megatron_hypenet.halo import evaluation

    scored = []
    original = evaluation.Measure.selection_scores

    def counted(self, model):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(1)
        return original(self, model)

    monkeypatch.setattr(evaluation.Measure, "selection_scores", counted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_step("select")
    assert list(json.loads(runner.folder.scores_file.read_text())["layers"]) == ["0"]
    monkeypatch.setattr(
        evaluation.Measure,
        "selection_scores",
        lambda self, model: scored.append(1) or original(self, model),
    )
    runner.run_step("select")
    assert len(scored) == 4  # the baseline and three layers, each once


@pytest.mark.parametrize("method", SELECTION_METHODS)
def test_every_method_leaves_the_files_of_layer_selection(make, method):
    runner, _ = make(f"select.method={method}", "select.num_attention_layers=2", *GATES)
    runner.run_through("select")
    folder = runner.folder
    scores = load_scores(folder.scores_file)
    assert (scores.method, scores.num_layers) == (method, 3) and scores.seconds >= 0
    assert (scores.tokens > 0) == (method != "uniform")
    record = folder.records()["select"]
    chosen = json.loads(folder.mixers_file.read_text())
    assert record["attention_layers"] == chosen["attention_layers"]
    assert len(chosen["attention_layers"]) == 2
    assert (record["method"], record["tokens"]) == (method, scores.tokens)
    assert folder.importance_plot.is_file() and (folder.tensorboard / "selection").is_dir()


def test_another_method_is_another_selection(make):
    runner, _ = make()
    runner.run_through("select")
    assert runner.is_done("select")
    other, _ = make("select.method=uniform")
    assert other.is_done("align") and not other.is_done("select")


def test_a_choice_made_by_hand_is_assembled(make):
    runner, _ = make()
    runner.run_through("assemble")
    folder = runner.folder
    folder.mixers_file.write_text(
        json.dumps({"mixer_types": ["attn", "lightning_attn", "attn"], "attention_layers": [0, 2]})
    )
    runner.run_through("assemble")
    assert read_model_config(folder.assembled).attention_layers == (0, 2)


def test_a_stage_can_start_from_a_given_student(make, tmp_path):
    runner, halo = make()
    runner.run_through("assemble")
    other, other_halo = make(f"output_dir={tmp_path / 'other'}")
    checkpoint = other_halo.train_from(other, "finetune", runner.folder.assembled)
    assert checkpoint.name == "iter_0000002"
    assert set(other.folder.records()) == {"teacher", "data", "finetune"}


def test_too_many_attention_layers_are_refused(make):
    runner, _ = make("select.num_attention_layers=4")
    with pytest.raises(ConfigError, match="num_attention=4 is out of range for 3"):
        runner.run_through("select")


def test_the_probe_measures_what_fp8_does_to_the_teacher_and_stops_above_the_bound(
    make, monkeypatch
):
    monkeypatch.setattr("megatron_hypenet.halo.build_stage.require_fp8_gpu", lambda setting: None)
    words = ("device=auto", "precision=auto", "fp8.teacher=true")
    runner, _ = make(*words)
    runner.run_through("probe")
    found = runner.folder.records()["probe"]
    assert 0 < found["fp8_kl"] < 0.02 and 0.5 < found["fp8_same_choice"] <= 1
    strict, _ = make(*words, "guard.max_fp8_kl=1e-9", "output_dir=" + str(runner.folder.root) + "2")
    with pytest.raises(QualityError, match=r"fp8\.teacher=true.*limit is 1\.00e-09.*max_fp8_kl"):
        strict.run_through("probe")


def test_fp8_decides_the_stages_that_compute_in_it(make):
    runner, _ = make()
    taught, _ = make("device=auto", "precision=auto", "fp8.teacher=true")
    plain, _ = make("device=auto", "precision=auto")
    engine = "model.transformer_impl=transformer_engine"
    moved, _ = make("device=auto", "precision=auto", engine)
    learnt, _ = make("device=auto", "precision=auto", engine, "fp8.student=current")

    def own(found):
        """Return the stages whose own inputs differ from those of the plain run."""
        return [
            name
            for name in ("align", "distill", "finetune")
            if found.steps[name].inputs() != plain.steps[name].inputs()
        ]

    assert own(taught) == ["align", "distill"]
    assert own(learnt) == ["distill", "finetune"]
    # whose layers run decides nothing, so a run may change it
    assert moved.fingerprint("align") == plain.fingerprint("align")
    assert taught.fingerprint("align") != plain.fingerprint("align")
    assert runner.steps["align"].inputs() is None


@pytest.mark.gpu
@pytest.mark.skipif(
    version_of(PACKAGE) is None, reason="this is about Transformer Engine, which is optional"
)
def test_a_stage_goes_on_in_the_other_implementation_and_back(make, tmp_path):
    words = ("device=cuda", "precision=bfloat16")
    other = "model.transformer_impl=transformer_engine"
    moved = f"output_dir={tmp_path / 'moved'}"
    for length, more in ((2, ()), (4, (other,)), (6, ())):
        runner, _ = make(*words, moved, f"distill.train_iters={length}", *more)
        runner.run_through("distill")
        assert resolve(runner.folder.stage("distill")).name == f"iter_000000{length}"
    stayed, _ = make(*words, f"output_dir={tmp_path / 'stayed'}", "distill.train_iters=6")
    stayed.run_through("distill")
    found, wanted = (read_weights(one.folder.stage("distill")) for one in (runner, stayed))
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-2, atol=4e-3, msg=name)
    # the same weights are the same files, whichever layers hold them
    files = []
    for impl in ("local", "transformer_engine"):
        run = load_run_config(tmp_path / "run.yaml", [*words, f"model.transformer_impl={impl}"])
        model = load_hypenet(run, runner.folder.stage("distill"))
        out = tmp_path / f"checkpoint-{impl}"
        write_weights(out, whole_tensors(model), model.model_config, kind="student")
        export_hf(out, tmp_path / f"hf-{impl}")
        files.append((tmp_path / f"hf-{impl}" / "model.safetensors").read_bytes())
    assert files[0] == files[1]
