"""Without the private parts of Triton, or with a release that was not tested, Triton starts the kernels itself."""

import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher

from bigq_kernels import gpu, internals, launch, replay
from renamed_internals import NAMES, ROOT, renamed

NAME = "bigq_kernels.internals"
needs_all = pytest.mark.skipif(internals.__spec__ is None, reason="all are renamed: tests/support/renamed_internals.py")
START = (3, 1, 1, 11, 7, ("metadata",), None, None, None)


@needs_all
def test_this_triton_has_all_that_is_private():
    assert internals.IS_COMPLETE
    assert internals.is_tested()


def launcher_of_triton(monkeypatch, scratch=0):
    """The launcher of the Triton that is installed, with a function of ours where its C is, and what that was given."""
    launcher, called = object.__new__(CudaLauncher), []
    launcher.__dict__.update(
        launch=lambda *arguments: called.append(arguments),
        num_ctas=1,
        global_scratch_size=scratch,
        global_scratch_align=1,
        profile_scratch_size=0,
        profile_scratch_align=1,
        launch_cooperative_grid=False,
        launch_pdl=True,
        gsan_enabled=False,  # since 3.8
        arg_annotations=["annotation"],
        kernel_signature=b"signature",
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace())  # since 3.8 it asks for it
    return launcher, called


@needs_all
@pytest.mark.parametrize("scratch", [0, 64], ids=["direct", "scratch-memory"])
def test_asks_tritons_launcher_what_it_calls(monkeypatch, scratch):
    launcher, called = launcher_of_triton(monkeypatch, scratch)
    compiled = SimpleNamespace(run=launcher, function=7, packed_metadata=("metadata",))
    args = (0, 2, 5.0)
    function, first, last = internals.launch_of(compiled, (3, 1, 1), 11, args)
    assert called == []
    if scratch:
        assert (function, first, last) == (launcher, START + args, ())
    else:
        launcher(*START, *args)
        assert function is launcher.launch
        assert called == [(*first, last) if last else first]


@pytest.mark.parametrize("name", ["global_scratch_size", "profile_scratch_size"])
def test_a_launcher_that_may_need_memory_is_called_itself(monkeypatch, name):
    launcher, _ = launcher_of_triton(monkeypatch)
    compiled = SimpleNamespace(run=launcher, function=7, packed_metadata=("metadata",))
    assert renamed(NAME, name).launch_of(compiled, (3, 1, 1), 11, (5.0,)) == (launcher, (*START, 5.0), ())


@pytest.mark.parametrize(
    "version, tested",
    [("3.5.1", False), ("3.6.0", True), ("3.7.1+git12", True), ("3.9.0", True), ("3.10.0", False), ("4.6.0", False)],
)
def test_one_list_of_releases_says_what_is_taken(monkeypatch, version, tested):
    monkeypatch.setattr(triton, "__version__", version)
    assert internals.is_tested() is tested
    assert gpu.GLUON_RELEASES is internals.TESTED_TRITON
    compiled = {(1, 1, 1): None}
    assert (internals.starter(compiled, (1, 1, 1)) is not None) is tested


def test_pyproject_allows_what_was_tested_and_the_design_says_so():
    pyproject = (ROOT / "pyproject.toml").read_text()
    (last,) = re.findall(r'"triton>=3\.5,<3\.(\d+)', pyproject)
    assert internals.TESTED_TRITON[-1] == (3, int(last) - 1)
    design = (ROOT / "docs" / "design.md").read_text()
    for major, minor in internals.TESTED_TRITON:
        assert re.search(rf"^\| 2\.\d+\.\d.* \| {major}\.{minor}\.\d \|", design, flags=re.MULTILINE), (major, minor)


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Triton's module of caches, with an empty one, and how often its files were hashed."""
    from triton.runtime import cache

    hashed = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "triton_key", lambda: hashed.append(1) or f"{triton.__version__}digest")
    return SimpleNamespace(cache=cache, hashed=hashed, hash_sources=cache.triton_key)


def start(sources, module=internals):
    """What Triton takes for the digest of its files in another process."""
    sources.cache.triton_key = sources.hash_sources
    module.know_sources.cache_clear()
    module.know_sources()
    return sources.cache.triton_key()


