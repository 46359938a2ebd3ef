"""Internals: the private parts of Triton, and of torch, that save these kernels host time, each with what does without.

No other file names them. They are what they were in the releases of TESTED_TRITON. With another, or where a part is
missing, Triton starts the kernels itself: 71 to 160 us of host time a linear, where a replay takes 15 to 24 (H200).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import get_ident
from typing import Any, cast

import triton

IS_COMPLETE, DispatchMode = True, cast(Any, object)  # IS_COMPLETE: replays have all that they are made of
try:
    from torch.utils._python_dispatch import TorchDispatchMode  # "Extending PyTorch" documents it
    from triton import knobs
    from triton.runtime import driver

    class _Mode(TorchDispatchMode):
        """A mode that torch's compiler may see: torch imports it to look away, 1.9 s at the first call (2 cores)."""

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

    DispatchMode = _Mode
except ImportError:
    IS_COMPLETE = False

__all__ = [
    "IS_COMPLETE",
    "SHARED_MEMORY",
    "TESTED_TRITON",
    "DispatchMode",
    "Launch",
    "counted_launches",
    "current_stream_getter",
    "has_launch_hooks",
    "is_tested",
    "know_sources",
    "launch_of",
    "starter",
]

# What replays and the Gluon kernels are taken with: docs/design.md says what was tested.
TESTED_TRITON = ((3, 6), (3, 7), (3, 8), (3, 9))
# In PTX, the shared memory that Triton allocates. ptxas refuses a name that is not there.
SHARED_MEMORY = "global_smem"

Launch = tuple[Callable[..., None], tuple[Any, ...], tuple[Any, ...]]  # call first(*second, third) or first(*second)


def is_tested() -> bool:
    """Whether the Triton that is installed is one of TESTED_TRITON."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) in TESTED_TRITON


@cache
def know_sources() -> None:
    """Before the first kernel: let Triton take the digest of its own files from its cache, if none has changed since.

    Triton reads and hashes its library of 416 MB in every process, to find compiled kernels on disk. That takes 0.40 s
    on the host of an H200, and the first result of a load waits for it. Whether a file is the same is told by its
    size, its time of modification and that of its last change, which no program can set. Where anything is not as
    expected, Triton hashes as it does without this.
    """
    if not is_tested():
        return
    try:
        from triton.runtime import cache as kernel_cache

        hash_sources = kernel_cache.triton_key
        entry = kernel_cache.get_cache_manager(_looks_of_sources())
        path = entry.get_file("triton_key")
        digest = "" if path is None else Path(path).read_text()
        if not digest.startswith(triton.__version__):
            digest = hash_sources()
            entry.put(digest, "triton_key")
        kernel_cache.triton_key = lambda: digest
    except Exception:  # a cache that cannot be written, or another Triton
        return


def _looks_of_sources() -> str:
    """What tells the files that Triton hashes from others, as a digest: 2 ms, 17 the first time."""
    root = Path(triton.__file__).parent
    found = [*(root / "_C").glob("*.so"), root / "runtime" / "cache.py"]
    for folder in ("compiler", "backends", "language"):
        # A build of Triton from its sources has links to folders here.
        walked = os.walk(root / folder, followlinks=True)
        found += [Path(path, name) for path, _, names in walked for name in names if name.endswith(".py")]
    stats = [(str(file), file.stat()) for file in sorted(found)]
    looks = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    return sha256(repr((triton.__version__, looks)).encode()).hexdigest()


def starter(compiled: Any, grid: tuple[int, ...]) -> Callable[[tuple[int, ...]], Callable[..., None]] | None:
    """A function of a grid that starts a compiled kernel on (*arguments, *constants); None where there is none.

    Triton's own launch inspects, specializes and hashes each argument: about 160 us for a linear, against 71 to 102.
    """
    try:
        compiled[grid]
        return compiled.__getitem__ if is_tested() else None
    except Exception:
        return None


def current_stream_getter() -> Callable[[int], int]:
    """The function that gives the handle of a device's current stream; torch.cuda.current_stream takes 1 us more."""
    return driver.active.get_current_stream  # type: ignore[no-any-return]


def has_launch_hooks() -> bool:
    """Whether someone listens to Triton's launches, which a replay would not tell of."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # a chain of hooks, one hook or None


@contextmanager
def counted_launches() -> Iterator[Callable[[], int]]:
    """How many kernels of Triton's this thread has started in the context so far."""
    threads: list[int] = []
    hooks = knobs.runtime.launch_enter_hook

    def note(_: Any) -> None:
        threads.append(get_ident())

    if not (hasattr(hooks, "add") and hasattr(hooks, "remove")):  # someone put a hook of their own in the chain's place
        yield lambda: -1
        return
    hooks.add(note)
    try:
        yield lambda: threads.count(get_ident())
    finally:
        hooks.remove(note)


def launch_of(compiled: Any, grid: tuple[int, ...], stream: object, args: tuple[Any, ...]) -> Launch:
    """What Triton's launcher calls in C for compiled[grid](*args): its Python, about 1 us, is not run each time.

    Versions of Triton differ in the order of arguments, so a copy of the launcher is asked. One that allocates scratch
    memory, or is no such object, is called itself.
    """
    run = compiled.run
    # no launch metadata, no hooks
    start = (*grid, stream, compiled.function, compiled.packed_metadata, None, None, None)
    if getattr(run, "global_scratch_size", None) != 0 or getattr(run, "profile_scratch_size", None) != 0:
        return run, start + args, ()
    taken: list[tuple[Any, ...]] = []
    probe = copy(run)
    probe.launch = lambda *arguments: taken.append(arguments)
    probe(*start, *args)
    if len(taken) != 1:
        return run, start + args, ()
    (arguments,) = taken
    return (run.launch, arguments[:-1], args) if arguments[-1:] == (args,) else (run.launch, arguments, ())
