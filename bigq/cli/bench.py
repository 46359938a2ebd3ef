"""`bigq bench`: how fast this library is on this machine, and whether another run was faster."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bigq.benchmarks.compare_results import ResultComparison, compare_results
from bigq.benchmarks.formats import BENCH_FORMATS
from bigq.benchmarks.linears import bench_linears
from bigq.benchmarks.llama import SHAPES
from bigq.benchmarks.loading import bench_loading
from bigq.benchmarks.model import bench_model
from bigq.benchmarks.offload import bench_offload
from bigq.benchmarks.result import BenchResult, read_result, short_number
from bigq.cli.arguments import DeviceOption, device_of, numbers
from bigq.cli.output import JsonFlag, answers, note, show, table

__all__ = ["app", "parse_shapes"]

app = typer.Typer(
    help="Time linears, a whole model, loading or offloading on this machine, also on a CPU.",
    no_args_is_help=True,
)

FormatsOption = Annotated[
    list[str] | None,
    typer.Option("--format", help=f"One of {', '.join(BENCH_FORMATS)}; may be repeated. Default: all."),
]
SizeOption = Annotated[
    str | None, typer.Option(help=f"Of the model: {', '.join(SHAPES)}. Default: 1b on a GPU, tiny on a CPU.")
]
TokensOption = Annotated[str, typer.Option(help="Tokens of a call, separated by commas.")]
FolderOption = Annotated[
    Path | None, typer.Option(help="Where files are written for it. Default: the folder for temporary files.")
]
OutOption = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """[(N, K), ...] of "NxK,NxK"; raises BadParameter for anything else."""
    try:
        shapes = [(int(n), int(k)) for n, k in (item.split("x") for item in text.split(","))]
    except ValueError:
        shapes = []
    if not shapes or min(map(min, shapes)) < 1:
        raise typer.BadParameter(
            f"{text!r} is no list of shapes; expected N x K like 4096x4096,14336x4096", param_hint="--shapes"
        )
    return shapes


@app.command("linears", epilog="Example: bigq bench linears --shapes 4096x4096 --tokens 1,16 --format nf4")
@answers
def linears(
    shapes: Annotated[
        str | None, typer.Option(help="N x K, separated by commas. Default: those of an 8B Llama on a GPU.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Rows of x, separated by commas. Default: 1 to 4096 on a GPU, 1,16 on a CPU.")
    ] = None,
    formats: FormatsOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Time x times the transposed weight in every format, beside float and beside what the memory allows."""
    asked = {"shapes": None if shapes is None else parse_shapes(shapes)}
    counts = None if tokens is None else numbers("--tokens", tokens)
    chosen, place = _formats(formats), device_of(device)
    _answer(lambda: bench_linears(place, **asked, tokens=counts, formats=chosen, progress=note), out, as_json)


@app.command("model", epilog="Example: bigq bench model --size 8b --format nf4 --format int8")
@answers
def model(
    size: SizeOption = None,
    tokens: TokensOption = "1,16,512",
    formats: FormatsOption = None,
    folder: FolderOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Load a model of Llama's shape with random numbers, call it, and count its memory, by format."""
    counts, chosen, place = numbers("--tokens", tokens), _formats(formats), device_of(device)
    shape = _size(size)
    _answer(
        lambda: bench_model(place, size=shape, formats=chosen, tokens=counts, folder=folder, progress=note),
        out,
        as_json,
    )


@app.command("loading", epilog="Example: bigq bench loading --size 16 --folder /mnt/nvme")
@answers
def loading(
    size: Annotated[
        float | None, typer.Option(help="GB (1e9 bytes) of the checkpoint. Default: 2 on a GPU, 0.02 on a CPU.")
    ] = None,
    formats: FormatsOption = None,
    folder: FolderOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a checkpoint with random numbers, and load it from the drive (cold) and from memory (warm)."""
    if size is not None and not 0 < size < 1e6:
        raise typer.BadParameter(f"{size} GB; expected a positive number", param_hint="--size")
    nbytes = None if size is None else int(size * 1e9)
    chosen, place = _formats(formats), device_of(device)
    _answer(lambda: bench_loading(place, nbytes=nbytes, formats=chosen, folder=folder, progress=note), out, as_json)


@app.command("offload", epilog="Example: bigq bench offload --size 8b --format nf4")
@answers
def offload(
    size: SizeOption = None,
    tokens: TokensOption = "1,16,512",
    format_name: Annotated[str, typer.Option("--format", help=f"One of {', '.join(BENCH_FORMATS)}.")] = "nf4",
    folder: FolderOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Call a model whose blocks are on the CPU or the disk, beside what the link and the drive allow."""
    counts, place = numbers("--tokens", tokens), device_of(device)
    shape = _size(size)
    _formats([format_name])
    _answer(
        lambda: bench_offload(place, size=shape, format_name=format_name, tokens=counts, folder=folder, progress=note),
        out,
        as_json,
    )


@app.command("compare", epilog="Example: bigq bench compare before.json after.json")
@answers
def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="A result that --out wrote.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Another result of the same benchmark.")],
    as_json: JsonFlag = False,
) -> None:
    """Compare two results row by row, and say which differences are larger than the noise."""
    found = compare_results(read_result(before), read_result(after))
    show(found, as_json=as_json, render=lambda console: _print_changes(console, found))


def _answer(measure: Callable[[], BenchResult], out: Path | None, as_json: bool) -> None:
    if out is not None:
        out.open("a").close()  # now, and not after minutes
    found = measure()
    if out is not None:
        found.save(out)
        note(f"wrote {out}")
    show(found, as_json=as_json, render=lambda console: _print(console, found))


def _print(console: Console, found: BenchResult) -> None:
    torch_version = found.environment.versions["torch"]
    console.print(f"{found.environment.device}, torch {torch_version}, {found.environment.date}", markup=False)
    said = ", ".join(f"{name} {_setting(value)}" for name, value in found.settings.items())
    console.print(said, markup=False)
    console.print(table(found.columns(), found.cells(), text=len(found.rows[0].what) if found.rows else 1))


def _print_changes(console: Console, found: ResultComparison) -> None:
    for line in found.differences:
        console.print(f"differs: {line}", markup=False)
    names = list(found.changes[0].what) if found.changes else []
    rows = [
        [
            *(str(value) for value in change.what.values()),
            change.reading,
            short_number(change.before),
            short_number(change.after),
            "-" if change.ratio is None else f"{change.ratio:.3f}",
            f"{change.noise:.0%}",
            change.verdict,
        ]
        for change in found.changes
    ]
    columns = [*names, "reading", "A", "B", "B / A", "noise", ""]
    console.print(table(columns, rows, title=f"bench {found.benchmark}", text=len(names) + 1))
    for which, cases in (("A", found.only_before), ("B", found.only_after)):
        for case in cases:
            console.print(f"only in {which}: {' '.join(map(str, case.values()))}", markup=False)


def _setting(value: str | int | float | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _formats(names: list[str] | None) -> list[str] | None:
    for name in names or []:
        if name not in BENCH_FORMATS:
            raise typer.BadParameter(
                f"{name!r} is no format; expected one of {', '.join(BENCH_FORMATS)}", param_hint="--format"
            )
    return names or None


def _size(name: str | None) -> str | None:
    if name is not None and name not in SHAPES:
        raise typer.BadParameter(f"{name!r} is no size; expected one of {', '.join(SHAPES)}", param_hint="--size")
    return name