@needs_all
def test_the_digest_of_tritons_files_is_kept_from_one_process_to_the_next(sources):
    assert [start(sources) for _ in range(3)] == [f"{triton.__version__}digest"] * 3
    assert len(sources.hashed) == 1


@needs_all
@pytest.mark.parametrize("left", ["", "3.5.1digest"], ids=["empty", "of another release"])
def test_a_digest_that_is_none_is_not_taken(sources, tmp_path, left):
    start(sources)
    (kept,) = tmp_path.rglob("triton_key")
    kept.write_text(left)
    assert start(sources) == f"{triton.__version__}digest"
    assert len(sources.hashed) == 2


@needs_all
def test_files_that_changed_are_hashed_again(sources, monkeypatch, tmp_path):
    package = tmp_path / "triton"
    for file in ("__init__.py", "compiler/code.py", "backends/nvidia/driver.py", "language/core.py", "_C/lib.so"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("before")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "compiler.py").write_text("before")
    (package / "backends" / "linked").symlink_to(tmp_path / "elsewhere")
    (package / "runtime").mkdir()
    (package / "runtime" / "cache.py").write_text("before")
    monkeypatch.setattr(triton, "__file__", str(package / "__init__.py"))
    start(sources)
    changed = [*sorted(package.rglob("*/*.py")), package / "_C" / "lib.so", tmp_path / "elsewhere" / "compiler.py"]
    for count, file in enumerate(changed, start=2):
        before = file.stat()
        file.write_text("behind")  # as many bytes
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        start(sources)
        assert len(sources.hashed) == count, file
    start(sources)
    assert len(sources.hashed) == 1 + len(changed)


@pytest.mark.parametrize("name", ["get_cache_manager", "triton_key"])
def test_triton_hashes_where_its_cache_is_another(sources, name):
    assert start(sources, renamed(NAME, name)) == f"{triton.__version__}digest"
    assert sources.cache.triton_key is sources.hash_sources


def test_every_kernel_is_started_by_launch():
    """Those of quantizing were not, so the first load of a process hashed Triton's library again: 0.4 to 0.8 s."""
    folder = ROOT / "triton_kernels" / "bigq_kernels"
    starts = {file for file in folder.rglob("*.py") if re.search(r"\w*kernel\w*\[", file.read_text())}
    assert starts == {folder / "launch.py"}


class Kernel:
    """Stands for a JIT function, and its compiled kernel, that doubles on the CPU."""

    arg_names = ("x", "out")

    def __init__(self):
        self.counts = {"triton": 0, "compiled": 0}

    def __getitem__(self, grid):
        def start(x, out, **constants):
            self.counts["triton"] += 1
            out.copy_(2 * x)
            return SimpleNamespace() if self.subscripts is None else self.subscripts

        return start


class Compiled(Kernel):
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def start(x, out):
            self.kernel.counts["compiled"] += 1
            out.copy_(2 * x)

        return start


@pytest.mark.parametrize("subscripts", [True, False], ids=["as-it-is", "renamed"])
def test_a_compiled_kernel_that_cannot_be_started_is_left_to_triton(monkeypatch, subscripts):
    monkeypatch.setattr(launch, "_COMPILED", {})
    kernel = Kernel()
    kernel.subscripts = Compiled(kernel) if subscripts else None
    for _ in range(3):
        x, out = torch.randn(4), torch.zeros(4)
        launch.launch(kernel, (1,), x, out, options={})
        assert torch.equal(out, 2 * x)
    assert kernel.counts == ({"triton": 1, "compiled": 2} if subscripts else {"triton": 3, "compiled": 0})


