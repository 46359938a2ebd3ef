"""Several nodes: two torchruns on one machine, as on two, each with its own copy of the checkpoint."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pages import ROOT

pytestmark = pytest.mark.slow

SCRIPT = """
import os, sys
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from bigq import QuantizationConfig, load_and_quantize_model
from bigq.integrations.tensor_parallel import parallelize_module

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
local = int(os.environ["LOCAL_WORLD_SIZE"])
nodes = torch.distributed.get_world_size() // local
mesh = init_device_mesh("cpu", (nodes, local), mesh_dim_names=("nodes", "gpus"))
assert mesh["gpus"].get_local_rank() == int(os.environ["LOCAL_RANK"])
assert mesh["nodes"].get_local_rank() == int(os.environ["GROUP_RANK"])


def load():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 64))
    config = QuantizationConfig("nf4", skip_modules=["3"])
    return load_and_quantize_model(model, sys.argv[1], config, "cpu")


one, several = load(), load()
parallelize_module(several, mesh["gpus"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
for layer in several:
    fully_shard(layer, mesh=mesh["nodes"])
fully_shard(several, mesh=mesh["nodes"])
for model in (one, several):
    for parameter in model[3].parameters():
        parameter.requires_grad_(True)
x = torch.linspace(-1, 1, 5 * 64).view(5, 64)
outputs = [model(x) for model in (one, several)]
for out in outputs:
    out.square().mean().backward()
gradients = one[3].weight.grad, several[3].weight.grad.full_tensor()
errors = [((b - a).norm() / a.norm()).item() for a, b in (outputs, gradients)]
print(f"rank {torch.distributed.get_rank()} of node {os.environ['GROUP_RANK']}: {max(errors) < 1e-5} {errors}")
torch.distributed.destroy_process_group()
"""


def test_two_nodes_of_two_processes_each_compute_what_one_process_computes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 64))
    (tmp_path / "node-0").mkdir()
    save_file(model.state_dict(), tmp_path / "node-0" / "model.safetensors")
    shutil.copytree(tmp_path / "node-0", tmp_path / "node-1")
    (tmp_path / "train.py").write_text(SCRIPT)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "triton_kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    nodes = []
    for node in range(2):
        agent = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            f"--node-rank={node}",
            "--nproc-per-node=2",
        ]
        address = ["--master-addr=127.0.0.1", f"--master-port={port}"]
        script = [str(tmp_path / "train.py"), str(tmp_path / f"node-{node}")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        nodes.append(subprocess.Popen([*agent, *address, *script], env=environment, **pipes))
    said = [process.communicate(timeout=300) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], said[0][1] + said[1][1]
    lines = sorted(line for out, _ in said for line in out.splitlines() if line.startswith("rank"))
    assert [line.split(" [")[0] for line in lines] == [f"rank {r} of node {r // 2}: True" for r in range(4)]
