from megatron_hypenet.eval import plots
from tests.processes import loaded_by

PNG = b"\x89PNG"


def test_importance_draws_a_file(tmp_path):
    path = tmp_path / "new" / "importance.png"
    plots.importance((0.5, 50.0, 3.0), (1,), path, mixer="kda", axis="share")
    assert path.read_bytes().startswith(PNG)


def axis_of(*panels):
    figure, axes = plots._figure(4, 3, 1, len(panels))
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis)
    figure.canvas.draw()
    return axes[0]


def test_the_legend_of_importances_has_the_colours_of_the_bars():
    axis = axis_of(plots.importance_panel((0.5, 5.0), (1,), mixer="kda", axis="share"))
    assert axis.get_ylabel() == "share"
    bars = [patch.get_facecolor() for patch in axis.patches]
    shown = {
        text.get_text(): patch.get_facecolor()
        for text, patch in zip(
            axis.get_legend().get_texts(), axis.get_legend().get_patches(), strict=True
        )
    }
    assert shown == {"becomes kda": bars[0], "keeps softmax attention": bars[1]}


def test_equal_lines_stay_apart():
    """Nothing that the eye goes by is shared: place, colour, marker, dashes."""
    points = [(256.0, 50.0), (512.0, 40.0)]
    names = ["a", "_b", "$c", "d"]
    series = [
        plots.Series(label=name, points=points, ranges=[(45.0, 60.0), None]) for name in names
    ]
    axis = axis_of(plots.by_length(series, title="$T", unit="%", percent=True, mark=256))
    lines = [line for line in axis.get_lines() if line.get_marker() in plots.MARKERS]
    assert len(lines) == 4
    for look in ("get_color", "get_marker"):
        assert len({getattr(line, look)() for line in lines}) == 4, look
    assert len({tuple(line.get_xdata()) for line in lines}) == 4
    assert len({str(line._dash_pattern) for line in lines}) == 4
    shown = [text.get_text().strip() for text in axis.get_legend().get_texts()]
    assert shown == names
    (bars, *_) = [one.lines[2] for one in axis.containers]
    low, high = bars[0].get_segments()[0][:, 1]
    assert (low, high) == (45.0, 60.0)


def test_curves_and_constants_are_drawn():
    student = plots.Series(label="student", points=[(1.0, 3.0), (2.0, 2.0)])
    teacher = plots.Series(label="teacher", points=[(1.0, 1.5), (2.0, 1.5)], constant=True)
    axis = axis_of(plots.curves([student, teacher], title="loss", unit="nats", log=True))
    assert axis.get_yscale() == "log" and len(axis.get_lines()) == 2
    first, second = axis.get_lines()
    assert first.get_linewidth() > second.get_linewidth(), "an equal line below still shows"
    zero = plots.Series(label="x", points=[(1.0, 0.0)])
    assert axis_of(plots.curves([zero], title="x", unit="", log=True)).get_yscale() == "linear"


def test_pictures_are_the_same_for_the_same_content(tmp_path):
    panels = [plots.curves([plots.Series(label="x", points=[(1.0, 1.0)])], title="t", unit="u")] * 3
    assert plots.svg(panels) == plots.svg(panels) and b"<svg" in plots.svg(panels)
    plots.png(panels, tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(PNG)


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