@pytest.fixture
def asked(monkeypatch):
    """asked(): whether replays work, from a start, on the CPU and on tiny kernels of Python's."""
    if not internals.IS_COMPLETE:
        pytest.skip("parts of Triton or torch are not there: replays are refused before they are tried")
    on_cpu = replay._has_the_bits_of_its_launcher
    monkeypatch.setattr(replay, "_has_the_bits_of_its_launcher", lambda device: on_cpu("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # as get_device() of a CPU tensor
    monkeypatch.setattr(launch, "_COMPILED", {})
    active = SimpleNamespace(get_current_stream=lambda device_index: 11)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    monkeypatch.setattr(internals.knobs.runtime, "interpret", False)
    monkeypatch.setattr(replay, "_works", None)
    monkeypatch.setattr(replay, "_multiply_kernel", Multiply())
    return replay.can_replay


class Multiply:
    """The kernel of the trial, on the CPU. `factor` 0 makes the replay alone wrong."""

    arg_names = ("x_ptr", "factor_ptr", "out_ptr", "n", "BLOCK")
    function, packed_metadata, factor = 7, ("metadata",), 1

    def __init__(self):
        self.buffers, self.starts = {}, 0

    def __getitem__(self, grid):
        def start(x, factor, out, n, *constants, **named):
            self.starts += 1
            internals.knobs.runtime.launch_enter_hook(None)
            _write(out.data_ptr(), _read(x.data_ptr(), n) * _read(factor.data_ptr(), 1))
            return self

        return start

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, x_ptr, factor_ptr, out_ptr, n, _):
        _write(out_ptr, _read(x_ptr, n) * _read(factor_ptr, 1) * self.factor)


def _read(address, n):
    import ctypes

    import numpy as np

    return np.frombuffer((ctypes.c_float * n).from_address(address), dtype=np.float32)


def _write(address, values):
    _read(address, len(values))[:] = values


def test_a_trial_shows_that_replays_work_and_is_made_once(asked):
    kernel = replay._multiply_kernel
    assert asked() is True
    starts = kernel.starts
    assert asked() is True
    assert kernel.starts == starts == 2 + 4  # two launches a call: recorded, and twice by the launcher


def test_a_replay_with_other_bits_is_noticed(asked):
    replay._multiply_kernel.factor = 2
    with pytest.warns(UserWarning, match=r"up to 160 us of host time .*other numbers than its launcher"):
        assert asked() is False
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert asked() is False


@pytest.mark.parametrize("name", NAMES[NAME])
def test_a_renamed_part_leaves_all_to_the_launcher(asked, monkeypatch, name):
    """What has another name is not found, which is seen in the trial: afterwards nothing is recorded."""
    other = renamed(NAME, name)
    monkeypatch.setattr(replay, "internals", other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        works = asked()
    if name in ("global_scratch_size", "profile_scratch_size", "get_cache_manager", "triton_key"):
        assert works  # by Triton's launcher in Python; the last two only shorten the start
    else:
        assert not works
        assert len(caught) == (name != "calls")  # which says that someone listens: it is asked again
    x, factor = torch.randn(8), torch.tensor([2.0])
    assert torch.equal(replay._multiply_twice(x, factor), 4 * x)


def test_with_all_of_them_renamed_replays_are_off_and_a_warning_says_so(monkeypatch):
    monkeypatch.setattr(replay, "internals", renamed(NAME, *NAMES[NAME]))
    monkeypatch.setattr(replay, "_works", None)
    with pytest.warns(UserWarning, match="up to 160 us .*: parts of Triton or torch that they use are not there"):
        assert replay.can_replay() is False
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert replay.can_replay() is False


@pytest.mark.parametrize("moment", ["capture", "trace", "listener", "interpreter"])
def test_where_it_cannot_be_tried_nothing_is_decided(asked, monkeypatch, moment):
    with monkeypatch.context() as patch:
        if moment == "capture":
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        elif moment == "trace":
            patch.setattr(replay, "is_compiling", lambda: True)
        elif moment == "interpreter":
            patch.setattr(internals.knobs.runtime, "interpret", True)
        else:
            patch.setattr(internals.knobs.runtime, "launch_exit_hook", print)
        assert asked() is False
        assert replay._works is None
    assert asked() is True


def test_another_release_is_said_and_left_to_the_launcher(asked, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    with pytest.warns(UserWarning, match=r"Triton 3\.10\.0 is not one of 3\.6, 3\.7"):
        assert asked() is False


@pytest.mark.gpu
def test_replays_work_on_this_gpu(monkeypatch):
    monkeypatch.setattr(replay, "_works", None)
    assert replay.can_replay()


def test_a_recording_does_not_import_torchs_compiler():
    """torch imports it where a mode does not say that the compiler may see it: 1.9 s (2-core CPU)."""
    code = (
        "import sys, torch\n"
        "from bigq_kernels import replay\n"
        "with replay._Watch() as watch: torch.empty(3)\n"
        "assert len(watch.allocated) == 1\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "triton_kernels")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
