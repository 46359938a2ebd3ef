"""Several processes of one test, which are the ranks of a gloo group."""

import os
import socket

import torch
import torch.distributed as dist


def run_ranks(worker, folder, *arguments, world=2):
    """[worker(rank, *arguments)] of `world` processes with a process group. `worker` is a function of a module."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_run, args=(world, port, str(folder), worker, arguments), nprocs=world)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank, world, port, folder, worker, arguments):
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    names |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(worker(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def error_of(call):
    """What `call` raises, as words: the class and the message; empty if it raises nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
