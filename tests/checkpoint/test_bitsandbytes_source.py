"""Checkpoints that bitsandbytes has quantized load with the same bits, and what does not fit together is refused.

Files are written here tensor by tensor; tests/integrations/test_bitsandbytes_files.py has those of bitsandbytes itself.
"""

import json

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from bigq import FP4, NF4, CheckpointError, ConfigError, Int8, QuantizationConfig, QuantizedLinear
from bigq import load_and_quantize_model as load_model
from bigq.checkpoint import Checkpoint, with_bitsandbytes
from bigq.formats import Description
from bigq.formats.bitsandbytes import bitsandbytes_tensors
from bigq.offload.space import mapping_of

FORMATS = {
    "nf4": NF4(),
    "fp4": FP4(block_size=32),
    "nf4-double": NF4(double_quant=True),
    "fp4-double": FP4(double_quant=True),
    "int8": Int8(),
}
STORAGES = [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32]
LINEARS = ("up", "down")
JSON = "up.weight.quant_state.bitsandbytes__nf4"
NESTED_JSON = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


class Net(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.up, self.down = nn.Linear(width, 320), nn.Linear(320, width, bias=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.norm(self.down(self.up(x).relu())))


def floats(width=128):
    torch.manual_seed(0)
    return {name: tensor.bfloat16() for name, tensor in Net(width).state_dict().items()}


def theirs(weight_format, *, storage=torch.uint8, tensors=None):
    """The tensors of a Net as bitsandbytes stores them."""
    tensors = dict(tensors or floats())
    for linear in LINEARS:
        weight = tensors.pop(f"{linear}.weight")
        described = Description(format=weight_format, shape=tuple(weight.shape), dtype=weight.dtype)
        tensors |= bitsandbytes_tensors(f"{linear}.weight", described, weight_format.quantize(weight))
        if storage != torch.uint8:
            tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"].view(-1).view(storage).view(-1, 1)
    return tensors


def empty(kind=Net, **settings):
    with init_empty_weights():
        return kind(**settings).eval()


def load(path, config=None, device_map="cpu", model=None, **settings):
    return load_model(model or empty(), path, config, device_map, progress=False, **settings)


def ours(tmp_path, weight_format):
    """A Net that is quantized here from the same weights."""
    save_file(floats(), tmp_path / "floats.safetensors")
    return load(tmp_path / "floats.safetensors", QuantizationConfig(weight_format))


def assert_same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def write(folder, tensors, said=None):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    if said is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_it_has_the_bits_of_weights_quantized_here(tmp_path, name):
    model = load(write(tmp_path / "theirs", theirs(FORMATS[name])))
    assert isinstance(model.up, QuantizedLinear)
    assert model.down.weight.dtype == torch.bfloat16
    assert type(model.head) is nn.Linear
    assert_same(model, ours(tmp_path, FORMATS[name]))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_codes_may_be_stored_as_another_dtype(tmp_path, storage):
    model = load(write(tmp_path / "theirs", theirs(NF4(double_quant=True), storage=storage)))
    assert_same(model, ours(tmp_path, NF4(double_quant=True)))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_it_may_be_a_pickle(tmp_path, name, is_zip):
    tensors = theirs(FORMATS[name], storage=torch.uint8 if name == "int8" else torch.bfloat16)
    torch.save(tensors, tmp_path / "model.bin", _use_new_zipfile_serialization=is_zip)
    assert_same(load(tmp_path / "model.bin"), ours(tmp_path, FORMATS[name]))


def test_the_tensors_of_a_weight_may_lie_in_several_files(tmp_path):
    tensors = theirs(NF4(double_quant=True))
    (tmp_path / "theirs").mkdir()
    for shard in range(3):
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % 3 == shard}
        save_file(part, tmp_path / "theirs" / f"model-0000{shard + 1}-of-00003.safetensors")
    assert_same(load(tmp_path / "theirs"), ours(tmp_path, NF4(double_quant=True)))


@pytest.mark.parametrize("name", FORMATS)
def test_offloaded_weights_stay_packed_in_the_file(tmp_path, name):
    places = {"": "cpu", "up": "disk"}
    file = write(tmp_path / "theirs", theirs(FORMATS[name])) / "model.safetensors"
    model = load(file.parent, FORMATS[name], device_map=places)
    place = mapping_of(model.up.weight_packed)
    assert place is not None
    mapping, offset = place
    packed = bytes(model.up.weight_packed.flatten().view(torch.uint8).tolist())
    assert len(mapping) == file.stat().st_size
    assert file.read_bytes()[offset : offset + len(packed)] == packed
    expected = ours(tmp_path, FORMATS[name])
    assert_same(model, expected)
    x = torch.randn(2, 128).bfloat16()
    assert torch.equal(model(x), expected(x))


