import torch

from megatron_hypenet.export.plan import plan_import
from tests.processes import loaded_by
from tests.unit.export.test_from_hf import NORM


def test_plan_reads_no_weights_and_writes_nothing(hf_model, tmp_path):
    model = hf_model(student=True)
    model.tensors[NORM][0] = torch.nan
    plan = plan_import(model.write(tmp_path / "hf"))
    assert plan.kind == "student" and plan.config == model.model and not plan.duplicate_head


def test_no_tensor_library_is_imported(hf_model, tmp_path):
    """A tensor library would cost a second in every command that only starts processes; numpy comes
    with safetensors."""
    folder = hf_model().write(tmp_path / "hf")
    code = (
        "import pathlib, sys; from megatron_hypenet.export.plan import plan_import; "
        "plan_import(pathlib.Path(sys.argv[1]))"
    )
    assert loaded_by(code, ("torch", "transformers"), folder) == []
