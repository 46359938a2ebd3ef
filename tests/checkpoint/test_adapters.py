"""Renamed and Converted: the same values under other names and in other shapes, however they are read."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq.checkpoint import Checkpoint, Conversion, Converted, Renamed
from bigq.errors import CheckpointError
from bigq.loading.runs import Target
from bigq.loading.stream import Budget, stream
from bigq.loading.timings import Timings
from bigq.model.in_place import ModelTensors
from sources import stacked

AMPLE = Budget(threads=2, nbytes=8 << 20)
SMALL = Budget(threads=3, nbytes=1 << 15)  # runs of 8 KiB in chunks of 2.7 kB
E, N, K = 5, 30, 41
STACK = [f"experts.{i}.up" for i in range(E)]


@pytest.fixture
def tensors():
    return {
        "embed": torch.randn(20, K),
        **{name: torch.randn(N, K) for name in STACK},
        **{f"experts.{i}.bias": torch.randn(N).half() for i in range(E)},
        **{f"experts.{i}.scale": torch.tensor(float(i)) for i in range(E)},
        **{f"experts.{i}.none": torch.zeros(0, 3) for i in range(E)},
        "head": torch.randn(20, K).bfloat16(),
    }


@pytest.fixture(params=["safetensors", "zip", "legacy"])
def checkpoint(request, tensors, tmp_path):
    """Two files, and the experts in both of them."""
    for shard in range(2):
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % 2 == shard}
        if request.param == "safetensors":
            save_file(part, tmp_path / f"model-0000{shard + 1}-of-00002.safetensors")
        else:
            path = tmp_path / f"pytorch_model-0000{shard + 1}-of-00002.bin"
            torch.save(part, path, _use_new_zipfile_serialization=request.param == "zip")
    return Checkpoint.open(tmp_path)


def streamed(source, budget, *, own=False):
    arrived = {}

    def memory(stored):
        return lambda: torch.empty(stored.shape, dtype=stored.dtype)

    cpu = torch.device("cpu")
    wanted = {name: Target(device=cpu, allocate=memory(t) if own else None) for name, t in source.tensors.items()}
    for pieces in stream(source, wanted, budget, Timings()):
        for piece in pieces:
            before = arrived.get(piece.info.name, piece.tensor[:0] if piece.tensor.dim() else None)
            assert piece.start == (0 if before is None else len(before))
            whole = piece.tensor.clone() if before is None or not len(before) else torch.cat([before, piece.tensor])
            arrived[piece.info.name] = whole
    return arrived


def assert_holds(source, expected):
    """Read at once, streamed in pieces, and streamed into memory of its own."""
    assert set(source.tensors) == set(expected)
    at_once = {name: tensor.clone() for name, tensor in source.read(list(expected)[::-1])}
    assert list(at_once) == list(source.tensors)
    for arrived in (at_once, streamed(source, AMPLE), streamed(source, SMALL), streamed(source, AMPLE, own=True)):
        assert arrived.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(arrived[name], tensor), name
            stored = source.tensors[name]
            assert (arrived[name].dtype, arrived[name].shape) == (tensor.dtype, tensor.shape), name
            assert (stored.name, stored.dtype, stored.shape) == (name, tensor.dtype, tensor.shape)


def test_renamed_tensors_are_those_of_the_old_names(checkpoint, tensors):
    names = {"embed": "head", "head": "embed", "experts.0.up": "first"}
    assert_holds(Renamed(checkpoint, names), {names.get(name, name): tensor for name, tensor in tensors.items()})


def test_stacked_tensors_are_those_that_torch_stacks(checkpoint, tensors):
    stacks = {leaf: [f"experts.{i}.{leaf}" for i in range(E)] for leaf in ("up", "bias", "scale", "none")}
    stacks["up"] = stacks["up"][::-1]  # the order of the list, not that of the file
    expected = {name: torch.stack([tensors[member] for member in members]) for name, members in stacks.items()}
    assert_holds(stacked(checkpoint, stacks), {"embed": tensors["embed"], "head": tensors["head"], **expected})


def test_adapters_adapt_each_other(checkpoint, tensors):
    renamed = Renamed(checkpoint, {name: name.replace("experts", "mlp") for name in STACK})
    source = Renamed(stacked(renamed, {"all": [name.replace("experts", "mlp") for name in STACK]}), {"all": "w"})
    assert torch.equal(dict(source.read(["w"]))["w"], torch.stack([tensors[name] for name in STACK]))
    assert torch.equal(streamed(source, SMALL)["w"], torch.stack([tensors[name] for name in STACK]))


def test_a_stack_whose_members_lie_side_by_side_is_one_span(tmp_path):
    stored = {f"{i}": torch.randn(4, 4) for i in range(6)}
    save_file(stored, tmp_path / "model.safetensors")
    source = stacked(Checkpoint.open(tmp_path), {"in order": ["1", "2", "3"], "not in order": ["5", "4", "0"]})
    assert [len(source.tensors[name].spans) for name in ("in order", "not in order")] == [1, 3]
    assert_holds(
        source,
        {
            name: torch.stack([stored[i] for i in ids])
            for name, ids in {"in order": "123", "not in order": "540"}.items()
        },
    )


def test_members_that_adjoin_by_offset_but_lie_in_two_files_are_two_spans(tmp_path):
    stored = {name: torch.randn(4, 4) for name in "abcd"}
    for file, names in (("1", "ab"), ("2", "cd")):
        save_file({name: stored[name] for name in names}, tmp_path / f"{file}.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    (first,), (second,) = checkpoint.tensors["a"].spans, checkpoint.tensors["d"].spans
    assert first.offset + first.nbytes == second.offset
    source = stacked(checkpoint, {"ad": ["a", "d"], "bc": ["b", "c"]})
    assert_holds(source, {"ad": torch.stack([stored["a"], stored["d"]]), "bc": torch.stack([stored["b"], stored["c"]])})


def test_a_stack_of_which_one_member_lies_in_no_plain_bytes_is_read_as_a_copy(tmp_path):
    stored = {"plain": torch.randn(4, 4), "view": torch.randn(4, 4).t()}
    torch.save(stored, tmp_path / "weights.pt")
    source = stacked(Checkpoint.open(tmp_path), {"both": ["view", "plain"]})
    assert source.tensors["both"].spans == ()
    assert_holds(source, {"both": torch.stack([stored["view"], stored["plain"]])})


def test_a_stack_comes_where_its_last_member_is_stored_and_the_source_is_read_once(tmp_path, monkeypatch):
    save_file({name: torch.randn(2, 2) for name in "abcdef"}, tmp_path / "model.safetensors")
    source = stacked(Checkpoint.open(tmp_path), {"ce": ["e", "c"], "bd": ["b", "d"]})
    assert list(source.tensors) == ["a", "bd", "ce", "f"]
    passes, plain = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, names: passes.append(sorted(names)) or plain(self, names))
    assert [name for name, _ in source.read(["f", "ce", "bd", "ce"])] == ["bd", "ce", "f"]
    assert passes == [["b", "c", "d", "e", "f"]]


def test_a_tensor_without_a_new_name_is_left_out(checkpoint, tensors):
    source = Renamed(checkpoint, {"embed": None, "head": "embed"})
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("embed", "head")}
    assert_holds(source, {**kept, "embed": tensors["head"]})


def moved(rows, convert, names=("made",), **options):
    """A Conversion of the experts' up projections."""
    return Conversion(tuple(STACK[:rows]), tuple(names), convert, **options)


