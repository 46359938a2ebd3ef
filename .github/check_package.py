"""Check the wheel and the sdist in a folder: both packages and their py.typed, one version, and no tests."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    f"{package.name}/{path.relative_to(package)}"
    for package in (ROOT / "bigq", ROOT / "triton_kernels" / "bigq_kernels")
    for path in (*package.rglob("*.py"), package / "py.typed")
}


def main(folder: Path) -> None:
    """Raise SystemExit with what is wrong."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    wrong = [f"{wheel.name} lacks {name}" for name in sorted(SOURCES - packed)]
    wrong += [f"{wheel.name} has {name}" for name in sorted(packed - SOURCES)]
    wrong += [f"{sdist.name} has {name}" for name in sorted(shipped) if name.startswith("tests")]
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "bigq" / "__init__.py").read_text(), flags=re.MULTILINE)
    expected = version[1] if version else "?"
    wrong += [
        f"{file.name}: bigq.__version__ is {expected}" for file in (wheel, sdist) if f"-{expected}" not in file.name
    ]
    if wrong:
        sys.exit("\n".join(wrong[:10]))
    print(f"{wheel.name} and {sdist.name}: {len(SOURCES)} files, version {expected}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
