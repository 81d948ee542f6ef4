"""What it costs to take a step in several processes rather than in one: the same devices, the same steps.

    python benchmarks/hosts.py                    # 1 process of 2 CPU devices, 2 processes of 1, and 1 of 1
    python benchmarks/hosts.py --rounds 5 --set sae.d_sae=4096

1. Write a store of random activations. 2. In rounds, so that other work on the machine meets all alike, train with
each split, in new processes, once over the store. 3. Print the medians of steps a second, without the first step, and
the share of the activations that a process has read at most (`read`, by what the kernel counted), as a JSON line and a
row of results. On one machine, so without a network: what a network adds is in docs/scaling-train.md.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _results import device_name, record
from feed import write_store
from train_step import HOOK_POINT

from sae.config import TrainConfig
from sae.log import read_log

SPLITS = {"1x1": (1, 1), "1x2": (1, 2), "2x1": (2, 1)}
"""processes and devices of each"""
TRAIN = """
import sys, sae.train
from steer.cli import main
def n_read(): return int(open("/proc/self/io").readline().split()[1])
before, sys.argv[0] = n_read(), "saekit"
try: main()
finally: sys.stderr.write(f"\\nread {n_read() - before}\\n")
"""


def measure(folder: Path, settings: list[str], n_processes: int, n_devices: int) -> tuple[float, int]:
    """Steps a second of one run, and the bytes that a process read at most."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out = Path(tempfile.mkdtemp(dir=folder))
    several = [f"compute.data_parallel={n_processes * n_devices}", f"out={out}"]
    sets = [word for setting in (*settings, *several) for word in ("--set", setting)]
    flags = f"--xla_force_host_platform_device_count={n_devices}"
    common = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": str(n_processes)}
    common |= {"JAX_COORDINATOR_ADDRESS": address}
    command = [sys.executable, "-c", TRAIN, "train", *sets]
    processes = [
        subprocess.Popen(
            command, env=common | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for i in range(n_processes)
    ]
    said = [process.communicate()[1].decode(errors="replace") for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(said))
    last = read_log(out / "train.jsonl")[-1]
    n_read = max(int(line.split()[1]) for text in said for line in text.splitlines() if line.startswith("read "))
    return last["tok_s"] / TrainConfig.load(out / "config.yaml", []).batch_size, n_read


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--set", action="append", default=[], help="other settings of the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "store", args.d_model, round(1.2 * args.steps * args.batch_size))
        far = args.steps + 1
        settings = [f"store={folder / 'store'}", f"hook_points=[{HOOK_POINT}]", f"batch_size={args.batch_size}"]
        settings += [f"train_tokens={args.steps * args.batch_size}", f"eval_every={far}", f"checkpoint_every={far}"]
        settings += ["eval_tokens=64", "sae.d_sae=2048", "memory_mb=16", *args.set]
        trained = args.steps * args.batch_size * args.d_model * 2
        speeds: dict[str, list[float]] = {split: [] for split in SPLITS}
        read = {}
        for _ in range(args.rounds):
            for split, (n_processes, n_devices) in SPLITS.items():
                speed, n_read = measure(folder, settings, n_processes, n_devices)
                speeds[split].append(speed)
                read[f"read_{split}"] = round(n_read / trained, 3)
    medians = {f"steps_s_{split}": round(statistics.median(values), 3) for split, values in speeds.items()}
    spread = {f"range_{split}": f"{min(values):.2f}-{max(values):.2f}" for split, values in speeds.items()}
    common = {"device": device_name("cpu"), "rounds": args.rounds, "steps": args.steps, "settings": args.set}
    line = {**common, "d_model": args.d_model, "batch_size": args.batch_size, **medians, **spread, **read}
    sys.stdout.write(json.dumps(line) + "\n")
    record("hosts", line)


if __name__ == "__main__":
    main()