@pytest.mark.parametrize("checkpoint", ["safetensors"], indirect=True)
@pytest.mark.parametrize(
    "conversion, spans",
    [
        pytest.param(moved(4, lambda t: [torch.cat(t)], moves_rows=True), [4], id="concatenated"),
        pytest.param(
            moved(4, lambda t: [torch.cat([torch.stack(t[:2]), torch.stack(t[2:])], dim=1)], moves_rows=True),
            [4],
            id="stacked and concatenated",
        ),
        pytest.param(
            moved(1, lambda t: list(t[0].split([7, 13, 10])), names="abc", moves_rows=True), [1, 1, 1], id="split"
        ),
        pytest.param(moved(2, lambda t: [torch.cat(t, dim=1)], moves_rows=True), [0], id="concatenated along rows"),
        pytest.param(moved(1, lambda t: [t[0].mT], moves_rows=True), [0], id="transposed"),
        pytest.param(moved(1, lambda t: [t[0].view(15, 2, K).mT], moves_rows=True), [0], id="cut across rows"),
        pytest.param(
            moved(1, lambda t: [t[0].view(15, 2, K).transpose(0, 1).reshape(N, K)], moves_rows=True),
            [0],
            id="in more pieces than members",
        ),
        pytest.param(moved(2, lambda t: [t[0] + t[1]]), [0], id="computed"),
    ],
)
def test_what_is_made_of_others_is_read_where_they_lie_if_its_rows_are_theirs(checkpoint, tensors, conversion, spans):
    source = Converted(checkpoint, [conversion])
    assert [len(source.tensors[name].spans) for name in conversion.names] == spans
    made = conversion.convert([tensors[member] for member in conversion.members])
    kept = {name: tensor for name, tensor in tensors.items() if name not in conversion.members}
    assert_holds(source, {**kept, **dict(zip(conversion.names, made, strict=True))})


