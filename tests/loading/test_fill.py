"""fill: however the weights are read, the same bits arrive."""

import gc
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigq import ConfigError, QuantizationConfig, load_and_quantize_model


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
