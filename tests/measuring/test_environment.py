"""Environment: what a measurement was made with."""

import json
import platform
from datetime import datetime

import torch

from bigq.measuring.environment import Environment, installed_version


def test_what_is_installed_and_where():
    found = Environment.of(torch.device("cpu"))
    assert found.versions["torch"] == torch.__version__
    assert found.python == platform.python_version()
    assert found.device
    assert found.cores >= 1
    assert datetime.fromisoformat(found.date).utcoffset().total_seconds() == 0
    assert json.loads(json.dumps(found.to_dict()))["versions"] == found.versions


def test_what_is_not_installed_has_no_version():
    assert installed_version("no-such-library-1234") is None
