"""compare: what quantizing has changed in a model, measured beside the model that it was made from."""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigq.config import QuantizationConfig
from bigq.errors import ConfigError
from bigq.evaluation.comparison import Comparison, Side
from bigq.evaluation.logits import compare_logits
from bigq.evaluation.open_models import (
    check_quantized_model,
    files_nbytes,
    open_quantized_model,
    source_tensors,
    tokenizer_of,
)
from bigq.evaluation.outputs import Outputs, is_causal, outputs_of, refusal_of, vocabulary_of
from bigq.evaluation.perplexity import compare_losses, split_windows
from bigq.evaluation.speed import Speed, measure_speed
from bigq.evaluation.weight_error import weight_errors
from bigq.footprint import memory_footprint
from bigq.formats import dtype_name
from bigq.integrations.float_model import open_float_model
from bigq.interop.bitsandbytes_configs import as_config
from bigq.measuring.environment import Environment

__all__ = ["compare"]

_COMPARED_TOKENS = 512  # whose logits are kept: 262 MB for each model with a vocabulary of 128,000
_LENGTHS = {"cuda": (512, 32), "cpu": (64, 8)}  # tokens of a prompt, and written in each measurement

Name = str | os.PathLike[str]


def compare(
    source: Name,
    quantized: Name | None = None,
    quantization_config: QuantizationConfig | object | None = None,
    *,
    text: str | None = None,
    tokens: int = 4096,
    context: int = 512,
    batches: Sequence[int] = (1, 8),
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], object] | None = None,
) -> Comparison:
    """Measure a quantized model beside its source: bytes, weights, outputs, perplexity, speed and peak memory.

    The source is loaded first, measured and dropped, then the quantized model; so memory holds one of them at a time.
    Weights are compared with the source's files, tensor by tensor. The outputs of a model that is not called with token
    ids alone, such as one of diffusers, are not compared; `Comparison.notes` says what is left out and why.

    Args:
        source: the float model, a folder with a config.json or a Hub repo id.
        quantized: the same model as bigq or bitsandbytes has quantized it. None: the source is quantized as the config
            says while it is loaded.
        quantization_config: as in `load_and_quantize_model`, if `quantized` is None.
        text: of which perplexity is measured. None: no perplexity, and random token ids for the outputs.
        tokens: of the text, at most. The outputs of the first 512 are compared.
        context: tokens that the models see at once, at most.
        batches: sequences at once, for the speed. Empty: no speed is measured.
        prompt_tokens: of each sequence, for the speed. None: 512 on a GPU, 64 on a CPU.
        new_tokens: that each sequence writes in a measurement. None: 32 on a GPU, 8 on a CPU.
        dtype: of what is not quantized, in both models; not with `quantized`, which runs in the dtypes of its files.
            None: that of the files.
        device: that both models run on. None: the current GPU, or the CPU if there is none.
        device_map: as in `load_and_quantize_model`, for models that do not fit; overrides `device` for the weights.
        trust_remote_code: whether code that comes with the model may run.
        progress: takes a line before each step.

    Raises:
        ConfigError: the source is quantized already, or arguments contradict each other.
        CheckpointError: a folder, repo or file is missing or damaged, or the two are not the same model.
        UnsupportedError: a text is passed for a model that does not predict the next token, or that has no tokenizer.

    Example:
        >>> import tempfile
        >>> import bigq, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transformers.LlamaForCausalLM(config).save_pretrained(folder)
        ...     found = bigq.compare(folder, None, bigq.QuantizationConfig("int8"), batches=[], device="cpu")
        >>> found.logits.tokens, found.logits.kl < 0.01, found.weight_error < 0.02
        (512, True, True)
    """
    said: Callable[[str], object] = progress or (lambda line: None)
    runs_on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = _config(quantized, quantization_config, dtype)
    for name, value, least in (("tokens", tokens, 2), ("context", context, 2)):
        if value < least:
            raise ConfigError(f"{name} is {value!r}; expected {least} or more")
    if any(batch < 1 for batch in batches):
        raise ConfigError(f"batches is {list(batches)!r}; expected numbers of sequences, 1 or more each")
    settings: dict[str, Any] = {"device_map": device_map, "trust_remote_code": trust_remote_code}
    notes: list[str] = []

    said(f"opening {source}")
    opened = source_tensors(source, trust_remote_code=trust_remote_code)
    check_quantized_model(source, quantized, config, runs_on, trust_remote_code=trust_remote_code)
    model = open_float_model(source, runs_on, dtype=dtype, **settings)
    windows = _windows(model, runs_on, source, text, tokens, context, trust_remote_code, notes)
    lengths = _lengths(model, runs_on, prompt_tokens, new_tokens)

    def measured(model: nn.Module, which: str) -> tuple[Outputs | None, tuple[Speed, ...]]:
        if not windows:
            return None, ()
        said(f"the {which}: {sum(map(len, windows))} tokens in {len(windows)} windows")
        outputs = outputs_of(model, windows, runs_on, _COMPARED_TOKENS)
        if batches:
            said(f"the {which}: speed of {', '.join(map(str, batches))} sequences")
        return outputs, measure_speed(model, batches, runs_on, prompt_tokens=lengths[0], new_tokens=lengths[1])

    before, speeds = measured(model, "source")
    source_side = _side(model, str(source), files_nbytes(source), speeds)
    del model
    _free()
    said("quantizing the source" if quantized is None else f"opening {quantized}")
    model = open_quantized_model(source, quantized, config, runs_on, **settings)
    after, speeds = measured(model, "quantized model")
    name, nbytes = _quantized_name(source, quantized, config)
    quantized_side = _side(model, name, nbytes, speeds)
    said("comparing weights")
    groups = weight_errors(opened, model)
    if batches and windows and runs_on.type != "cuda":
        notes.append("Peak memory is left out: torch does not count the memory of a CPU.")
    has_losses = text is not None and before is not None and bool(before.losses)
    return Comparison(
        source=source_side,
        quantized=quantized_side,
        groups=groups,
        logits=None
        if before is None or after is None
        else compare_logits(before.values, after.values, are_logits=before.are_logits),
        perplexity=compare_losses(before.losses, after.losses) if has_losses and before and after else None,
        notes=tuple(notes),
        environment=Environment.of(runs_on),
    )


