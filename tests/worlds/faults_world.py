"""For tests that start real launchers."""

import os
import socket
import sys
from pathlib import Path

TOPOLOGY = ("NNODES", "NODE_RANK", "GPUS_PER_NODE", "LAUNCHER", "DRY_RUN", "MAX_RESTARTS", "MASTER_ADDR", "MASTER_PORT",
            "RANK", "WORLD_SIZE", "LOCAL_RANK")  # fmt: skip


def launch_environment(**more: str) -> dict[str, str]:
    """This process's environment for a launch on CPU ranks, without its own topology."""
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key not in TOPOLOGY}
    environment.update(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        VIRTUAL_ENV=str(Path(sys.executable).parent.parent),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
    )
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [more.pop("PYTHONPATH", ""), str(root)]))
    return {**environment, **more}


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
