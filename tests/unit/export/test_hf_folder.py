import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import hf_folder
from megatron_hypenet.export.hf_folder import HfWeights


@pytest.fixture
def sharded(hf_model, tmp_path):
    return hf_model().write(tmp_path / "hf", shards=2)


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_written(hf_model, tmp_path, shards):
    model = hf_model()
    weights = HfWeights(model.write(tmp_path / "hf", shards=shards))
    assert set(weights) == set(model.tensors) and len(weights) == len(model.tensors)
    for name, tensor in model.tensors.items():
        assert (
            torch.equal(weights[name], tensor)
            and weights.shape(name) == tuple(tensor.shape)
            and weights.dtype(name) == "F32"
        )
    assert weights.total_bytes() > sum(tensor.nbytes for tensor in model.tensors.values())


def test_truncated_file(hf_model, tmp_path):
    folder = hf_model().write(tmp_path / "hf")
    data = (folder / "model.safetensors").read_bytes()
    for keep in (0, 5, 200, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:keep])
        with pytest.raises(ConversionError, match="not a complete safetensors file.*cut off"):
            HfWeights(folder)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ConversionError, match="names model-00002-of-00002.safetensors, which is missing"
    ):
        HfWeights(sharded)


def test_index_names_a_tensor_that_is_elsewhere(sharded):
    edit_index(
        sharded,
        lambda index: index.update({"model.norm.weight": _other(index["model.norm.weight"])}),
    )
    with pytest.raises(
        ConversionError,
        match="1 tensors are not in the file that the index names, first model.norm.weight",
    ):
        HfWeights(sharded)


def test_index_names_a_tensor_that_is_nowhere(sharded):
    edit_index(sharded, lambda index: index.update({"ghost": "model-00001-of-00002.safetensors"}))
    with pytest.raises(ConversionError, match="first ghost"):
        HfWeights(sharded)


def test_index_cannot_point_outside_the_folder(sharded):
    edit_index(sharded, lambda index: index.update({"ghost": "../secret.safetensors"}))
    with pytest.raises(ConversionError, match="not inside the folder"):
        HfWeights(sharded)


def test_tensor_in_two_files(sharded):
    file = sharded / "model-00001-of-00002.safetensors"
    weights = HfWeights(sharded)
    stale = {name: weights[name] for name in weights}
    save_file(stale, file)
    with pytest.raises(ConversionError, match="holds too; remove the stale file"):
        HfWeights(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"metadata": {}}'])
def test_broken_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConversionError, match="cannot be read|not valid JSON|expected an object"):
        HfWeights(sharded)


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConversionError, match="only pytorch_model.bin; only safetensors are read"):
        HfWeights(tmp_path)


def test_generation_config(tmp_path):
    assert hf_folder.read_generation_config(tmp_path) is None
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConversionError, match="not valid JSON"):
        hf_folder.read_generation_config(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.9}')
    assert hf_folder.read_generation_config(tmp_path) == {"top_p": 0.9}


def test_shards_respect_the_limit_and_keep_the_order():
    sizes = [("a", 4), ("b", 4), ("c", 12), ("d", 1), ("e", 9), ("f", 1)]
    assert hf_folder.plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert hf_folder.plan_shards(sizes, 100) == [["a", "b", "c", "d", "e", "f"]]


def _other(file):
    return (
        file.replace("00001-of", "X-of").replace("00002-of", "00001-of").replace("X-of", "00002-of")
    )


def test_one_file_beside_the_index_of_another_model_is_refused(hf_model, tmp_path):
    folder = hf_model().write(tmp_path / "hf", shards=2)
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(
        ConversionError, match=r"two models: model.safetensors, .* model-00001-of-00002.safetensors"
    ):
        HfWeights(folder)


def test_an_index_of_one_file_may_name_it_as_if_there_were_none(hf_model, tmp_path):
    model = hf_model()
    folder = model.write(tmp_path / "hf")
    index = {"metadata": {}, "weight_map": dict.fromkeys(model.tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(HfWeights(folder)) == set(model.tensors)


def test_generation_settings_are_read_from_the_folder_alone(hf_model, tmp_path):
    folder = hf_model().write(tmp_path / "hf")
    (tmp_path / "auth.json").write_text('{"token": "secret"}')
    (folder / "generation_config.json").symlink_to(tmp_path / "auth.json")
    with pytest.raises(ConversionError, match="leads out of the folder"):
        hf_folder.read_generation_config(folder)


def test_header_is_the_one_of_the_library(tmp_path):
    tensors = {
        "b.10": torch.randn(3, 5),
        "b.2": torch.randn(4),
        "a": torch.randn(2, 2, dtype=torch.float64),
        "h": torch.randn(7).half(),
        "g": torch.randn(1, 9).bfloat16(),
    }
    codes = {dtype: code for code, dtype in hf_folder.DTYPES.items()}
    described = {
        name: (codes[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    header, order = hf_folder.weights_header(described)
    content = b"".join(tensors[name].view(-1).view(torch.uint8).numpy().tobytes() for name in order)
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    assert header + content == (tmp_path / "x").read_bytes()


def test_values_from_any_place(hf_model, tmp_path):
    model = hf_model()
    weights = HfWeights(model.write(tmp_path / "hf"))
    name = "model.layers.1.mlp.up_proj.weight"
    target = torch.empty(40)
    weights.read_values(name, 33, target)
    assert torch.equal(target, model.tensors[name].view(-1)[33:73])
    (tmp_path / "hf/model.safetensors").write_bytes(b"cut")
    with pytest.raises(ConversionError, match="cannot be read whole; fetch the file again"):
        weights.read_values(name, 33, target)


def test_a_folder_in_the_place_of_weights_and_an_adapter_are_refused(hf_model, tmp_path):
    folder = hf_model().write(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ConversionError, match=r"safetensors: cannot be read: Is a directory"):
        HfWeights(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match="holds an adapter, such as LoRA's, which is not app"):
        HfWeights(folder)
