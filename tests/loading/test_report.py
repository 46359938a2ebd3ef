"""model.quantization_report: what a load did, in numbers that add up."""

import copy
import pickle

import torch
from accelerate import Accelerator

from bigq import QuantizationConfig, load_and_quantize_model, memory_footprint
from bigq.checkpoint import Checkpoint


def test_every_module_with_its_rule_format_place_and_bytes(tiny, checkpoint, empty, tmp_path):
    model = load_and_quantize_model(
        empty(tiny),
        checkpoint,
        QuantizationConfig("int8", skip_modules=["blocks.1.up"]),
        {"": "cpu", "blocks.0.down": "disk"},
        offload_folder=tmp_path / "offload",
    )
    modules = {module.name: module for module in model.quantization_report.modules}
    assert modules.keys() == {name for name, module in model.named_modules() if module._parameters or module._buffers}
    quantized = {name for name, module in modules.items() if module.rule == "quantized"}
    assert quantized == {f"blocks.{i}.{leaf}" for i in range(3) for leaf in ("up", "down")} - {"blocks.1.up"}
    assert modules["blocks.0.up"].format == "int8"
    assert modules["blocks.0.up"].nbytes == 72 * 216 + 4 * 216 + 256 + 4 * 216  # codes, scales, description, bias
    assert modules["blocks.0.down"].device == "disk"
    assert modules["blocks.1.up"].rule == "skip_modules 'blocks.1.up'"
    assert modules["head"].rule == "the output head"
    assert modules["embed"].rule == "no weight to quantize"
    assert modules[""].format == "float32 and int64"
    assert sum(module.nbytes for module in modules.values()) == memory_footprint(model).total_nbytes


def test_stages_in_order_and_every_byte(tiny, checkpoint, empty):
    model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), "cpu")
    stages = {stage.name: stage for stage in model.quantization_report.stages}
    assert stages.keys() == {"plan", "read", "wait", "quantize", "commit"}
    assert all(stage.seconds > 0 for stage in stages.values())
    nbytes = Checkpoint.open(checkpoint).nbytes
    assert stages["read"].nbytes == stages["quantize"].nbytes == nbytes


def test_in_place(tiny):
    report = load_and_quantize_model(tiny(), None, QuantizationConfig("nf4"), "cpu").quantization_report
    assert {stage.name for stage in report.stages} == {"plan", "quantize", "commit"}
    assert sum(module.rule == "quantized" for module in report.modules) == 6


def test_a_checkpoint_that_is_quantized_already(tiny, checkpoint, empty, tmp_path):
    first = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), "cpu")
    Accelerator().save_model(first, tmp_path / "saved")
    again = load_and_quantize_model(empty(tiny), tmp_path / "saved", device_map="cpu").quantization_report
    before = {m.name: m for m in first.quantization_report.modules}
    after = {m.name: m for m in again.modules}
    assert before.keys() == after.keys()
    for name in before:
        assert (before[name].format, before[name].nbytes) == (after[name].format, after[name].nbytes)


def test_the_table_counts_what_is_alike(tiny, checkpoint, empty):
    report = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), "cpu").quantization_report
    lines = report.table().splitlines()
    assert lines[0].split() == ["stage", "seconds", "GB"]
    assert lines[1].split()[0] == "plan"
    (row,) = [line.split() for line in lines if line.startswith("quantized")]
    megabytes = sum(module.nbytes for module in report.modules if module.rule == "quantized") / 1e6
    assert row == ["quantized", "nf4", "cpu", "6", f"{megabytes:.3f}"]


def test_it_travels_with_the_model_and_not_in_its_state(tiny, checkpoint, empty, tmp_path):
    model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), "cpu")
    assert copy.deepcopy(model).quantization_report == model.quantization_report
    assert pickle.loads(pickle.dumps(model.quantization_report)) == model.quantization_report
    assert not any("report" in name for name in model.state_dict())
    Accelerator().save_model(model, tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "state.pt")
