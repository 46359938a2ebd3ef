"""Destinations: what goes to the disk unchanged rests in the checkpoint, and only the rest is written."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bigq import CheckpointError, PlacementError, QuantizationConfig, load_and_quantize_model, materialize
from bigq.offload.space import OffloadSpace, mapping_of
from bigq.system.internals import SEES_EDITS

ON_DISK = {"": 0 if torch.cuda.is_available() else "cpu", "blocks": "disk"}


@pytest.fixture
def load(tiny, checkpoint, empty):
    def build(weights=None, **options):
        options.setdefault("offload", "preserve")
        config = options.pop("config", QuantizationConfig("nf4"))
        return load_and_quantize_model(empty(tiny), weights or checkpoint, config, ON_DISK, **options)

    return build


def files_of(model):
    return {mapping_of(p)[0].path for p in model.blocks.parameters()}


def test_preserved_tensors_stay_in_the_checkpoint(load, checkpoint, tmp_path):
    model = load()  # with no offload_folder: nothing is written
    assert files_of(model) == {str(checkpoint / "model.safetensors")}
    other = load(offload_folder=tmp_path / "off", config=QuantizationConfig("nf4", dtype="bf16"))
    assert files_of(other) == {f"the unnamed file in {tmp_path / 'off'}"}, "a cast needs a copy"
    state = load_file(checkpoint / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks."):
            assert torch.equal(tensor, state[name])


def test_they_are_not_read_at_load(load, checkpoint):
    (read,) = (stage for stage in load().quantization_report.stages if stage.name == "read")
    state = load_file(checkpoint / "model.safetensors")
    assert read.nbytes == sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("blocks."))


def test_without_a_folder_it_is_the_one_for_temporary_files(load, tmp_path, monkeypatch, ids):
    folder = tmp_path / "temporary"
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    model = load(offload="quantized")
    assert f"the unnamed file in {folder}" in files_of(model)
    assert list(folder.iterdir()) == [], "it has no name, and goes with the model"
    assert torch.equal(model(ids), load(offload="quantized", offload_folder=tmp_path / "off")(ids))


def test_a_zipped_state_dict_is_rested_in_too(load, checkpoint, ids, tmp_path):
    torch.save(load_file(checkpoint / "model.safetensors"), tmp_path / "model.pt")
    model = load(tmp_path / "model.pt")
    assert files_of(model) == {str(tmp_path / "model.pt")}
    assert torch.equal(model(ids), load()(ids))


def test_legacy_pickles_are_copied(load, checkpoint, ids, tmp_path):
    state = load_file(checkpoint / "model.safetensors")
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    model = load(tmp_path / "model.pt", offload_folder=tmp_path / "off")
    assert files_of(model) == {f"the unnamed file in {tmp_path / 'off'}"}
    assert torch.equal(model(ids), load()(ids))


def test_edits_are_used_and_do_not_reach_the_checkpoint(load, checkpoint, ids):
    before = (checkpoint / "model.safetensors").read_bytes()
    model, same = load(), load()
    expected = model(ids)
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.zero_()
    changed = model(ids)
    assert not torch.equal(changed, expected)
    assert torch.equal(same(ids), expected)
    model.load_state_dict(same.state_dict())
    assert torch.equal(model(ids), expected)
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_a_checkpoint_cut_short_is_an_error_that_names_it(load, checkpoint, ids):
    model = load()
    os.truncate(checkpoint / "model.safetensors", 60_000)
    # without a count of edits, the map may have some that the file has not: it is read if the file has its length
    words = "ended at byte 60000" if SEES_EDITS else r"had \d+ bytes and now has 60000"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors {words}"):
        model(ids)


@pytest.mark.parametrize("turned", [False, True], ids=["in-order", "transposed"])
def test_so_it_is_for_a_tensor_that_was_edited_in_memory(load, checkpoint, ids, turned):
    """Cutting a file frees the pages of its map, also those that were edited: reading one is a SIGBUS."""
    file = checkpoint / "model.safetensors"
    for is_called_before in (False, True):
        whole, model = file.read_bytes(), load()
        if is_called_before:
            model(ids)
        with torch.no_grad():
            weight = model.blocks[1].up.weight
            weight[0] = 0
            if turned:
                weight.data = weight.data.mT
        os.truncate(file, 4096)
        with pytest.raises(CheckpointError, match=r"model\.safetensors .*cut short after the model was loaded"):
            model(ids)
        with pytest.raises(CheckpointError, match=r"model\.safetensors .*cut short after the model was loaded"):
            materialize(model)
        file.write_bytes(whole)


def test_a_checkpoint_removed_or_replaced_is_no_matter(load, checkpoint, ids):
    model = load()
    expected = model(ids)
    file = checkpoint / "model.safetensors"
    state = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    file.unlink()
    assert torch.equal(model(ids), expected)
    save_file(state, file)
    assert torch.equal(model(ids), expected)


def test_an_unaligned_tensor_is_copied(empty, tmp_path, ids):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.arange(3, dtype=torch.uint8), requires_grad=False)
            self.body = nn.Linear(64, 64)
            self.kept = nn.LayerNorm(64)

        def forward(self, x):
            return self.kept(self.body(x))

    plain = Odd()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(
        (size + 1).to_bytes(8, "little") + raw[8 : 8 + size] + b" " + raw[8 + size :]
    )  # data from an odd offset on: valid, if unusual
    device_map = {**ON_DISK, "kept": "disk"}
    del device_map["blocks"]
    model = load_and_quantize_model(
        empty(Odd), tmp_path, QuantizationConfig("nf4"), device_map, offload_folder=tmp_path / "off"
    )
    assert mapping_of(model.kept.weight)[0].path == f"the unnamed file in {tmp_path / 'off'}"
    assert torch.equal(model.kept.weight, plain.kept.weight)
    assert model(torch.randn(2, 64)).isfinite().all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_buffers_rest_where_they_run_and_keep_what_is_written_to_them(empty, tmp_path, training):
    def build():
        return nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), nn.Linear(64, 64))

    plain = build()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    device_map = {"": ON_DISK[""], "0": "disk"}
    model = load_and_quantize_model(empty(build), tmp_path, QuantizationConfig("nf4"), device_map).train(training)
    norm, x = model[0][1], torch.randn(8, 64) + 3
    for _ in range(3):
        model(x)
    assert norm.num_batches_tracked.item() == (3 if training else 0)
    assert (norm.running_mean.abs().sum() > 1) == training
    assert mapping_of(norm.running_mean) is None
    assert mapping_of(norm.weight) is not None


def test_models_share_an_offload_folder_and_leave_nothing_behind(load, ids, tmp_path):
    models = [load(offload="quantized", offload_folder=tmp_path / "off") for _ in range(2)]
    with torch.no_grad():
        models[1].blocks[0].up.weight.zero_()
    expected = load(offload="quantized", offload_folder=tmp_path / "off")(ids)
    for _ in range(2):
        assert torch.equal(models[0](ids), expected)
        assert not torch.equal(models[1](ids), expected)
    assert os.listdir(tmp_path / "off") == []


def test_all_that_a_weight_becomes_rests_in_its_place(tiny, checkpoint, empty, ids, tmp_path):
    """Also where a device map places the weight alone: its scales are no names of the map."""
    places = {"": ON_DISK[""], "blocks.0.up.weight": "disk"}
    config = QuantizationConfig("nf4", double_quant=True)
    options = {"offload": "quantized", "offload_folder": tmp_path / "off"}
    model = load_and_quantize_model(empty(tiny), checkpoint, config, places, **options)
    up = model.blocks[0].up
    on_disk = {name for name, tensor in up.named_parameters() if mapping_of(tensor) is not None}
    assert on_disk == set(up.state_spec())
    assert all(mapping_of(tensor) is None for tensor in model.blocks[1].parameters())
    everywhere = load_and_quantize_model(empty(tiny), checkpoint, config, ON_DISK[""])
    assert torch.equal(model(ids), everywhere(ids))


KILLED_HALF_WAY = """
import os, pathlib, signal, sys
from torch import nn
from bigq import QuantizationConfig, load_and_quantize_model, materialize
from bigq.loading import destinations
from accelerate import init_empty_weights

