"""torch.compile and torch.export of whole transformers models whose linears are quantized."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bigq import QuantizationConfig, load_and_quantize_model

transformers = pytest.importorskip("transformers")

IDS = torch.arange(9)[None]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # inductor says so on a GPU, in float32
each_format = pytest.mark.parametrize("format_name", ["nf4", "int8"])
SLOW = [] if torch.cuda.is_available() else pytest.mark.slow  # inductor compiles C++ for the CPU


SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
}


def llama(format_name, **settings):
    """Traced, its bits stay the same on a GPU with attention in eager mode: sdpa has a mask only where it is traced."""
    config = transformers.LlamaConfig(**SIZES | settings)
    return load(transformers.LlamaForCausalLM, config, format_name)


def qwen_moe(format_name, **settings):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = transformers.Qwen3MoeConfig(**SIZES | experts | settings)
    return load(transformers.Qwen3MoeForCausalLM, config, format_name)


def load(kind, config, format_name):
    torch.manual_seed(0)
    model = kind(config).eval().requires_grad_(False)
    return load_and_quantize_model(model, None, QuantizationConfig(format_name), DEVICE)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Without what other tests have compiled, which counts towards the limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "format_name, backend",
    [
        ("nf4", "aot_eager"),
        pytest.param("int8", "aot_eager", marks=SLOW),
        pytest.param("nf4", "inductor", marks=SLOW),
        pytest.param("int8", "inductor", marks=SLOW),
    ],
)
def test_a_model_and_its_gradients_compile_once_for_all_batch_sizes(format_name, backend):
    """Gradients of the inputs are what an adapter below the quantized linears needs."""
    model = llama(format_name, attn_implementation="eager" if backend == "aot_eager" else "sdpa")
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def check(batch):
        x = torch.randn(batch, 7, 64, device=DEVICE)
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = [
            run(inputs_embeds=inputs, use_cache=False).logits for run, inputs in ((compiled, found), (model, expected))
        ]
        for output in outputs:
            output.square().sum().backward()
        if backend == "aot_eager":
            assert torch.equal(*outputs)
            assert torch.equal(found.grad, expected.grad)
        else:
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(found.grad, expected.grad)

    check(2)
    check(3)  # from here on the batch size is a variable of the graph
    assert counter.frame_count == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        check(5)
        check(9)
    assert sum("bigq.linear" in str(node.target) for node in counter.graphs[-1].graph.nodes) == 7


@pytest.mark.parametrize("build, format_name", [(llama, "nf4"), (llama, "int8"), (qwen_moe, "nf4")])
def test_generate_compiles_for_a_static_cache(build, format_name):
    model = build(format_name)
    ids = IDS.to(DEVICE)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    assert model.hf_quantizer.is_compileable
    graphs = []

    def backend(graph, inputs):  # a function, because `generate` copies its config, and with it any other object
        graphs.append(graph)
        return graph.forward

    config = transformers.CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # else the CPU is left out
    found = model.generate(ids, cache_implementation="static", compile_config=config, **settings)
    assert torch.equal(found, expected)
    assert len(graphs) == 1
    again = model.generate(ids + 1, cache_implementation="static", compile_config=config, **settings)
    assert torch.equal(again, model.generate(ids + 1, **settings))
    assert len(graphs) == 1


@pytest.mark.parametrize("build, format_name", [(llama, "nf4"), (qwen_moe, "int8")])
@pytest.mark.parametrize("is_early", [True, False], ids=["cache initialized before", "in the first call"])
def test_steps_of_generation_compile_once_if_their_cache_is_initialized_before(build, format_name, is_early):
    """More layers than torch compiles variants of a function: it does not matter that each has a cache of its own."""
    model = build(format_name, num_hidden_layers=9)

    def cache():
        made = transformers.StaticCache(config=model.config, max_cache_len=16)
        if is_early:
            made.early_initialization(1, 2, 16, torch.float32, DEVICE)
        return made

    def steps(call, cache):
        with torch.no_grad():
            outputs = [
                call(input_ids=ids[None, None], past_key_values=cache, use_cache=True).logits
                for ids in torch.arange(3, 7, device=DEVICE)
            ]
        return torch.cat(outputs, dim=1)

    counter = CompileCounterWithBackend("eager")  # what is traced, and how often, is the question
    compiled, own = torch.compile(model.forward, fullgraph=True, backend=counter), cache()
    expected, found = steps(model, cache()), steps(compiled, own)
    torch.testing.assert_close(found, expected)
    assert counter.frame_count == (1 if is_early else 2)
    own.reset()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(steps(compiled, own), found)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch 2.11 says so of the first of its tree
@pytest.mark.gpu
@each_format
def test_generate_compiles_on_a_gpu_without_being_asked(format_name):
    model = llama(format_name)
    ids = IDS.to(DEVICE)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)
    assert hasattr(model, "_compiled_call")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 says so of files that it loads
@each_format
def test_an_exported_model_is_saved_and_loaded(format_name, tmp_path):
    model = llama(format_name, attn_implementation="eager")
    ids = IDS.to(DEVICE)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            {"input_ids": ids.expand(2, -1), "use_cache": False},
            dynamic_shapes={"input_ids": {0: batch}, "use_cache": None},
        )
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
        assert sum("bigq.linear" in str(node.target) for node in loaded.graph.nodes) == 7
        for size in (2, 5):
            inputs = ids.repeat(size, 1) + torch.arange(size, device=DEVICE)[:, None]
            found = loaded.module()(input_ids=inputs, use_cache=False).logits
            assert torch.equal(found, model(inputs, use_cache=False).logits)
    packed = {name for name in loaded.state_dict if name.endswith("_packed")}
    assert len(packed) == 7
