"""fill: however the weights are read, the same bits arrive."""

import gc
import json
import time
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bigq import ConfigError, QuantizationConfig, load_and_quantize_model
from bigq.formats import Block4, Rows


class TestReading:
    """However the weights are read, the same bits arrive."""

    @pytest.fixture
    def wide(self, tiny, tmp_path):
        """Weights of more than a megabyte, so that the smallest budget cuts them into pieces."""

        def build():
            return tiny(width=320, blocks=2, vocabulary=2000)

        save_file(build().state_dict(), tmp_path / "wide.safetensors")
        return build, tmp_path / "wide.safetensors"

    def assert_same(self, model, other):
        assert model.state_dict().keys() == other.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name

    def test_any_budget(self, wide, empty, config):
        build, path = wide
        config = replace(config, dtype=torch.bfloat16)  # kept tensors are cast, so they come in pieces too
        model = load_and_quantize_model(empty(build), path, config)
        for threads in (1, 5):
            small = load_and_quantize_model(empty(build), path, config, read_threads=threads, read_budget=1 << 20)
            self.assert_same(model, small)
        tensors = list(small.state_dict().values())
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors), "each owns its storage"

    def test_a_pickle(self, wide, empty, config):
        build, path = wide
        torch.save(load_file(path), path.with_suffix(".bin"))
        model = load_and_quantize_model(empty(build), path, config)
        self.assert_same(model, load_and_quantize_model(empty(build), path.with_suffix(".bin"), config))

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    def test_shards(self, tiny, checkpoint, empty, tmp_path, kind):
        folder = tmp_path / "shards"
        folder.mkdir()
        state, weight_map = load_file(checkpoint / "model.safetensors"), {}
        stem = "model" if kind == "safetensors" else "pytorch_model"
        for number, names in enumerate((list(state)[::2], list(state)[1::2])):
            file, shard = f"{stem}-0000{number + 1}-of-00002.{kind}", {name: state[name] for name in names}
            save_file(shard, folder / file) if kind == "safetensors" else torch.save(shard, folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = folder / f"{stem}.{kind}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"))
        for location in (folder, index):
            again = load_and_quantize_model(empty(tiny), location, QuantizationConfig("nf4"))
            self.assert_same(model, again)

    def test_in_place(self, wide, empty, config):
        build, path = wide
        plain = build()
        plain.load_state_dict(load_file(path))
        model = load_and_quantize_model(empty(build), path, config)
        self.assert_same(model, load_and_quantize_model(plain, None, config))

    def test_the_collector_is_as_it_was(self, tiny, checkpoint, empty):
        for enabled in (True, False):
            (gc.enable if enabled else gc.disable)()
            try:
                load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"))
                assert gc.isenabled() is enabled
                with pytest.raises(ConfigError):
                    load_and_quantize_model(empty(tiny), checkpoint)
                assert gc.isenabled() is enabled
            finally:
                gc.enable()

    def test_each_weight_is_let_go_before_the_next_is_quantized(self, tiny, empty, tmp_path, monkeypatch):
        save_file(tiny(width=256, blocks=2).state_dict(), tmp_path / "model.safetensors")
        alive, most, quantize_rows = [], [], Block4.quantize_rows

        def counting(self, rows, **how):
            most.append(sum(reference() is not None for reference in alive))
            alive.append(weakref.ref(rows))
            return quantize_rows(self, rows, **how)

        monkeypatch.setattr(Block4, "quantize_rows", counting)
        model = empty(tiny, width=256, blocks=2)
        load_and_quantize_model(model, tmp_path, QuantizationConfig("nf4"), "cpu", read_budget=1 << 20)
        assert len(most) == 2 * (3 + 4)  # 768 KiB each, in pieces of whole rows of at most a quarter of the budget
        assert max(most) == 0

    def test_work_per_tensor_does_not_grow_with_their_number(self, empty, tmp_path, monkeypatch):
        """accelerate takes 47 s for 16,000 tensors in a map of as many. All but the arithmetic is timed here."""

        class Experts(nn.Module):
            def __init__(self, count):
                super().__init__()
                self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(count))
                self.head = nn.Linear(8, 8)

            def forward(self, x):
                return self.head(self.experts[0](x))

        def quantize_rows(self, rows, **how):
            return Rows({"packed": torch.zeros(len(rows), 4), "absmax": torch.ones(len(rows), 1)}, torch.ones(()))

        seconds = {}
        monkeypatch.setattr(Block4, "quantize_rows", quantize_rows)
        for count in (500, 4000):
            save_file(Experts(count).state_dict(), tmp_path / "model.safetensors")
            model = empty(Experts, count=count)
            device_map = {"head": "cpu", **{f"experts.{i}": "cpu" for i in range(count)}}
            start = time.process_time()
            load_and_quantize_model(model, tmp_path, QuantizationConfig("nf4"), device_map)
            seconds[count] = (time.process_time() - start) / count
        assert seconds[4000] < 2 * seconds[500]

    @pytest.mark.gpu
    @pytest.mark.parametrize("spread", [False, True], ids=["resident", "half on the cpu"])
    def test_memory_on_the_way(self, wide, empty, config, spread):
        build, path = wide
        load_and_quantize_model(empty(build), path, config)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = load_and_quantize_model(
            empty(build),
            path,
            config,
            {"": 0, "blocks.0": "cpu"} if spread else {"": 0},
            offload="quantized",
            read_budget=1 << 20,
        )
        result = sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.is_cuda)
        assert torch.cuda.max_memory_allocated() - before <= 1.1 * result + (2 << 20)

    @pytest.mark.gpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_two_gpus(self, wide, empty, config):
        build, path = wide
        one = load_and_quantize_model(empty(build), path, config, {"": 0})
        two = load_and_quantize_model(
            empty(build), path, config, {"": 0, "blocks.1": 1, "head": 1}, read_budget=1 << 20
        )
        assert {str(tensor.device) for tensor in two.state_dict().values()} == {"cuda:0", "cuda:1"}
        for name, tensor in one.state_dict().items():
            assert torch.equal(two.state_dict()[name].cpu(), tensor.cpu()), name