folder = pathlib.Path(sys.argv[1])
put_state, placed = destinations.Destinations.put_state, []

def kill(self, linear, state):
    placed.append(put_state(self, linear, state))
    if len(placed) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return placed[-1]

destinations.Destinations.put_state = kill
with init_empty_weights():
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
config = QuantizationConfig("nf4", skip_defaults=False)
load_and_quantize_model(model, folder, config, {"": "disk"}, offload="quantized", offload_folder=folder / "off")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sends SIGKILL")
def test_a_process_killed_half_way_leaves_nothing(tmp_path):
    save_file(nn.ModuleList(nn.Linear(64, 64) for _ in range(8)).state_dict(), tmp_path / "model.safetensors")
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root, root / "triton_kernels")))
    run = subprocess.run(
        [sys.executable, "-c", KILLED_HALF_WAY, tmp_path], env={**os.environ, "PYTHONPATH": path}, capture_output=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert os.listdir(tmp_path / "off") == []


def test_a_full_disk_is_an_error_before_anything_is_read(load, monkeypatch, tmp_path, tiny):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr("bigq.load_source.fill", lambda *args, **kwargs: pytest.fail("began to read"))
    with pytest.raises(PlacementError, match="No space left"):
        load(offload="quantized", offload_folder=tmp_path / "off")


def test_names_that_sort_oddly_lie_apart(tmp_path):
    """Names are ordered by their parts: "a.b" and "a-c" do not interleave with what is below "a"."""
    from bigq.formats import TensorSpec

    names = ["a.b", "a-c.w", "a.d", "a.b.c"]
    space = OffloadSpace.in_file(tmp_path, {name: TensorSpec(shape=(4,), dtype=torch.uint8) for name in names})
    order = sorted(names, key=lambda name: mapping_of(space.empty(name))[1])
    assert order == ["a.b", "a.b.c", "a.d", "a-c.w"]