def test_bytes_are_read_from_where_they_lie(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path / "theirs", theirs(NF4(double_quant=True), storage=torch.float16)))
    source = with_bitsandbytes(checkpoint, tmp_path)
    for new, old in {
        "up.weight_packed": "up.weight",
        "up.weight_absmax": "up.weight.absmax",
        "down.weight_nested_absmax": "down.weight.nested_absmax",
        "norm.weight": "norm.weight",
    }.items():
        assert source.tensors[new].spans == checkpoint.tensors[old].spans, new
    at_once = {name: tensor.clone() for name, tensor in source.read(list(source.tensors))}
    assert list(at_once) == list(source.tensors)
    for name, stored in source.tensors.items():
        assert (at_once[name].dtype, at_once[name].shape) == (stored.dtype, stored.shape), name


def test_other_checkpoints_are_left_alone(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path / "plain", floats()))
    assert with_bitsandbytes(checkpoint, tmp_path) is checkpoint


def test_an_even_number_of_scales_may_be_stored(tmp_path):
    torch.manual_seed(0)
    tensors = {"0.weight": torch.randn(3, 64)}
    described = Description(format=NF4(), shape=(3, 64), dtype=torch.float32)
    state = NF4().quantize(tensors["0.weight"])
    tensors = bitsandbytes_tensors("0.weight", described, state)
    tensors["0.weight.absmax"] = torch.cat([tensors["0.weight.absmax"], torch.zeros(1)])
    model = load(write(tmp_path / "theirs", tensors), model=nn.Sequential(nn.Linear(64, 3, bias=False, device="meta")))
    assert torch.equal(model[0].weight_absmax, state["absmax"])


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 64))


def test_a_parameter_of_any_name_and_rank(tmp_path):
    weight = torch.randn(3, 4, 64)
    described = Description(format=NF4(), shape=(3, 4, 64), dtype=torch.float32)
    tensors = bitsandbytes_tensors("experts", described, NF4().quantize(weight))
    model = load(write(tmp_path / "theirs", tensors), model=empty(Stacked))
    state = NF4().quantize(weight)
    assert torch.equal(model.experts_packed, state["packed"])
    assert torch.equal(model.experts.dequantize(), NF4().dequantize(state, (3, 4, 64), torch.float32))