def test_what_a_kind_does_to_rows_is_asked_once_for_members_of_the_same_shapes(tmp_path):
    shapes = {"1.a": 4, "1.b": 2, "2.a": 2, "2.b": 4, "3.a": 2, "3.b": 2}
    stored = {name: torch.randn(rows, 3) for name, rows in shapes.items()}
    save_file(stored, tmp_path / "model.safetensors")
    members = {"1": ("1.a", "1.b"), "2": ("2.b", "2.a"), "3": ("3.a", "3.b")}  # those of 1 and 2 have the same shapes

    def source_of(convert):
        asked = []
        conversions = [
            Conversion(own, (name,), lambda held: asked.append(len(held[0])) or [convert(held)], True, "of one kind")
            for name, own in members.items()
        ]
        source = Converted(Checkpoint.open(tmp_path), conversions)
        assert asked == [4, 2]
        assert_holds(source, {name: convert([stored[member] for member in own]) for name, own in members.items()})
        return source

    joined = source_of(torch.cat)
    assert [len(joined.tensors[name].spans) for name in members] == [1, 2, 1], "those of 2 are stored in another order"
    turned = source_of(lambda held: torch.cat([held[0][1:], held[1], held[0][:1]]))
    assert [len(turned.tensors[name].spans) for name in members] == [0, 0, 0], "three pieces of two members"


def test_a_stack_may_have_the_name_of_a_member(tmp_path):
    stored = {name: torch.randn(2, 2) for name in "ab"}
    save_file(stored, tmp_path / "model.safetensors")
    assert_holds(stacked(Checkpoint.open(tmp_path), {"a": ["a", "b"]}), {"a": torch.stack(list(stored.values()))})


def test_a_model_in_memory_is_adapted_too():
    model = nn.Sequential(*(nn.Linear(3, 4) for _ in range(3)))
    stacks = {"w": [f"{i}.weight" for i in range(3)], "b": [f"{i}.bias" for i in range(3)]}
    source = Renamed(stacked(ModelTensors(model), stacks), {"b": "bias"})
    assert source.in_place
    expected = {
        "w": torch.stack([layer.weight for layer in model]),
        "bias": torch.stack([layer.bias for layer in model]),
    }
    assert_holds(source, {name: tensor.detach() for name, tensor in expected.items()})
    for adapter in (Renamed(ModelTensors(model.to("meta")), {}), stacked(ModelTensors(model.to("meta")), {})):
        with pytest.raises(CheckpointError, match="6 tensors of Sequential are on meta"):
            adapter.check()


@pytest.mark.parametrize("checkpoint", ["safetensors"], indirect=True)
@pytest.mark.parametrize(
    "adapt, message",
    [
        pytest.param(lambda c: Renamed(c, {"gone": "x"}), "does not hold 'gone'", id="a name that is not there"),
        pytest.param(lambda c: Renamed(c, {"embed": "head"}), "one name: 'head' for", id="a name that is taken"),
        pytest.param(
            lambda c: Renamed(c, {"embed": "x", "head": "x"}), "'x' for '(embed|head)' and", id="one name for two"
        ),
        pytest.param(
            lambda c: stacked(c, {"x": ["gone"]}), "make 'x' of does not hold 'gone'", id="a member not there"
        ),
        pytest.param(lambda c: stacked(c, {"x": []}), "'x' would be made of no tensors", id="no members"),
        pytest.param(
            lambda c: stacked(c, {"x": ["experts.0.up", "embed"]}),
            r"cannot make 'x': .*'experts.0.up' is torch.float32 \[30, 41\] in .*'embed' is torch.float32 \[20, 41\]",
            id="another shape",
        ),
        pytest.param(
            lambda c: stacked(c, {"x": ["embed"], "y": ["embed"]}), "make 'y', a tensor is taken twice", id="two"
        ),
        pytest.param(lambda c: stacked(c, {"x": ["embed", "embed"]}), "make 'x', a tensor is taken twice", id="one"),
        pytest.param(lambda c: stacked(c, {"head": ["embed"]}), "names that are taken: head", id="a new name is taken"),
        pytest.param(lambda c: Renamed(c, {"embed": "x"}).read(["embed"]), "does not hold 'embed'", id="an old name"),
        pytest.param(lambda c: stacked(c, {"x": STACK}).read(STACK[:1]), "not hold 'experts.0.up'", id="a member"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(checkpoint, adapt, message):
    with pytest.raises(CheckpointError, match=message):
        adapt(checkpoint)
