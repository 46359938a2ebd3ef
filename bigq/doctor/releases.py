"""examine_releases: which libraries are installed, and whether this bigq is tested with their releases."""

import platform
from dataclasses import dataclass

from bigq.measuring.environment import installed_version

__all__ = ["RANGES", "TESTED_PAIRS", "Library", "examine_releases"]

TESTED_PAIRS = (("2.11.0", "3.6.0"), ("2.13.0", "3.7.1"), ("2.14.1", "3.8.0"), ("2.15.0", "3.9.0"))  # torch, Triton
TESTED_PYTHONS = ((3, 11),)
RANGES = {  # the first and last release that is tested; None: any release from the first on
    "accelerate": ("1.10", None),
    "transformers": ("5.17", "5.23"),
    "diffusers": ("0.42", "0.42"),
    "peft": ("0.21", "0.21"),
    "bitsandbytes": ("0.50", "0.50"),
}
_NEEDED = ("torch", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library and its release.

    Args:
        name: of the package.
        version: that is installed; None if it is not.
        status: "tested", "not tested", "not installed" (and not needed) or "missing".
        advice: what to do; None if there is nothing to do.
    """

    name: str
    version: str | None
    status: str
    advice: str | None = None


def examine_releases() -> tuple[Library, ...]:
    """Python, torch with its Triton, and the libraries that bigq works with, without importing them."""
    torch, triton = installed_version("torch"), installed_version("triton")
    return (
        _python(platform.python_version()),
        *_pair(torch, triton),
        *(_in_range(name, installed_version(name)) for name in RANGES),
    )


def _python(version: str) -> Library:
    return Library(
        name="python", version=version, status="tested" if _minor(version) in TESTED_PYTHONS else "not tested"
    )


def _pair(torch: str | None, triton: str | None) -> tuple[Library, Library]:
    """torch and Triton, whose releases belong together; the last number of a release does not matter."""
    known = {(_minor(one), _minor(other)) for one, other in TESTED_PAIRS}
    said = "; ".join(f"torch {one} with Triton {other}" for one, other in TESTED_PAIRS)
    first = Library(name="torch", version=torch, status="missing" if torch is None else "tested")
    if triton is None:
        advice = "pip install triton: kernels on a GPU need it"
        return first, Library(name="triton", version=None, status="missing", advice=advice)
    if torch is None or (_minor(torch), _minor(triton)) in known:
        return first, Library(name="triton", version=triton, status="tested")
    advice = f"install releases that are tested together: {said}"
    return (
        Library(name="torch", version=torch, status="not tested"),
        Library(name="triton", version=triton, status="not tested", advice=advice),
    )


def _in_range(name: str, version: str | None) -> Library:
    first, last = RANGES[name]
    if version is None:
        needed = name in _NEEDED
        return Library(
            name=name,
            version=None,
            status="missing" if needed else "not installed",
            advice=f"pip install '{name}>={first}'" if needed else None,
        )
    found = _minor(version)
    if _minor(first) <= found and (last is None or found <= _minor(last)):
        return Library(name=name, version=version, status="tested")
    wanted = f"{name} {first}" if first == last else f"{name} {first} to {last}" if last else f"{name} {first} or later"
    return Library(name=name, version=version, status="not tested", advice=f"{wanted} is tested")


def _minor(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"."""
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("+")[0].split(".")[:2])