class TestBlocksThatSpanTwoRows:
    def flat(self, dtype=torch.float32, rows=5, columns=80, weight_format=None):
        weight_format = weight_format or NF4(double_quant=True)
        weight = torch.randn(rows, columns).to(dtype)
        one = (1, rows * columns)  # blocks run on as in a single row
        state = weight_format.quantize(weight.view(one))
        described = Description(format=weight_format, shape=one, dtype=dtype)
        tensors = bitsandbytes_tensors("0.weight", described, state)
        (name,) = (name for name in tensors if "bitsandbytes__" in name)
        said = json.loads(bytes(tensors[name].tolist())) | {"shape": [rows, columns]}
        tensors[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        return tensors, weight_format.dequantize(state, one, dtype).view(rows, columns)

    @pytest.mark.parametrize("weight_format", [NF4(), FP4(double_quant=True)], ids=["nf4", "fp4-double"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_they_become_floats_of_the_same_numbers(self, tmp_path, dtype, weight_format):
        tensors, dense = self.flat(dtype, weight_format=weight_format)
        other = Description(format=NF4(), shape=(7, 64), dtype=dtype)
        tensors |= bitsandbytes_tensors("1.weight", other, NF4().quantize(torch.randn(7, 64)))
        model = nn.Sequential(nn.Linear(80, 5, bias=False, device="meta"), nn.Linear(64, 7, bias=False, device="meta"))
        with pytest.warns(UserWarning, match=r"1 weights of .* are dequantized.*: 0\.weight"):
            load(write(tmp_path / "theirs", tensors), model=model)
        assert type(model[0]) is nn.Linear
        assert model[0].weight.dtype == dtype
        assert torch.equal(model[0].weight, dense)
        assert isinstance(model[1], QuantizedLinear)

    def test_a_single_row_has_none(self, tmp_path):
        tensors, dense = self.flat(rows=1)
        model = load(write(tmp_path / "theirs", tensors), model=nn.Sequential(nn.Linear(80, 1, False, device="meta")))
        assert isinstance(model[0], QuantizedLinear)
        assert torch.equal(model[0].weight.dequantize(), dense)


@pytest.mark.parametrize(
    "said, expected",
    [
        (None, None),
        ({}, None),
        ({"bnb_4bit_compute_dtype": "float32"}, torch.float32),
        ({"bnb_4bit_compute_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "float16"}, torch.float16),
        ({"quant_method": "awq", "bnb_4bit_compute_dtype": "float32"}, None),
    ],
    ids=["no config", "nothing", "float32", "torch.bfloat16", "with its name", "of another library"],
)
def test_the_compute_dtype_is_that_of_the_config(tmp_path, said, expected):
    folder = write(tmp_path / "theirs", theirs(NF4()), said)
    assert load(folder).up.compute_dtype == expected
    assert load(folder, QuantizationConfig("nf4", compute_dtype="fp16")).up.compute_dtype == torch.float16


@pytest.mark.parametrize("said, expected", [(None, 6.0), ({"llm_int8_threshold": 4}, 4.0)], ids=["no config", "4"])
def test_the_threshold_is_that_of_the_config(tmp_path, said, expected):
    folder = write(tmp_path / "theirs", theirs(Int8()), said)
    model = load(folder)
    assert model.up.descriptions["weight"].format == Int8(threshold=expected)
    assert model.up.compute_dtype is None
    assert load(folder, Int8(threshold=2.5)).up.descriptions["weight"].format == Int8(threshold=2.5)


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("bnb_4bit_compute_dtype", "int8", "one of"),
        ("bnb_4bit_compute_dtype", 32, "one of"),
        ("llm_int8_threshold", -1, "a number >= 0"),
        ("llm_int8_threshold", "6", "a number >= 0"),
        ("llm_int8_threshold", float("nan"), "a number >= 0"),
    ],
)
def test_a_config_that_says_nonsense(tmp_path, field, value, expected):
    folder = write(tmp_path / "theirs", theirs(NF4()), {field: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} is .*; expected {expected}"):
        load(folder)


def test_a_config_that_contradicts_the_file(tmp_path):
    folder = write(tmp_path / "theirs", theirs(NF4()))
    with pytest.raises(ConfigError, match="drop the config"):
        load(folder, QuantizationConfig("fp4"))
    with pytest.raises(ConfigError, match="which the checkpoint holds quantized"):
        load(folder, QuantizationConfig("nf4", skip_modules=["up"]))


class Shorter(Net):
    def __init__(self):
        super().__init__()
        del self.down

    def forward(self, x):
        return self.up(x)


def test_a_weight_of_no_module_is_unexpected(tmp_path):
    folder = write(tmp_path / "theirs", theirs(NF4()))
    with pytest.raises(CheckpointError, match=r"down\.weight is quantized in the checkpoint, but the model has no"):
        load(folder, model=empty(Shorter))
    assert isinstance(load(folder, model=empty(Shorter), strict=False).up, QuantizedLinear)
    with pytest.raises(CheckpointError, match="Linear has none of the weights that the checkpoint holds quantized"):
        load(folder, model=nn.Linear(2, 2), strict=False)


def said(**fields):
    """A description in which `fields` are other ones; those that are None are left out."""
    whole = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [320, 128], **fields}
    return text(json.dumps({name: value for name, value in whole.items() if value is not None}))


def text(content):
    return torch.tensor(list(content.encode() if isinstance(content, str) else content), dtype=torch.uint8)


MAP = torch.tensor(range(16), dtype=torch.float32)


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        (JSON, text("{"), "Expecting property name"),
        (JSON, text(b"\xff"), "utf-8"),
        (JSON, text("[]"), r"it is \[\]; expected an object"),
        (JSON, text("[" * 4000), "nested too deeply"),
        (JSON, text('{"shape": [1], "shape": [2]}'), "gives 'shape' twice"),
        (JSON, torch.zeros(5000, dtype=torch.uint8), "expected uint8, at most 4096 bytes"),
        (JSON, torch.zeros(8), "expected uint8, at most 4096 bytes; found torch.float32"),
        (JSON, said(shape=None), "it has no 'shape'"),
        (JSON, said(scale=3), "it has 'scale', which bigq does not know"),
        (JSON, said(quant_type="fp4"), "quant_type is 'fp4'; expected 'nf4'"),
        (JSON, said(quant_type=["nf4"]), "quant_type is"),
        (JSON, said(blocksize=48), "block_size is 48"),
        (JSON, said(blocksize=64.0), "block_size is 64.0"),
        (JSON, said(blocksize=128), r"expected up\.weight\.absmax to be torch.float32 \[320\]"),
        (JSON, said(dtype="int8"), "dtype is 'int8'"),
        (JSON, said(dtype=16), "dtype is 16"),
        (JSON, said(shape=[]), r"shape is \[\]"),
        (JSON, said(shape=[320, -128]), "expected a list of sizes"),
        (JSON, said(shape=[320, 128.0]), "expected a list of sizes"),
        (JSON, said(shape=[True, 128]), "expected a list of sizes"),
        (JSON, said(shape=[2**62, 2**62]), "expected fewer elements"),
        (JSON, said(shape=[0, 2**62, 4]), "expected fewer elements"),
        (JSON, said(shape=[320, 64]), r"has 20480 bytes; a weight of shape \[320, 64\] has 10240"),
        (JSON, said(nested_offset=0.5), "it has no 'nested_blocksize'"),
        (JSON, said(**NESTED_JSON), r"holds no up\.weight\.nested_quant_map"),
        (JSON, said(**{**NESTED_JSON, "nested_blocksize": 64}), "nested_blocksize is 64; expected 256"),
        (JSON, said(**{**NESTED_JSON, "nested_dtype": "float16"}), "nested_dtype is 'float16'"),
        (JSON, said(**{**NESTED_JSON, "nested_offset": float("nan")}), "nested_offset is nan"),
        (JSON, said(**{**NESTED_JSON, "nested_offset": 1e39}), "nested_offset is 1e"),
        (JSON, said(**{**NESTED_JSON, "nested_offset": "0"}), "nested_offset is '0'"),
        ("up.weight.quant_map", MAP, "holds other values than those of bitsandbytes"),
        ("up.weight.quant_map", MAP[:8], r"expected up\.weight\.quant_map to be float32 \[16\]"),
        ("up.weight.quant_map", MAP.double(), r"expected up\.weight\.quant_map to be float32 \[16\]"),
        ("up.weight.quant_map", None, r"holds no up\.weight\.quant_map"),
        ("up.weight.absmax", None, r"holds no up\.weight\.absmax"),
        ("up.weight.absmax", torch.ones(640, dtype=torch.bfloat16), r"to be torch\.float32 \[640\], found torch\.bfl"),
        ("up.weight.absmax", torch.ones(642), r"to be torch\.float32 \[640\], found torch\.float32 \[642\]"),
        ("up.weight", None, r"holds no up\.weight"),
        ("up.weight", torch.zeros(20482, 1, dtype=torch.uint8), r"has 20482 bytes"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_does_not_fit_together_is_refused(tmp_path, name, tensor, words):
    tensors = theirs(NF4()) | {name: tensor}
    folder = write(tmp_path / "theirs", {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=f"(?s)bigq cannot read:.*up.weight.quant_state.*{words}"):
        load(folder)


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        ("up.weight", None, r"holds no up\.weight"),
        ("up.weight", torch.zeros(320, 128), r"expected up\.weight to be int8 \[N, K\], found torch.float32"),
        ("up.weight", torch.zeros(320, 2, 64, dtype=torch.int8), r"to be int8 \[N, K\]"),
        ("up.weight_format", torch.ones((), dtype=torch.uint8), r"expected up\.weight_format to be 0"),
        ("up.weight_format", torch.zeros(()), r"expected up\.weight_format to be 0"),
        ("up.SCB", torch.ones(128), r"expected float32 \[320\], found torch.float32 \[128\]"),
        ("up.SCB", torch.ones(320).half(), r"expected float32 \[320\], found torch.float16"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_int8_that_does_not_fit_together_is_refused(tmp_path, name, tensor, words):
    tensors = theirs(Int8()) | {name: tensor}
    folder = write(tmp_path / "theirs", {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=f"(?s)bigq cannot read:.*up.SCB in .*{words}"):
        load(folder)


def test_weight_format_may_be_absent(tmp_path):
    tensors = {name: tensor for name, tensor in theirs(Int8()).items() if not name.endswith("weight_format")}
    assert_same(load(write(tmp_path / "theirs", tensors)), ours(tmp_path, Int8()))


def test_one_error_lists_all_weights(tmp_path):
    tensors = theirs(NF4())
    del tensors["up.weight.absmax"], tensors["down.weight.absmax"]
    folder = write(tmp_path / "theirs", tensors)
    with pytest.raises(CheckpointError, match=r"(?s)no down\.weight\.absmax.*no up\.weight\.absmax"):
        load(folder)


def test_tensors_of_both_libraries_for_one_weight(tmp_path):
    tensors = theirs(NF4()) | {"up.weight_packed": torch.zeros(320, 64, dtype=torch.uint8)}
    folder = write(tmp_path / "theirs", tensors)
    with pytest.raises(CheckpointError, match=r"both bitsandbytes and bigq: up\.weight_packed"):
        load(folder)
