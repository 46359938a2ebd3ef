"""Which files are found for each accepted form of `weights_location`, and how the others are refused."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigq.checkpoint import index
from bigq.checkpoint.locate import locate
from bigq.errors import CheckpointError


def write(folder: Path, *names: str) -> None:
    """Write empty files: locating never opens a checkpoint file."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_index(path: Path, *shards: str, bare: bool = False) -> None:
    weight_map = {f"tensor.{i}": shard for i, shard in enumerate(shards)}
    path.write_text(json.dumps(weight_map if bare else {"metadata": {"total_size": 1}, "weight_map": weight_map}))


def names(location) -> list[str]:
    return [path.name for path in location.files]


def refused(location: object, *parts: str) -> None:
    with pytest.raises(CheckpointError) as info:
        locate(location)
    for part in parts:
        assert part in str(info.value)


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BIN_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


class PathLike:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "odd name.safetensors",
        "~tilde.bin",
        "gewichte-äöü-权重.pt",
        "a.b.pth",
        "x-00001-of-00002.bin",
    ],
)
def test_a_file_of_any_name(tmp_path, name):
    write(tmp_path, name)
    for form in (str, Path, PathLike):
        assert locate(form(tmp_path / name)).files == (tmp_path / name,)


@pytest.mark.parametrize("bare", [False, True], ids=["weight_map", "bare map"])
@pytest.mark.parametrize("shards", [SHARDS, BIN_SHARDS], ids=["safetensors", "bin"])
def test_an_index(tmp_path, bare, shards):
    write(tmp_path, *shards)
    write_index(tmp_path / "the.index.json", *reversed(shards), bare=bare)
    for form in (str, Path, PathLike):
        location = locate(form(tmp_path / "the.index.json"))
        assert location.files == tuple(tmp_path / shard for shard in shards)
        assert location.index == tmp_path / "the.index.json"
        assert location.weight_map == {"tensor.0": tmp_path / shards[1], "tensor.1": tmp_path / shards[0]}


def test_a_folder(tmp_path):
    write(tmp_path, "model.safetensors", "config.json", "README.md")
    for form in (str, Path, PathLike):
        location = locate(form(tmp_path))
        assert location.files == (tmp_path / "model.safetensors",)
        assert location.weight_map == {}


