from megatron_hypenet.eval import plots
from tests.processes import loaded_by

PNG = b"\x89PNG"


def test_importance_draws_a_file(tmp_path):
    path = tmp_path / "new" / "importance.png"
    plots.importance((0.5, 50.0, 3.0), (1,), path)
    assert path.read_bytes().startswith(PNG)


def test_report_draws_a_file(tmp_path):
    rows = [
        {
            "model": name,
            "heldout_loss": 2.8,
            "heldout_accuracy": 42.0,
            "recall": {"1": 99.0, "2": 40.0, "8": 0.0},
        }
        for name in ("teacher", "hypenet")
    ]
    plots.report(
        {"rows": rows, "seq_length": 256, "train_seq_length": 256}, tmp_path / "report.png"
    )
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)


def test_importing_plots_loads_no_matplotlib():
    assert loaded_by("import megatron_hypenet.eval.plots", ("matplotlib",)) == []


def test_heat_maps_have_a_map_for_each_model_and_task(tmp_path):
    rows = [
        {"model": model, "task": task, "length": length, "depth": depth, "score": 50.0}
        for model in ("teacher", "student")
        for task in ("needle", "pairs")
        for length in (1024, 4096)
        for depth in (0.0, 1.0)
    ]
    plots.heat_maps(rows, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
