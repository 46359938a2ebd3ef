"""Which files of a Hub repository are downloaded, and what its failures say."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import save_file

from bigq import QuantizationConfig, load_and_quantize_model
from bigq.checkpoint import Checkpoint
from bigq.checkpoint.locate import locate
from bigq.errors import CheckpointError

REPO = "owner/name"


def write_shards(folder, names, index):
    """One tensor to a file, named and valued after its position."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        save = save_file if name.endswith(".safetensors") else torch.save
        save({f"tensor.{i}": torch.full((2,), float(i))}, folder / name)
    (folder / index).write_text(json.dumps({"weight_map": {f"tensor.{i}": name for i, name in enumerate(names)}}))


def http_error(kind, message="the server's words"):
    return kind(message, response=SimpleNamespace(headers={}, request=None, status_code=404))


def test_a_single_file_and_nothing_else_is_downloaded(hub):
    source = hub.publish()
    save_file({"a": torch.ones(2)}, source / "model.safetensors")
    for name in ("pytorch_model.bin", "tokenizer.json", "flax_model.msgpack", "model.safetensors.index.json"):
        (source / name).touch()
    checkpoint = Checkpoint.open(REPO)
    assert torch.equal(checkpoint.get("a"), torch.ones(2))
    assert hub.revisions == [None]
    assert hub.downloads == [(REPO, None, ["model.safetensors"])]
    assert hub.downloaded == ["model.safetensors"]


def test_a_model_loads_from_a_repository(hub, tiny, empty, ids):
    config, plain = QuantizationConfig("nf4"), tiny()
    save_file(plain.state_dict(), hub.publish() / "model.safetensors")
    model = load_and_quantize_model(empty(tiny), f"{REPO}@v1", config, "cpu")
    assert hub.downloads == [(REPO, "v1", ["model.safetensors"])]
    assert torch.equal(model(ids), load_and_quantize_model(plain, None, config, "cpu")(ids))


