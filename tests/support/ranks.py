"""Several processes of one test, which are the ranks of a group: of NCCL if each gets a GPU, otherwise of gloo."""

import faulthandler
import os
import socket

import torch
import torch.distributed as dist

__all__ = ["error_of", "mesh_of", "own_device", "run_ranks"]


def run_ranks(worker, folder, *arguments, world=2, gpus=False, backend="nccl", patience_s=600):
    """[worker(rank, *arguments)] of `world` processes with a process group. `worker` is a function of a module.

    With `gpus`, each has a GPU where there are as many, and the group this `backend`: see `own_device`. What they
    return comes to the CPU.
    A process that is not done after `patience_s` seconds writes where each of its threads is to stderr, and ends: one
    that waits for another in vain would wait for ten minutes under NCCL, and then say less.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gpus = gpus and 1 < world <= torch.cuda.device_count()
    given = (world, port, str(folder), worker, arguments, backend if gpus else None, patience_s)
    torch.multiprocessing.spawn(_run, args=given, nprocs=world)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False, map_location="cpu") for rank in range(world)]


def _run(rank, world, port, folder, worker, arguments, backend, patience_s):
    faulthandler.dump_traceback_later(patience_s, exit=True)
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    names |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    if backend is not None:
        torch.cuda.set_device(rank)
        dist.init_process_group(backend, rank=rank, world_size=world, device_id=torch.device("cuda", rank))
    else:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(worker(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def own_device():
    """The device of this process: its GPU, or the CPU for a group of gloo."""
    on_gpu = "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def mesh_of(*sizes, **arguments):
    """A DeviceMesh of the devices of all processes."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(own_device().type, sizes, **arguments)


def error_of(call):
    """What `call` raises, as words: the class and the message; empty if it raises nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
