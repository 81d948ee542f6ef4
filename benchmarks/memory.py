"""Does a harvest's memory stay flat from 10^5 to 10^7 tokens?

    python benchmarks/memory.py [--tokens 10000000]

Harvests the embedded corpus, over and over, with a tiny random model, so that a run of 10^7 tokens takes minutes, and
reads the resident memory of the process at each power of ten and half-way between. Prints one JSON line; `--record`
keeps it. `growth_mb` is from 10^5 tokens to the end.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

from _results import device_name, record
from harvest import random_model, write_text
from transformers import LlamaConfig

from activations.config import HarvestConfig
from activations.errors import ArtefactError
from activations.harvest import harvest
from activations.store import ActivationStore

MARKS = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)


def resident_mb() -> float:
    """Memory of this process that is not shared files: the pages of a finished write are the kernel's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def watch(store: Path, readings: dict[int, float], ended: threading.Event) -> None:
    """Note the memory whenever another mark is passed."""
    while not ended.wait(0.2):
        try:
            tokens = ActivationStore.open(store).state.tokens
        except (ArtefactError, OSError):
            continue
        for mark in MARKS:
            if tokens >= mark and mark not in readings:
                readings[mark] = round(resident_mb(), 1)


def main() -> None:
    """Harvest and watch."""
    parser = argparse.ArgumentParser(description="Watch the memory of a long harvest.")
    parser.add_argument("--tokens", type=int, default=MARKS[-1])
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    arguments = parser.parse_args()
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    loaded = random_model("tiny", shape, "cpu", "float32")
    readings: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.jsonl", arguments.tokens)
        config = HarvestConfig(
            text=str(folder / "text.jsonl"),
            hook_points=("resid_post.0",),
            out=str(folder / "store"),
            max_tokens=arguments.tokens,
        )
        ended = threading.Event()
        watcher = threading.Thread(target=watch, args=(folder / "store", readings, ended))
        watcher.start()
        start = time.perf_counter()
        result = harvest(config, loaded)
        seconds = time.perf_counter() - start
        ended.set()
        watcher.join()
    readings[result.n_tokens] = round(resident_mb(), 1)
    line = {
        "device": device_name("cpu"),
        "tokens": result.n_tokens,
        "seconds": round(seconds, 1),
        "resident_mb": readings,
        "growth_mb": round(readings[result.n_tokens] - readings[MARKS[0]], 1),
    }
    if arguments.record:
        record("memory", line)
    print(json.dumps(line))  # noqa: T201


if __name__ == "__main__":
    main()
