"""The end of a rank."""

import os
import subprocess
import sys

import pytest

# A finalisation that aborts stands for a backend's thread that does.
SCRIPT = """
import atexit, os
from llava_mole.common.distributed import end_rank
atexit.register(os.abort)
print("done")
end_rank({code})
"""


@pytest.mark.parametrize("code", [0, 75])
def test_a_rank_of_several_ends_with_its_code_whatever_its_finalisation_does(code: int):
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(code=code)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (code, "done\n")


def test_a_single_process_is_finalised():
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    script = SCRIPT.format(code=3).replace("os.abort", "print, 'finalised'")
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (3, "done\nfinalised\n")