def test_what_says_how_weights_are_quantized_comes_with_them(hub):
    source = hub.publish()
    save_file({"q.weight": torch.ones(2, 2, dtype=torch.uint8)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(CheckpointError, match="quantized already: HQQ"):
        Checkpoint.open(REPO)
    assert hub.downloaded == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/3"])
def test_a_folder_of_a_repository(hub, revision):
    source = hub.publish()
    (source / "a" / "unet").mkdir(parents=True)
    shards = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    write_shards(source / "a" / "unet", shards, "m.safetensors.index.json")
    save_file({"x": torch.ones(2)}, source / "model.safetensors")
    location = locate(f"{REPO}/a/unet" + (f"@{revision}" if revision else ""))
    assert location.files == tuple(hub.cache / "a" / "unet" / shard for shard in shards)
    assert {(repo, asked) for repo, asked, _ in hub.downloads} == {(REPO, revision)}
    assert hub.downloaded == sorted([*shards, "m.safetensors.index.json"])
    hub.error = OfflineModeIsEnabled("offline mode")
    assert Checkpoint.open(f"{REPO}/a/unet").get("tensor.1").tolist() == [1, 1]


def test_a_folder_that_a_repository_lacks(hub):
    source = hub.publish()
    (source / "unet").mkdir()
    save_file({"a": torch.ones(2)}, source / "unet" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match="'owner/name' has no folder 'vae'; there are weights in its folders unet"
    ):
        locate(f"{REPO}/vae")
    with pytest.raises(
        CheckpointError, match=r"holds no checkpoint.*weights in its folders unet: pass 'owner/name/fol"
    ):
        locate(REPO)


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3", "0123abc"])
def test_the_revision_reaches_every_request(hub, revision):
    source = hub.publish()
    write_shards(source, ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"], "a.index.json")
    locate(f"{REPO}@{revision}")
    assert hub.revisions == [revision]
    assert [(repo, asked) for repo, asked, _ in hub.downloads] == [(REPO, revision)] * 2


def test_a_name_without_an_owner(hub):
    save_file({"a": torch.ones(2)}, hub.publish() / "model.safetensors")
    locate("gpt2")
    assert hub.downloads == [("gpt2", None, ["model.safetensors"])]


def test_shards_are_downloaded_with_their_index_alone(hub):
    source = hub.publish()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    write_shards(source, shards, "model.safetensors.index.json")
    write_shards(source, bins, "pytorch_model.bin.index.json")
    save_file({"a": torch.ones(2)}, source / "consolidated.safetensors")
    checkpoint = Checkpoint.open(REPO)
    assert {name: tensor.tolist() for name, tensor in checkpoint.read(checkpoint.tensors)} == {
        "tensor.0": [0.0, 0.0],
        "tensor.1": [1.0, 1.0],
    }
    index = "model.safetensors.index.json"
    assert [patterns for _, _, patterns in hub.downloads] == [[index], [index, *shards]]
    assert hub.downloaded == sorted([index, *shards])


def test_pickles_when_there_are_no_safetensors(hub):
    source = hub.publish()
    torch.save({"a": torch.ones(2)}, source / "pytorch_model.bin")
    (source / "training_args.bin").touch()
    assert torch.equal(Checkpoint.open(REPO).get("a"), torch.ones(2))
    assert hub.downloaded == ["pytorch_model.bin"]


def test_an_odd_name_with_pattern_characters_is_downloaded_literally(hub):
    source = hub.publish()
    save_file({"a": torch.ones(2)}, source / "we[i]ghts*.safetensors")
    assert torch.equal(Checkpoint.open(REPO).get("a"), torch.ones(2))
    assert hub.downloaded == ["we[i]ghts*.safetensors"]


def test_shards_in_a_subfolder(hub):
    source = hub.publish()
    write_shards(source, ["weights/a.safetensors", "weights/b.safetensors"], "model.safetensors.index.json")
    assert [*Checkpoint.open(REPO).tensors] == ["tensor.0", "tensor.1"]


def test_several_unindexed_files_are_refused_before_a_download(hub):
    source = hub.publish()
    for name in ("fp16.safetensors", "fp32.safetensors"):
        save_file({"a": torch.ones(2)}, source / name)
    with pytest.raises(CheckpointError, match=r"'owner/name' holds several .*: fp16.safetensors, fp32.safetensors"):
        locate(REPO)
    assert hub.downloads == []


def test_a_repository_without_weights(hub):
    (hub.publish() / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"the Hub repository 'owner/name' holds no checkpoint.*config.json"):
        locate(REPO)


def test_a_repository_with_missing_shards(hub):
    source = hub.publish()
    write_shards(source, ["a.safetensors", "b.safetensors"], "model.safetensors.index.json")
    (source / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"'owner/name' holds no complete .* missing file\(s\): b.safetensors"):
        locate(REPO)


def test_an_index_of_a_repository_may_not_leave_its_folder(hub):
    source = hub.publish()
    (source / "model.safetensors.index.json").write_text(json.dumps({"a": "../../secret.bin"}))
    with pytest.raises(CheckpointError, match=r"outside its own folder: '../../secret.bin'"):
        locate(REPO)


@pytest.mark.parametrize(
    "error, message",
    [
        (
            OfflineModeIsEnabled("offline mode"),
            "no file or folder .*'owner/name'.*could not be reached.*pass their folder",
        ),
        (TimeoutError("timed out"), r"could not be reached \(TimeoutError: timed out\)"),
        (
            http_error(RepositoryNotFoundError),
            "no file, folder or Hub repository is called 'owner/name'.*hf auth login",
        ),
        (http_error(GatedRepoError), "'owner/name' is gated: ask for access on https://huggingface.co/owner/name"),
        (http_error(RevisionNotFoundError), "'owner/name' has no revision 'v9'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_say_what_to_do_and_keep_their_cause(hub, error, message):
    hub.error = error
    with pytest.raises(CheckpointError, match=message) as info:
        locate(f"{REPO}@v9")
    assert info.value.__cause__ is error


def test_a_failed_download(hub):
    save_file({"a": torch.ones(2)}, hub.publish() / "model.safetensors")
    error = ConnectionResetError("peer went away")

    def model_info(*args, **kwargs):
        hub.error = error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")])

    hub.model_info = model_info
    with pytest.raises(CheckpointError, match=r"'owner/name'.*peer went away") as info:
        locate(REPO)
    assert info.value.__cause__ is error


def test_the_cached_copy_serves_when_the_hub_cannot_be_reached(hub, caplog):
    save_file({"a": torch.ones(2)}, hub.publish() / "model.safetensors")
    Checkpoint.open(REPO)
    hub.error = OfflineModeIsEnabled("offline mode is enabled")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(Checkpoint.open(REPO).get("a"), torch.ones(2))
    assert str(hub.cache) in caplog.text


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "model.fp16.safetensors", "weights.pt", "last.ckpt"]
)
def test_any_single_file_of_the_cached_copy_serves(hub, name):
    source = hub.publish()
    (save_file if name.endswith("safetensors") else torch.save)({"a": torch.ones(2)}, source / name)
    Checkpoint.open(REPO)
    hub.error = OfflineModeIsEnabled("offline mode is enabled")
    assert torch.equal(Checkpoint.open(REPO).get("a"), torch.ones(2))


def test_a_cached_copy_without_weights(hub):
    hub.cache.mkdir()
    (hub.cache / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"could not be reached.*the cache is not whole: .*holds no checkpoint"):
        locate(REPO)
    with pytest.raises(CheckpointError, match=r"could not be reached"):
        locate(f"{REPO}/unet")


def test_an_incomplete_cached_copy_is_refused(hub):
    source = hub.publish()
    write_shards(source, ["a.safetensors", "b.safetensors"], "model.safetensors.index.json")
    locate(REPO)
    (hub.cache / "b.safetensors").unlink()
    hub.error = OfflineModeIsEnabled("offline mode is enabled")
    with pytest.raises(CheckpointError, match=r"missing file\(s\): b.safetensors"):
        locate(REPO)
