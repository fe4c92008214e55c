"""The work of a run's steps, in operations."""

import pytest

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.planning.planned_work import planned_work
from tests.unit.halo.test_run_folder import STAGE, config

TEACHER = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=100,
    share_embeddings_and_output_weights=True,
    mixer_types=("attn",) * 4,
    attn_use_rope=True,
    attn_use_output_gate=False,
)


STEPS = (
    "teacher", "data", "probe", "align", "select", "assemble", "distill", "finetune", "export",
    "report",
)  # fmt: skip


def test_work_grows_with_what_is_asked(tmp_path):
    base = planned_work(config(tmp_path), TEACHER, STEPS)
    longer = planned_work(config(tmp_path, distill={**STAGE, "train_iters": 4}), TEACHER, STEPS)
    assert longer["distill"].flops == 2 * base["distill"].flops
    assert longer["align"] == base["align"]
    wider = planned_work(config(tmp_path, eval={"length_multiples": [1]}), TEACHER, STEPS)
    assert wider["report"].flops < base["report"].flops and wider["select"] == base["select"]
    assert tuple(base) == STEPS
    assert [name for name, work in base.items() if not work.flops] == [
        *("teacher", "data", "assemble", "export")
    ]


def test_pauses_and_unequal_parts_are_planned(tmp_path):
    stage = {**STAGE, "train_iters": 10, "save_interval": 4, "eval_interval": 3}
    work = planned_work(config(tmp_path, align=stage), TEACHER, STEPS)
    assert (work["align"].evaluations, work["align"].saves) == (4, 3)  # and after the last step
    assert work["distill"].evaluations == 1 and work["align"].evaluation_flops > 0
    # the student's language loss and recall come to the loss of the stage itself
    assert work["finetune"].evaluation_flops > 2 * work["align"].evaluation_flops
    parts = work["report"].parts
    assert len(parts) == 4 * 5 and parts[4] > 8 * parts[1]  # 8 times as long, and attention
    assert sum(parts) == pytest.approx(work["report"].flops)


def test_a_gate_costs_what_it_measures(tmp_path):
    def work(**bounds):
        found = planned_work(
            config(tmp_path, eval={"gate": {"distill": bounds}}), TEACHER, ["distill-gate"]
        )
        return found["distill-gate"].flops

    assert work() == 0.0 < work(min_recall=50.0) < work(min_recall=50.0, recall_multiple=2)
    # as many sequences, by teacher and student
    assert work(max_loss_ratio=2.0) == pytest.approx(2 * work(min_recall=50.0))


def test_distillation_costs_more_per_token_than_finetuning(tmp_path):
    work = planned_work(config(tmp_path), TEACHER, STEPS)
    assert work["distill"].flops > work["finetune"].flops
