"""`bigq compare`: its table, its JSON, its picture, and what it says of wrong arguments."""

import json
import os

import pytest

from bigq.cli.app import main
from command_page import commands
from story_model import story_model


def _run(capsys, *arguments):
    """(exit code, stdout, stderr) of `bigq compare`."""
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


@pytest.fixture(scope="module")
def story(tmp_path_factory, request):
    pytest.importorskip("transformers")
    assets = request.config.getoption("--assets")
    if not assets.is_dir():
        pytest.skip(f"no folder {assets}")
    return story_model(assets, tmp_path_factory.mktemp("story") / "stories260K")


def test_a_real_model_and_text(story, assets, tmp_path, capsys):
    """NF4 costs stories260K .108 nats a token on 96,049 tokens."""
    text = tmp_path / "text.txt"
    text.write_text((assets / "text" / "tinystories_valid_stories.txt").read_text()[:6000])
    arguments = (story, "--format", "nf4", "--text", text, "--context", 256, "--batch", "")
    code, out, _ = _run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert 0.03 < found["perplexity"]["change_nats"] < 0.25
    assert 0 < found["perplexity"]["standard_error"] < 0.03
    assert 0.7 < found["logits"]["top1_agreement"] < 1
    assert 0.088 < found["weight_error"] < 0.098
    assert found["environment"]["versions"]["torch"]


def test_the_lines_of_the_page_run(story, assets, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").symlink_to(story)
    text = (assets / "text" / "tinystories_valid_stories.txt").read_text()
    (tmp_path / "news.txt").write_text(text[:500])
    with pytest.raises(SystemExit):
        main(["quantize", "llama", "llama-nf4"])
    lines = commands("compare")
    assert len(lines) == 2
    for arguments in lines:
        capsys.readouterr()
        code, out, err = _run(capsys, *arguments[1:])
        assert code == 0, err
        assert "same likeliest token" in out
        assert ("wrote compare.png" in err) == ("--plot" in arguments)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_table(story, capsys):
    code, out, _ = _run(capsys, story, "--format", "int8", "--batch", "", "--tokens", 64)
    assert code == 0
    for said in ("same likeliest token", "model.layers.*.mlp.down_proj.weight", "all others", "Perplexity is left out"):
        assert said in out
    assert "prefill" not in out


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ([], 2, "Missing argument"),
        (["STORY", "STORY", "--format", "nf4"], 2, "options that quantize SRC say nothing of DST"),
        (["STORY", "STORY", "--double-quant"], 2, "options that quantize SRC say nothing of DST"),
        (["STORY", "--format", "nf4", "--method", "search"], 1, "--method search needs --moments FILE"),
        (["STORY", "--format", "nf4", "--batch", "0"], 2, "no list of positive numbers"),
        (["STORY", "--format", "nf4", "--device", "tpu"], 2, "'tpu' is no device"),
        (["STORY", "--format", "nf4", "--dtype", "int8"], 2, "'int8' is no dtype"),
        (["STORY", "--format", "nf5"], 2, "'nf5'; expected one of nf4, fp4, int8"),
        (["STORY", "--format", "nf4", "--text", "missing.txt"], 1, "missing.txt: No such file"),
        (["STORY", "--format", "nf4", "--text", "STORY/model.safetensors"], 1, "is no text in UTF-8"),
        (["STORY", "--format", "nf4", "--plot", "out.tables"], 1, "has no ending of"),
        (["STORY", "--format", "nf4", "--plot", "missing/out.png"], 1, "no such folder for the plot"),
        (["missing/folder", "--format", "nf4"], 1, "error: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments(story, arguments, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, out, err = _run(capsys, *(argument.replace("STORY", str(story)) for argument in arguments))
    assert (found, out) == (code, "")
    assert said in " ".join(err.replace("│", " ").split()).replace(f"{os.sep} ", os.sep)


def test_a_plot_without_matplotlib_says_what_to_install(story, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    code, _, err = _run(capsys, story, "--format", "nf4", "--plot", "out.png")
    assert (code, "pip install 'bigq[plots]'" in err) == (1, True)
