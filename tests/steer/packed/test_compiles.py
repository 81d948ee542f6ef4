"""What a hook point on a GPU runs is compiled for GPUs, which the interpreter of the other tests does not tell."""

import os
import subprocess
import sys
from pathlib import Path


def test_what_a_hook_point_runs_compiles_for_gpus(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in compiled} == {"80", "90"}
    assert {line[1] for line in compiled} == {"_steer", "_encode", "_find"}
    assert all(int(line[2]) < 100_000 for line in compiled), "shared memory that any of these GPUs has"