@pytest.mark.parametrize("folder", ["with space", "~", "ünï-码", "owner@v1"])
def test_folder_names_are_taken_as_they_stand(tmp_path, monkeypatch, folder):
    write(tmp_path / folder, "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert locate(folder).files == (Path(folder, "model.safetensors"),)


def test_a_local_folder_wins_over_a_repository_of_that_name(tmp_path, monkeypatch, hub):
    write(tmp_path / "owner" / "name", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name").files == (Path("owner/name/model.safetensors"),)
    assert hub.revisions == []


@pytest.mark.parametrize(
    "present, expected",
    [
        pytest.param(["model.safetensors", "pytorch_model.bin"], ["model.safetensors"], id="safetensors before bin"),
        pytest.param(["odd.safetensors", "pytorch_model.bin"], ["odd.safetensors"], id="odd safetensors before bin"),
        pytest.param(["model.safetensors", "odd.safetensors"], ["model.safetensors"], id="standard name before odd"),
        pytest.param(["consolidated.safetensors"], ["consolidated.safetensors"], id="one odd safetensors"),
        pytest.param(["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"], id="standard bin"),
        pytest.param(["weights.pt"], ["weights.pt"], id="one odd pickle"),
        pytest.param([".hidden.safetensors", "weights.pth"], ["weights.pth"], id="hidden files are ignored"),
        pytest.param([*SHARDS], [*SHARDS], id="safetensors shards without index"),
        pytest.param([*BIN_SHARDS], [*BIN_SHARDS], id="bin shards without index"),
        pytest.param(["m-00000-of-00002.bin", "m-00001-of-00002.bin"], None, id="shards counted from zero"),
        pytest.param(["m-00001-of-00001.safetensors"], None, id="a set of one shard"),
        pytest.param(["M.SAFETENSORS", "weights.bin"], ["M.SAFETENSORS"], id="capital safetensors before bin"),
        pytest.param(["Weights.PT"], ["Weights.PT"], id="a capital pickle"),
        pytest.param(["last.ckpt"], ["last.ckpt"], id="a checkpoint of a training"),
        pytest.param(["best.pth.tar", "weights.pth"], ["weights.pth"], id="a state dict before that of a training"),
        pytest.param(["text.safetensors", "vision.safetensors"], None, id="several safetensors, judged by the reader"),
    ],
)
def test_preference_without_an_index(tmp_path, present, expected):
    write(tmp_path, *present)
    assert names(locate(tmp_path)) == (present if expected is None else expected)


@pytest.mark.parametrize(
    "indexes, present, expected",
    [
        pytest.param(
            {"model.safetensors.index.json": SHARDS, "pytorch_model.bin.index.json": BIN_SHARDS},
            [*SHARDS, *BIN_SHARDS],
            SHARDS,
            id="both formats",
        ),
        pytest.param(
            {"model.safetensors.index.json": SHARDS, "pytorch_model.bin.index.json": BIN_SHARDS},
            [SHARDS[0], *BIN_SHARDS],
            BIN_SHARDS,
            id="only the bin shards are complete",
        ),
        pytest.param(
            {"model.safetensors.index.json": SHARDS, "pytorch_model.bin.index.json": BIN_SHARDS},
            [*SHARDS, BIN_SHARDS[0]],
            SHARDS,
            id="only the safetensors shards are complete",
        ),
        pytest.param(
            {"model.safetensors.index.json": SHARDS, "b.safetensors.index.json": ["b.safetensors"]},
            [*SHARDS, "b.safetensors"],
            SHARDS,
            id="the standard index before another",
        ),
        pytest.param(
            {"a.safetensors.index.json": ["a.safetensors"], "b.safetensors.index.json": ["b.safetensors"]},
            ["b.safetensors"],
            ["b.safetensors"],
            id="one of two odd indexes is complete",
        ),
        pytest.param(
            {"model.safetensors.index.json": SHARDS},
            [*SHARDS, "consolidated.safetensors"],
            SHARDS,
            id="an index before a file it does not name",
        ),
        pytest.param(
            {"model.safetensors.index.json": SHARDS}, ["pytorch_model.bin"], ["pytorch_model.bin"], id="stale index"
        ),
        pytest.param(
            {"tf_model.h5.index.json": ["tf-1.h5"]}, ["weights.bin"], ["weights.bin"], id="another framework's index"
        ),
    ],
)
def test_preference_among_indexes(tmp_path, indexes, present, expected):
    write(tmp_path, *present)
    for name, shards in indexes.items():
        write_index(tmp_path / name, *shards)
    assert names(locate(tmp_path)) == [*expected]


def test_work_on_names_is_done_for_each_file_and_not_for_each_tensor(tmp_path, monkeypatch):
    checked = []
    plain = index._stays_inside
    monkeypatch.setattr(index, "_stays_inside", lambda file: checked.append(file) or plain(file))
    (tmp_path / "a.safetensors").touch()
    weight_map = {f"{i}.weight": "a.safetensors" for i in range(100)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    location = locate(tmp_path)
    assert set(checked) == {"a.safetensors"}
    assert len(checked) <= 2
    assert len({id(path) for path in (*location.weight_map.values(), *location.files)}) == 1


def test_shards_in_a_subfolder_of_the_index(tmp_path):
    write(tmp_path, "shards/a.safetensors")
    write_index(tmp_path / "model.safetensors.index.json", "shards/a.safetensors")
    assert locate(tmp_path).files == (tmp_path / "shards" / "a.safetensors",)


def test_ambiguous_folders_name_the_candidates(tmp_path):
    write(tmp_path, "a.bin", "b.pt")
    refused(tmp_path, "several state dicts", "a.bin, b.pt", "pass the path")


def test_several_checkpoints_of_a_training_are_not_chosen_among(tmp_path):
    write(tmp_path, "epoch=1.ckpt", "last.ckpt", "x.pth.tar")
    refused(tmp_path, "several state dicts", "epoch=1.ckpt, last.ckpt, x.pth.tar", "pass the path")


def test_two_complete_odd_indexes_name_the_candidates(tmp_path):
    write(tmp_path, "a.safetensors", "b.safetensors")
    write_index(tmp_path / "a.index.json", "a.safetensors")
    write_index(tmp_path / "b.index.json", "b.safetensors")
    refused(tmp_path, "several complete checkpoints", "a.index.json, b.index.json")


def test_an_incomplete_set_is_not_taken_for_a_checkpoint(tmp_path):
    write(tmp_path, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    refused(tmp_path, "1 of the 3 shards of model.safetensors are missing", "model-00002-of-00003.safetensors")


VARIANT = [f"model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]


@pytest.mark.parametrize("index", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"])
def test_a_variant_with_its_index(tmp_path, index):
    write(tmp_path, *VARIANT)
    write_index(tmp_path / index, *VARIANT)
    assert names(locate(tmp_path)) == VARIANT
    (tmp_path / VARIANT[1]).unlink()
    refused(tmp_path, index, "1 missing file(s): model-00002-of-00002.fp16.safetensors")


def test_the_shards_of_a_variant_are_a_set_of_their_own(tmp_path):
    write(tmp_path, *VARIANT)
    assert names(locate(tmp_path)) == VARIANT
    write(tmp_path, SHARDS[0])
    refused(tmp_path, f"1 of the 2 shards of model.safetensors are missing, first {SHARDS[1]}")
    (tmp_path / SHARDS[0]).unlink()
    (tmp_path / VARIANT[0]).unlink()
    refused(tmp_path, f"1 of the 2 shards of model.fp16.safetensors are missing, first {VARIANT[0]}")


def test_a_standard_index_comes_before_that_of_a_variant(tmp_path):
    write(tmp_path, *SHARDS, *VARIANT)
    write_index(tmp_path / "model.safetensors.index.json", *SHARDS)
    write_index(tmp_path / "model.safetensors.index.fp16.json", *VARIANT)
    assert names(locate(tmp_path)) == [*SHARDS]


def test_a_shard_count_from_a_name_costs_nothing(tmp_path):
    total = "9" * 30
    write(tmp_path, f"m-1-of-{total}.bin")
    refused(tmp_path, f"of the {total} shards of m.bin are missing, first m-{2:030}-of-{total}.bin")


def test_every_missing_shard_is_named(tmp_path):
    write(tmp_path, SHARDS[0])
    write_index(tmp_path / "model.safetensors.index.json", *SHARDS, "extra.safetensors")
    for location in (tmp_path, tmp_path / "model.safetensors.index.json"):
        refused(location, "2 missing file(s)", "extra.safetensors", SHARDS[1], "model.safetensors.index.json")


def test_both_incomplete_indexes_are_reported(tmp_path):
    write_index(tmp_path / "model.safetensors.index.json", SHARDS[0])
    write_index(tmp_path / "pytorch_model.bin.index.json", BIN_SHARDS[0])
    refused(tmp_path, SHARDS[0], BIN_SHARDS[0])


def test_the_files_of_a_broken_index_are_not_guessed_at(tmp_path):
    write(tmp_path, "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safe')
    refused(tmp_path, "model.safetensors.index.json is not valid JSON", "half-written")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not valid JSON"),
        (b'{"weight_map": {"a": "b.safe', "not valid JSON"),
        (b"\xff\xfe\xfd", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "no weight map"),
        (b"{}", "no weight map"),
        (b'{"weight_map": {}}', "no weight map"),
        (b'{"weight_map": ["a"]}', "no weight map"),
        (b'{"architectures": ["Llama"]}', "'architectures' maps to ['Llama']"),
        (b'{"weight_map": {"a": 3}}', "'a' maps to 3"),
        (b'{"weight_map": {"a": "1.bin", "a": "2.bin"}}', "gives 'a' twice"),
        (b'{"weight_map": {"a": "1.bin"}, "weight_map": {"b": "1.bin"}}', "gives 'weight_map' twice"),
        (b'{"weight_map": {"a": ' + b"[" * 200 + b"1" * 2000 + b"]" * 200 + b"}}", "'a' maps to [[[[["),
        (b'{"a": "tf_model-1.h5"}', "files of another kind: tf_model-1.h5"),
    ],
)
def test_a_bad_index_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.index.json"
    path.write_bytes(content)
    refused(path, str(path), message)


def test_a_long_list_of_missing_or_foreign_files_is_cut(tmp_path):
    write_index(tmp_path / "model.safetensors.index.json", *[f"{i:04}.safetensors" for i in range(300)])
    refused(tmp_path, "300 missing file(s): 0000.safetensors", "and 290 more")
    write_index(tmp_path / "model.safetensors.index.json", *[f"../{i:04}.safetensors" for i in range(300)])
    refused(tmp_path, "outside its own folder: '../0000.safetensors'", "and 290 more")


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "/etc/x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "\\\\host\\share\\x.safetensors",
        "..",
        ".",
        "",
    ],
)
def test_an_index_may_not_leave_its_folder(tmp_path, file):
    folder = tmp_path / "inner"
    write(folder, "ok.safetensors")
    write(tmp_path, "x.safetensors")
    write_index(folder / "model.safetensors.index.json", "ok.safetensors", file)
    for location in (folder, folder / "model.safetensors.index.json"):
        refused(location, "outside its own folder", repr(file), "model.safetensors.index.json")


def test_a_folder_where_a_shard_should_be_is_a_missing_file(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    write_index(tmp_path / "model.safetensors.index.json", "a.safetensors")
    refused(tmp_path, "1 missing file(s): a.safetensors")


def test_a_folder_without_weights_lists_what_it_has(tmp_path):
    write(tmp_path, "config.json", "flax_model.msgpack")
    refused(tmp_path, str(tmp_path), "holds no checkpoint", "config.json, flax_model.msgpack")
    refused(tmp_path / ".." / tmp_path.name, "holds no checkpoint")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, str(tmp_path), "found no files")


@pytest.mark.parametrize("name", ["missing.safetensors", "owner/missing.bin", "a/b/c d", "./x", "../x", "x y", "name@"])
def test_a_missing_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, hub, name):
    monkeypatch.chdir(tmp_path)
    refused(name, "no such file or folder", str(Path(name)), "Hub repository id")
    assert hub.revisions == []


def test_a_path_object_is_never_a_repository(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    refused(Path("owner/name"), "no such file or folder: " + os.path.join("owner", "name"))
    assert hub.revisions == []


def test_a_tilde_is_not_expanded_and_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "model.safetensors")
    refused("~/model.safetensors", "~/model.safetensors", "expanduser()")


def test_an_empty_string_is_not_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path, "model.safetensors")
    monkeypatch.chdir(tmp_path)
    refused("", "weights_location is empty")


@pytest.mark.parametrize("name", ["weights.gguf", "0123abcd", "last.ckpt", "M.SAFETENSORS", "a.pth.tar"])
def test_a_file_is_not_refused_for_its_name(tmp_path, name):
    write(tmp_path, name)
    assert locate(tmp_path / name).files == (tmp_path / name,)


def test_a_dangling_link(tmp_path):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone")
    refused(tmp_path / "link.safetensors", "link.safetensors", "neither a file nor a folder")


def test_links_out_of_the_folder_are_followed(tmp_path):
    """The Hub's cache is made of them."""
    save_file({"a": torch.ones(2)}, tmp_path / "blob")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert locate(folder).files == (folder / "model.safetensors",)


def test_an_unlistable_folder(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    refused(tmp_path, str(tmp_path), "Permission denied")


def test_an_unreadable_index(tmp_path, monkeypatch):
    write_index(tmp_path / "a.index.json", "a.bin")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    refused(tmp_path / "a.index.json", str(tmp_path / "a.index.json"), "Permission denied")


@pytest.mark.parametrize("location", [None, 3, b"model.safetensors"], ids=repr)
def test_what_is_no_path_at_all_is_a_type_error(location):
    with pytest.raises(TypeError, match=re.compile("str")):
        locate(location)
