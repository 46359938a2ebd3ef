"""`bigq quantize`: a checkpoint as a folder of quantized weights that transformers and bigq load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bigq.calibration.fit_result import Fit
from bigq.calibration.sensitivity import SENSITIVITIES
from bigq.cli.config_options import (
    AlsoOption,
    BlockSizeOption,
    DoubleQuantFlag,
    FormatOption,
    MethodOption,
    MomentsOption,
    RulesOption,
    SkipOption,
    make_config,
    one_of,
)
from bigq.cli.output import JsonFlag, answers, note, show
from bigq.converting.fit_source import fit_source
from bigq.converting.push import push_folder, refuse_without_token
from bigq.converting.quantize_checkpoint import QuantizedCheckpoint, quantize_checkpoint
from bigq.converting.staging import refuse_taken
from bigq.saving.layouts import LAYOUTS, OWN
from bigq.system.text import bytes_text

__all__ = ["EXAMPLES", "command"]

EXAMPLES = (
    "bigq quantize ./llama ./llama-nf4",
    "bigq quantize meta-llama/Llama-3.1-8B ./llama-int8 --format int8 --skip lm_head",
    "bigq quantize ./llama ./llama-5bit --bits 5.0",
    "bigq quantize ./llama ./llama-bnb --double-quant --layout bitsandbytes --push me/llama-4bit",
)

_FITTED = ("bits", "nbytes", "error", "sensitivity")


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What was written. `fitted` and `address` are None where no formats were fitted, and nothing was pushed."""

    made: QuantizedCheckpoint
    fitted: Fit | None
    address: str | None

    def to_dict(self) -> dict[str, object]:
        fitted = None if self.fitted is None else {name: getattr(self.fitted, name) for name in _FITTED}
        return {**self.made.to_dict(), "fit": fitted, "address": self.address}

    def render(self, out: Console) -> None:
        made = self.made
        share = made.nbytes / made.source_nbytes if made.source_nbytes else 1.0
        files = f"{len(made.files)} files" if len(made.files) > 1 else "one file"
        out.print(f"{made.folder}", markup=False)
        out.print(f"  {made.quantized} weights quantized, {made.kept} tensors kept")
        out.print(f"  {bytes_text(made.nbytes)} in {files}, {share:.0%} of {bytes_text(made.source_nbytes)}")
        out.print(f"  layout {made.layout}, {made.seconds:.1f} s")
        if self.fitted is not None:
            out.print(f"  {self.fitted.bits:.2f} bits a weight, {bytes_text(self.fitted.nbytes)} in memory")
        if self.address is not None:
            out.print(f"  {self.address}", markup=False)


@answers
def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub repo (owner/name) with float weights.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; new, or empty.")],
    weight_format: FormatOption = None,
    double_quant: DoubleQuantFlag = False,
    block_size: BlockSizeOption = None,
    rules: RulesOption = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="Choose a format for every weight, so that the whole model takes this much memory, such as 12GiB. "
            "The float model is loaded for that, and has to fit into memory.",
        ),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="The same, by the average bits of a weight, such as 5.0.", show_default=False)
    ] = None,
    sensitivity: Annotated[
        str,
        typer.Option(
            callback=one_of(*SENSITIVITIES),
            metavar="|".join(SENSITIVITIES),
            help="How --fit and --bits measure what a weight matters: output also takes models without logits.",
        ),
    ] = SENSITIVITIES[0],
    method: MethodOption = "absmax",
    moments: MomentsOption = None,
    skip: SkipOption = None,
    also: AlsoOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="dtype of what is kept, such as bf16. Default: that of the checkpoint.")
    ] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(help="dtype of products, such as bf16. Default: that of the activations.")
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            callback=one_of(*LAYOUTS),
            metavar="|".join(LAYOUTS),
            help="Whose tensors to write: bigq reads the first two; transformers reads the last two without bigq.",
        ),
    ] = OWN,
    device: Annotated[
        str | None, typer.Option(help="Where to quantize: cuda, cuda:1 or cpu. Default: the GPU if there is one.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of a file.")] = "5GB",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite/--resume",
            help="Begin anew and replace files in DST, or go on with what an interrupted run left there.",
        ),
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="Upload the folder to this Hub repo (owner/name).")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repo of --push private.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="Refuse tensors that the model does not have, or ignore them.")
    ] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Quantize a model into a folder with weights, config, tokenizer and model card.

    Weights are read, quantized and written piece by piece, so the model need not fit in memory. Works without a GPU.

    After an interruption, the same command goes on with the files that were not finished.
    """
    is_fitted = max_bytes is not None or bits is not None
    if is_fitted and layout != OWN:
        raise typer.BadParameter(f"--fit and --bits give weights several formats, which only the layout {OWN} holds")
    if not is_fitted and sensitivity != SENSITIVITIES[0]:
        raise typer.BadParameter("--sensitivity is for --fit and --bits, which measure it")
    if max_bytes is not None and bits is not None:
        raise typer.BadParameter("--fit and --bits are two budgets: give one of them")
    if push is not None:
        refuse_without_token()
    config = make_config(
        weight_format,
        rules=rules,
        double_quant=double_quant,
        block_size=block_size,
        skip=skip,
        also=also,
        dtype=dtype,
        compute_dtype=compute_dtype,
        method=method,
        moments=moments,
    )
    fitted = None
    if is_fitted:
        refuse_taken(destination, overwrite=overwrite)  # now, and not after minutes
        note("measuring the float model")
        fitted = fit_source(
            source,
            config,
            max_bytes=max_bytes,
            bits=bits,
            sensitivity=sensitivity,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        config = fitted.config
    try:
        made = quantize_checkpoint(
            source,
            destination,
            config,
            layout=layout,
            max_shard_size=max_shard_size,
            device=device,
            overwrite=overwrite,
            strict=strict,
            trust_remote_code=trust_remote_code,
        )
    except KeyboardInterrupt:
        note("run it again, without --overwrite, to go on with the files that are not finished")
        raise
    if made.resumed:
        note(f"{made.resumed} of {len(made.files)} files were finished by an earlier run")
    address = None if push is None else push_folder(made.folder, push, private=private)
    answer = _Answer(made=made, fitted=fitted, address=address)
    show(answer, as_json=as_json, render=answer.render)
