"""Event files as TensorBoard reads them."""

import math
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import DataClass
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from megatron_hypenet.training.tags import LAYOUT, TAGS
from megatron_hypenet.training.trackers.tensorboard import TensorBoard

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000030000000208060000009d74661a"
)  # the beginning of a picture of 3 x 2 pixels


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def next_second():
    """TensorBoard reads files by name, which has whole seconds and then a counter in the process:
    10 would come before 9."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.02)


def test_resume_purges_points_that_will_be_written_again(tmp_path):
    for start, value in ((0, 1.0), (2, 9.0)):
        next_second()
        board = TensorBoard(tmp_path, start)
        for step in range(start + 1, 5):
            board.scalars(step, {"x": value})
        board.close()
    assert scalars(tmp_path)["x"] == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]


def test_points_before_a_save_outlive_a_killed_process_and_a_start_from_nothing_replaces_them(
    tmp_path,
):
    killed = TensorBoard(tmp_path)
    killed.scalars(1, {"x": 1.0})
    killed.flush()
    assert scalars(tmp_path)["x"] == [(1, 1.0)]  # while the writer is still open
    next_second()
    again = TensorBoard(tmp_path)
    again.scalars(1, {"x": 9.0})
    again.close()
    assert scalars(tmp_path)["x"] == [(1, 9.0)]
    killed.close()


def test_scalars_carry_their_meaning_once_and_texts_stay_as_they_are(tmp_path):
    board = TensorBoard(tmp_path)
    for step in (1, 2):
        board.scalars(step, {"train/kl": step / 2, "eval/recall": math.nan})
    board.text("run/config", "a: <b>\n  - c")
    board.text("speed/slow-ranks", "rank 1 on node7 1.6x", 2)
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (slow,) = events.Tensors("speed/slow-ranks/text_summary")
    assert (slow.step, slow.tensor_proto.string_val[0]) == (2, b"rank 1 on node7 1.6x")
    (kl,) = [tag for tag in TAGS if tag.name == "train/kl"]
    about = events.SummaryMetadata("train/kl").summary_description
    assert about == f"{kl.meaning} (unit: nats per token)"
    # without it the data server, which TensorBoard uses where it can, drops the description
    assert events.SummaryMetadata("train/kl").data_class == DataClass.DATA_CLASS_SCALAR
    assert scalars(tmp_path)["train/kl"] == [(1, 0.5), (2, 1.0)]
    (text,) = events.Tensors("run/config/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    a: <b>\n      - c"


def test_the_layout_has_every_chart_in_order(tmp_path):
    TensorBoard(tmp_path, layout=True).close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    found = {
        category.title: {chart.title: tuple(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }
    assert list(found) == list(LAYOUT)
    for category, charts in LAYOUT.items():
        assert list(found[category]) == list(charts)
        for title, tags in charts.items():
            assert found[category][title] == tuple(f"^{tag}$" for tag in tags)


def test_pictures_and_the_row_of_a_finished_run(tmp_path):
    board = TensorBoard(tmp_path)
    board.image("report/figure", PNG)
    board.results(
        {"distill.lr": 1e-3, "data.train": ["a", "b"], "data.heldout": None, "seed": 3},
        {"report/lm-loss": 2.5},
    )
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("report/figure")
    assert (image.width, image.height, image.encoded_image_string) == (3, 2, PNG)
    assert scalars(tmp_path)["report/lm-loss"] == [(0, 2.5)]
    started = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    row = HParamsPluginData.FromString(started).session_start_info.hparams
    assert row["distill.lr"].number_value == pytest.approx(1e-3)
    assert row["data.train"].string_value == "['a', 'b']"
    assert row["data.heldout"].string_value == "None"
