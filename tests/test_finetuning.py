"""The Python snippets of docs/finetuning.md that need no network run as they stand, one after the other."""

import re

import pytest

from pages import ROOT, snippets


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
def test_snippets_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    found = [snippet for snippet in snippets(ROOT / "docs" / "finetuning.md") if snippet.needs is None]
    assert len(found) == 7
    namespace: dict[str, object] = {"__name__": "finetuning"}
    for snippet in found:
        exec(compile(snippet.code, "docs/finetuning.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert len(re.findall(r"the adapter changes it by [\d.]+%, rounding by [\d.]+%", printed)) == 2
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert namespace["merged"].model.layers[0].mlp.up_proj.__class__.__name__ == "QuantizedLinear"
    assert namespace["offloaded"].hf_device_map == {"": "cpu", "model.layers.1": "disk"}