def _config(quantized: Name | None, config: object | None, dtype: torch.dtype | None) -> QuantizationConfig | None:
    """How to quantize the source, or None if the quantized model is in files."""
    if (quantized is None) == (config is None):
        raise ConfigError("pass either a quantized checkpoint or a config that says how to quantize the source")
    if config is None:
        if dtype is not None:
            raise ConfigError(f"dtype={dtype} with a quantized checkpoint, which has dtypes of its own: leave it out")
        return None
    asked = as_config(config)
    if dtype is None or asked.dtype == dtype:
        return asked
    return replace(asked, dtype=dtype)


def _windows(
    model: nn.Module,
    device: torch.device,
    source: Name,
    text: str | None,
    tokens: int,
    context: int,
    trust_remote_code: bool,
    notes: list[str],
) -> list[Tensor]:
    """The token ids that both models are called with; adds to `notes` what cannot be measured."""
    kind, why, vocabulary = type(model).__name__, refusal_of(model, device), vocabulary_of(model)
    if why is not None or vocabulary is None:
        if text is not None:
            raise ConfigError(f"{kind} is not called with token ids alone ({why}): leave the text out")
        notes.append(f"Outputs and speed are left out: {kind} is not called with token ids alone: {why}.")
        return []
    length = min(context, _positions(model) or context)
    if text is None:
        why = "there is no text" if is_causal(model) else f"{kind} does not predict the next token"
        notes.append(f"Perplexity is left out: {why}. Outputs are those of random token ids.")
        generator = torch.Generator().manual_seed(0)
        count = min(tokens, _COMPARED_TOKENS)
        return split_windows(torch.randint(vocabulary, (count,), generator=generator).tolist(), length)
    if not is_causal(model):
        raise ConfigError(f"{kind} does not predict the next token, so a text has no perplexity: leave the text out")
    tokenizer = tokenizer_of(source, trust_remote_code=trust_remote_code)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = tokenizer.bos_token_id
    starts = begin is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [begin]
    if max(ids, default=0) >= vocabulary:
        raise ConfigError(
            f"the tokenizer of {source} gives id {max(ids)}, and {kind} knows {vocabulary}: it is another's"
        )
    return split_windows(ids[:tokens], length, begin if starts else None)


def _lengths(
    model: nn.Module, device: torch.device, prompt_tokens: int | None, new_tokens: int | None
) -> tuple[int, int]:
    """Tokens of a prompt, and written in a measurement; all four of these have to fit into the model's context."""
    default = _LENGTHS.get(device.type, _LENGTHS["cpu"])
    prompt, new = prompt_tokens or default[0], new_tokens or default[1]
    positions = _positions(model)
    if positions is not None and prompt + 4 * new > positions:
        if prompt_tokens is not None or new_tokens is not None:
            raise ConfigError(
                f"a prompt of {prompt} tokens and 4 times {new} more exceed the {positions} positions of "
                f"{type(model).__name__}: pass fewer"
            )
        new = max(1, min(new, positions // 16))
        prompt = max(1, positions - 4 * new)
    return prompt, new


def _positions(model: nn.Module) -> int | None:
    """The most tokens that a model sees at once, as its config says."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _quantized_name(source: Name, quantized: Name | None, config: QuantizationConfig | None) -> tuple[str, int | None]:
    if quantized is not None:
        return str(quantized), files_nbytes(quantized)
    assert config is not None
    formats = ", ".join(weight_format.name for weight_format in config.formats())
    return f"{Path(str(source)).name} as {formats}", None


def _side(model: nn.Module, name: str, nbytes: int | None, speeds: tuple[Speed, ...]) -> Side:
    kept = {dtype_name(tensor.dtype): None for tensor in model.parameters() if tensor.is_floating_point()}
    return Side(
        name=name,
        dtypes=tuple(kept),
        files_nbytes=nbytes,
        memory_nbytes=memory_footprint(model).total_nbytes,
        speeds=speeds,
    )


def _free() -> None:
    """Give back the memory of a model that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
