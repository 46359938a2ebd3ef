"""A checkpoint on the Hub, described by the headers of its files: no weights are downloaded."""

import json
from functools import partial

import pytest
import torch
from huggingface_hub import HfFileSystem
from safetensors.torch import save_file

import bigq
from bigq.checkpoint import Checkpoint
from bigq.checkpoint import hub as hub_module
from bigq.dry_run.estimate import estimate_memory
from bigq.dry_run.inspect_checkpoint import inspect_checkpoint
from bigq.errors import CheckpointError
from range_server import range_server

REPO = "owner/name"


@pytest.fixture
def server(hub, monkeypatch):
    """What the fake Hub publishes, served by ranges."""
    with range_server(hub.publish()) as served:
        files = partial(HfFileSystem, endpoint=served.address, token=False, skip_instance_cache=True)
        monkeypatch.setattr(hub_module, "HfFileSystem", files)
        yield served


@pytest.mark.parametrize("count", [1, 3])
def test_only_headers_are_read(count, server, hub):
    tensors = {f"layers.{i}.weight": torch.randn(512, 256) for i in range(6)}
    if count == 1:
        save_file(tensors, server.folder / "model.safetensors")
    else:
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        where = {name: names[i % count] for i, name in enumerate(tensors)}
        for file in names:
            save_file({n: t for n, t in tensors.items() if where[n] == file}, server.folder / file)
        index = json.dumps({"weight_map": where})
        (server.folder / "model.safetensors.index.json").write_text(index)
    found = Checkpoint.open_headers(REPO)
    assert {n: (s.shape, s.dtype) for n, s in found.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    assert hub.downloaded == ([] if count == 1 else ["model.safetensors.index.json"])
    assert sum(server.sent.values()) <= count * 2 * (64 << 10) < found.nbytes / 3
    assert torch.equal(found.get("layers.2.weight"), tensors["layers.2.weight"])


def test_headers_are_read_as_those_of_local_files(server):
    """Every dtype, shapes of any rank, tensors of no elements, and metadata."""
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.float64]
    shapes = [(), (0,), (3, 0, 2), (5,), (2, 3, 4)]
    tensors = {f"{d}.{i}": torch.zeros(shape).to(d) for d in dtypes for i, shape in enumerate(shapes)}
    path = server.folder / "model.safetensors"
    for held in (tensors, {}):
        save_file(held, path, metadata={"format": "pt"})
        local, remote = Checkpoint.open(path), Checkpoint.open_headers(REPO)
        assert remote.tensors.keys() == local.tensors.keys()
        for name, stored in remote.tensors.items():
            assert (stored.shape, stored.dtype, stored.nbytes) == (
                local.tensors[name].shape,
                local.tensors[name].dtype,
                local.tensors[name].nbytes,
            )
            assert stored.spans[0].offset == local.tensors[name].spans[0].offset


HEADERS = {  # damaged ones of a file with 8 bytes of data: what is said
    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}': "takes 8 bytes, but its header gives it 4",
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}': "begins at byte 4 of the data, expected 0",
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}': "cut short or changed",
    '{"a": {"dtype": "F6", "shape": [2], "data_offsets": [0, 8]}}': "dtypes that torch does not have: 'a' .F6.",
    '{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}': "gives 'a' no shape",
    '{"a": {"dtype": "F32", "shape": [2]}}': "does not describe 'a'",
    '{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "a": {}}': "names a twice",
    "[]": "is no JSON object",
}


def test_damaged_headers_are_refused(server):
    for header, words in HEADERS.items():
        data = header.encode()
        (server.folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(8))
        with pytest.raises(CheckpointError, match=words):
            Checkpoint.open_headers(REPO)


@pytest.mark.parametrize("layout", ["bigq", "bitsandbytes"])
def test_a_quantized_model_is_planned_from_afar(layout, server, tiny, empty, tmp_path):
    config = bigq.QuantizationConfig("nf4", double_quant=True)
    model = bigq.load_and_quantize_model(tiny(width=256), None, config, "cpu")
    bigq.save_quantized(model, server.folder, layout=layout)
    plan = bigq.plan(empty(tiny, width=256), device_map="cpu", weights_location=f"{REPO}@v1")
    assert plan == bigq.plan(empty(tiny, width=256), device_map="cpu", weights_location=server.folder)
    assert plan.quantized_share > 0.9
    (size,) = (file.stat().st_size for file in server.folder.glob("*.safetensors"))
    assert sum(server.sent.values()) < size


def test_a_repository_is_planned_and_estimated_by_its_id(server, hub):
    transformers = pytest.importorskip("transformers", minversion="5.17")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(server.folder)
    plan = bigq.plan(REPO, "nf4", "cpu", revision="v2")
    assert plan == bigq.plan(server.folder, "nf4", "cpu")
    assert {revision for _, revision, _ in hub.downloads} == {"v2"}
    found = estimate_memory(f"{REPO}@v2", "nf4", max_memory={0: "1GB"})
    assert found.plan.tensors == bigq.plan(model, "nf4", {"": 0}, other_machine=True).tensors
    assert found.fits is True
    assert inspect_checkpoint(REPO).parameters == model.num_parameters()
    assert hub.downloaded == ["config.json"]
    assert sum(server.sent.values()) < 4 * (64 << 10)


def test_what_is_in_the_cache_is_read_there(server, hub):
    save_file({"a": torch.ones(2)}, server.folder / "model.safetensors")
    Checkpoint.open(REPO)
    assert torch.equal(Checkpoint.open_headers(REPO).get("a"), torch.ones(2))
    hub.error = ConnectionError("no route")
    assert torch.equal(Checkpoint.open_headers(REPO).get("a"), torch.ones(2))
    assert not server.requests


def test_refusals_name_the_file_on_the_hub(server):
    torch.save({"a": torch.ones(2)}, server.folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"'owner/name' is no safetensors file.*download it"):
        Checkpoint.open_headers(REPO)
    path = server.folder / "model.safetensors"
    save_file({"a": torch.ones(20_000)}, path)
    data = path.read_bytes()
    for content, words in [
        (data[:-1], "it was cut short or changed"),
        (b"\xff" * 100, "no header of safetensors"),
        (data[:8] + b"#" + data[9:], "cannot open model.safetensors of the Hub repository"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words) as caught:
            Checkpoint.open_headers(REPO)
        assert "/tmp" not in str(caught.value)
    path.write_bytes(data)
    server.is_broken = True
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors of the Hub repository 'owner/name'"):
        Checkpoint.open_headers(REPO)
