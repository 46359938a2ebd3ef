"""A Hub that is a folder on this disk: no test of this folder reaches the network."""

import pytest

from bigq.checkpoint import hub as hub_module
from fake_hub import FakeHub


@pytest.fixture(autouse=True)
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The Hub, offline until a test publishes a repository."""
    fake = FakeHub(tmp_path_factory.mktemp("hub"))
    monkeypatch.setattr(hub_module, "HfApi", lambda: fake)
    monkeypatch.setattr(hub_module, "snapshot_download", fake.snapshot_download)
    return fake
