"""Programs in processes of their own: forked from a server that has done the imports, or started by a real launcher."""

import functools
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from scripts.bench.faults_ranks import Farm, free_port

ROOT = Path(__file__).parents[2]
TOPOLOGY = ("NNODES", "NODE_RANK", "GPUS_PER_NODE", "LAUNCHER", "DRY_RUN", "MAX_RESTARTS", "MASTER_ADDR", "MASTER_PORT",
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # fmt: skip


def launch_environment(**more: str) -> dict[str, str]:
    """Return this process's environment for a launch on CPU ranks, without its own topology."""
    environment = {key: value for key, value in os.environ.items() if key not in TOPOLOGY}
    environment.update(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        VIRTUAL_ENV=str(Path(sys.executable).parent.parent),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",
        HF_HUB_OFFLINE="1",
    )
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [more.pop("PYTHONPATH", ""), str(ROOT)]))
    return {**environment, **more}


@functools.cache
def farm() -> Farm:
    """Return the server of this test process. It starts on first use and ends with the process."""
    return Farm(preload=("faults_rank", "deepspeed", "llava_mole.inference.predictor", "llava_mole.eval.model_vqa"))


def fork_python(
    *arguments: object, ranks: int = 0, timeout_s: float = 300.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a process that need not import torch again.

    Its standard output and error are captured; the working directory is the repository.

    Args:
        arguments: A file, or `-m` and a module, and what follows.
        ranks: Run so many ranks as `torchrun --standalone --nproc_per_node RANKS` does: once one has failed, the
            others are ended. The return code is that of the first rank that failed, and the outputs are joined.
        timeout_s: Seconds until the processes are killed.
        environment: Variables to add.

    Raises:
        subprocess.TimeoutExpired: The processes still ran after `timeout_s`.
    """
    given = [str(argument) for argument in arguments]
    variables = [launch_environment(**environment) for _ in range(max(1, ranks))]
    port = str(free_port())
    for rank in range(ranks):
        variables[rank] |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    with tempfile.TemporaryDirectory() as folder:
        logs = [[f"{folder}/{index}.out", f"{folder}/{index}.err"] for index in range(len(variables))]
        started = farm().fork(_run, [(given, *each) for each in zip(variables, logs, strict=True)])
        codes = started.wait(timeout_s)
        out, err = ("".join(Path(files[k]).read_text("utf-8", "replace") for files in logs) for k in range(2))
    if codes is None:
        raise subprocess.TimeoutExpired(given, timeout_s, out, err)
    return subprocess.CompletedProcess(given, next(filter(None, codes), 0), out, err)


def _run(arguments: Sequence[str], environment: dict[str, str], logs: Sequence[str]) -> None:
    """Be `python ARGUMENTS`. Does not return."""
    for stream, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    code: object = 1
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # type: ignore[arg-type]  # no clean-up that could wait for a lost peer
