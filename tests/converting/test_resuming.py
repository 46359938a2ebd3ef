"""A run that ends early leaves nothing that loads, and the same run goes on from the files that it had finished."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigq import BigqError, ConfigError, InputMoments, QuantizationConfig, load_and_quantize_model, quantize_checkpoint
from bigq.converting import quantize_checkpoint as module
from bigq.saving.shard_file import ShardFile
from quantized_folders import Wide, assert_same, load_and_save, skeleton

ROOT = Path(__file__).parents[2]
MOMENTS = InputMoments({"blocks.0.0.weight": torch.rand(256)})
SIZE = "150KB"  # of a shard: six of them


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(Wide().state_dict(), folder / "model.safetensors")
    return folder


def convert(source, to, config="nf4", **settings):
    settings = {"max_shard_size": SIZE} | settings
    return quantize_checkpoint(source, to, config, model=skeleton(), device="cpu", progress=False, **settings)


def stop_at(monkeypatch, number, error):
    """Raise `error` when the file `number`, counted from 1, is to be finished."""
    count, finish = iter(range(1, 100)), ShardFile.finish

    def stopping(file):
        if next(count) == number:
            raise error
        return finish(file)

    monkeypatch.setattr(ShardFile, "finish", stopping)


def assert_unfinished(to):
    assert [path.name for path in to.iterdir()] == [".bigq-quantize"]
    with pytest.raises(BigqError):
        load_and_quantize_model(skeleton(), to, device_map="cpu", progress=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_it_goes_on_where_it_was_stopped(source, tmp_path, monkeypatch, error):
    to = tmp_path / "to"
    with monkeypatch.context() as patch:
        stop_at(patch, 3, error)
        with pytest.raises(type(error)):
            convert(source, to)
    assert_unfinished(to)
    whole = sorted(to.glob(".bigq-quantize/*.safetensors"))[:2]
    inodes = [path.stat().st_ino for path in whole]
    made = convert(source, to)
    assert made.resumed == 2
    assert [(to / path.name).stat().st_ino for path in whole] == inodes, "they are not written again"
    assert_same(to, load_and_save(skeleton(), source, "nf4", tmp_path / "expected"))
    assert not (to / ".bigq-quantize").exists()


def test_a_process_that_is_killed(source, tmp_path):
    """SIGKILL while the fourth file is written."""
    code = f"""
        import os, signal
        from quantized_folders import skeleton
        from bigq import quantize_checkpoint
        from bigq.saving.shard_file import ShardFile
        finish, count = ShardFile.finish, iter(range(1, 100))
        ShardFile.finish = lambda file: os.kill(os.getpid(), signal.SIGKILL) if next(count) == 4 else finish(file)
        quantize_checkpoint({str(source)!r}, {str(tmp_path / "to")!r}, "nf4", model=skeleton(), device="cpu",
                            max_shard_size={SIZE!r})
    """
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "triton_kernels", "tests/support"))
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    assert_unfinished(tmp_path / "to")
    made = convert(source, tmp_path / "to")
    assert made.resumed in (2, 3)  # the third may not have been on the disk yet
    assert_same(tmp_path / "to", load_and_save(skeleton(), source, "nf4", tmp_path / "expected"))


def test_a_process_that_ends_while_files_are_moved(source, tmp_path, monkeypatch):
    expected, replace, count = load_and_save(skeleton(), source, "nf4", tmp_path / "expected"), os.replace, [0]

    def stopping(old, new):
        if "state.json" not in str(new):
            count[0] += 1
            if count[0] == 4:
                raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "to")
    monkeypatch.setattr(module, "write_shard", None)  # nothing is left to write
    convert(source, tmp_path / "to")
    assert_same(tmp_path / "to", expected)
    assert not (tmp_path / "to" / ".bigq-quantize").exists()


@pytest.mark.parametrize(
    "changed, what",
    [
        ({"config": QuantizationConfig("nf4", block_size=32)}, "the quantization_config"),
        ({"config": QuantizationConfig("nf4", method="search", moments=MOMENTS)}, "the moments"),
        ({"layout": "bitsandbytes"}, "the layout"),
        ({"max_shard_size": "200KB"}, "the model or max_shard_size"),
        ({"metadata": {"of": "me"}}, "the metadata"),
        ({}, "the source"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_run_is_not_continued(source, tmp_path, monkeypatch, changed, what):
    to = tmp_path / "to"
    with monkeypatch.context() as patch:
        stop_at(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(source, to)
    if what == "the source":
        save_file(Wide().state_dict(), source / "model.safetensors")
    with pytest.raises(ConfigError, match=f"a part of another run, which differs in .*{what}.*overwrite to begin anew"):
        convert(source, to, **changed)
    made = convert(source, to, **changed, overwrite=True)
    assert made.resumed == 0
    layout = changed.get("layout", "bigq")
    assert_same(to, load_and_save(skeleton(), source, changed.get("config", "nf4"), tmp_path / "expected", layout))


def test_a_folder_with_files_is_left_alone_unless_they_may_be_replaced(source, tmp_path):
    to = tmp_path / "to"
    convert(source, to)
    before = {path.name: path.stat().st_ino for path in to.iterdir()}
    with pytest.raises(ConfigError, match=r"is not empty, it holds README\.md, model-00001.*choose another folder"):
        convert(source, to, "int8")
    assert {path.name: path.stat().st_ino for path in to.iterdir()} == before
    (to / "mine.txt").write_text("kept")
    convert(source, to, "int8", overwrite=True, max_shard_size="5GB")
    assert sorted(path.name for path in to.iterdir()) == ["README.md", "mine.txt", "model.safetensors"]
    assert_same(to, load_and_save(skeleton(), source, "int8", tmp_path / "expected"))
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        convert(source, to / "mine.txt")


def test_staged_files_of_an_unknown_run_are_dropped(source, tmp_path):
    staged = tmp_path / "to" / ".bigq-quantize"
    staged.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, staged / "model-00009-of-00009.safetensors")
    (staged / "state.json").write_text("{")
    made = convert(source, tmp_path / "to")
    assert sorted(path.name for path in (tmp_path / "to").glob("*.safetensors")) == sorted(made.files)


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """200 MB of weights, which become 100 MB: neither is in memory as a whole."""
    code = f"""
        import resource, sys, torch
        from torch import nn
        from safetensors.torch import save_file
        from bigq import quantize_checkpoint
        def build():
            return nn.Sequential(nn.Embedding(20_000, 1024), *[nn.Linear(1024, 1024) for _ in range(64)],
                                 nn.Linear(1024, 20_000, bias=False))
        with torch.device("meta"):
            model = build().bfloat16()
        if sys.argv[1] == "make":
            save_file({{k: torch.rand(v.shape, dtype=v.dtype) for k, v in model.state_dict().items()}},
                      {str(tmp_path / "model.safetensors")!r})
            sys.exit()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quantize_checkpoint({str(tmp_path / "model.safetensors")!r}, {str(tmp_path)!r} + "/to", "nf4", model=model,
                            device="cpu", read_budget=16 << 20)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "triton_kernels", "tests/support"))
    printed = ""
    for step in ("make", "convert"):
        printed = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), step],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        ).stdout
    assert int(printed) < 80 * 1024, f"{int(printed) // 1024} MiB over what importing takes"
