"""Fuzz every reader of untrusted bytes, guided by coverage: python tests/fuzz/fuzz_readers.py --seconds 600

It needs atheris beside saekit and its test requirements (pip install atheris). Flow: 1. each reader gets a process of
its own and its share of the time; 2. there the modules of saekit and gguf are instrumented while they are imported; 3.
libFuzzer damages the files that the reader accepts, in JSON by places and else by bytes; 4. a JSON line a reader says
how many inputs were tried, and how many were accepted. Whatever is not accepted or one SaekitError, takes more than 512
MiB beyond what the imports take, or 20 s, ends the reader: its input is kept in --keep, and the exit status is 1. With
--reader and --input, one such input is read again, with its traceback.
"""

import argparse
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
INSTRUMENTED = ["steer", "sae", "activations", "gguf"]
MORE_BYTES = 512 << 20
LONGEST = 1 << 16
"""bytes of an input"""
EVERY = 500
"""inputs between two looks at what was found"""


def main() -> int:
    """All readers, or one of them."""
    asked = _arguments().parse_args()
    sys.path.insert(0, str(ROOT))
    if asked.reader and asked.input:
        return _again(asked.reader, asked.input)
    if asked.inside:
        _fuzz(asked.reader, asked.inside, asked.seconds)
    from tests.fuzz.readers import readers

    names = [asked.reader] if asked.reader else list(readers())
    asked.keep.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        row = _tried(name, max(1, asked.seconds // len(names)), asked.keep)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        failed += row["failed"]
    return 1 if failed else 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600, help="for all readers together")
    parser.add_argument("--reader", help="one of them alone")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for inputs that fail")
    parser.add_argument("--input", type=Path, help="read this file once")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser


def _tried(name: str, seconds: int, keep: Path) -> dict[str, Any]:
    """Fuzz one reader in a process of its own."""
    slug = name.replace(" ", "-")
    with tempfile.TemporaryDirectory(prefix="saekit-", dir=_in_memory()) as folder:
        command = [sys.executable, "-W", "ignore", __file__, "--reader", name, "--seconds", str(seconds)]
        ran = subprocess.run([*command, "--inside", folder], capture_output=True, text=True, errors="replace")
        file = Path(folder) / "told.json"
        told = json.loads(file.read_text()) if file.exists() else {}
        for path in Path(folder).iterdir():
            if path.name.startswith(("crash-", "timeout-", "oom-")):
                (keep / f"{slug}-{path.name}").write_bytes(path.read_bytes())
    done = re.search(r"Done (\d+) runs in (\d+) second", ran.stderr)
    edges = re.findall(r"cov: (\d+)", ran.stderr)
    if ran.returncode:
        (keep / f"{slug}.log").write_text(ran.stdout + ran.stderr)
    return {
        "reader": name,
        "inputs": int(done[1]) if done else told.get("inputs"),
        "accepted": told.get("accepted"),
        "seconds": int(done[2]) if done else seconds,
        "edges": int(edges[-1]) if edges else 0,
        "more_mib": told.get("more_mib"),
        "failed": bool(ran.returncode),
    }


def _fuzz(name: str, folder: Path, seconds: int) -> None:
    """Never returns: libFuzzer ends the process."""
    atheris: Any = importlib.import_module("atheris")  # not one of the project's own requirements
    import torch  # noqa: F401 (its import is not to be instrumented)
    import transformers  # noqa: F401

    with atheris.instrument_imports(include=INSTRUMENTED):
        import gguf  # noqa: F401 (else it is imported when the first file is read)

        from tests.fuzz.readers import accepts, damaged, readers
    reader = readers()[name]
    place, seeds = folder / "place", folder / "seeds"
    place.mkdir()
    seeds.mkdir()
    for number, seed in enumerate(reader.seeds):
        (seeds / str(number)).write_bytes(seed)
        accepts(reader, place, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {"inputs": 0, "accepted": 0, "more_mib": 0.0}

    def one(content: bytes) -> None:
        told["inputs"] += 1
        told["accepted"] += accepts(reader, place, content)
        if told["inputs"] % EVERY == 0:
            told["more_mib"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)
            (folder / "told.new").write_text(json.dumps(told))
            (folder / "told.new").replace(folder / "told.json")

    def mutated(content: bytes, most: int, seed: int) -> bytes:
        if seed % 3 == 0 or not content:
            return atheris.Mutate(content, most)
        return damaged(content, reader.kind, Random(seed))[:most]

    limits = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=20", "-rss_limit_mb=8192"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/", str(seeds)], one, custom_mutator=mutated)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, used + MORE_BYTES))
    atheris.Fuzz()


def _again(name: str, file: Path) -> int:
    from tests.fuzz.readers import accepts, readers

    with tempfile.TemporaryDirectory(prefix="saekit-") as folder:
        said = "accepted" if accepts(readers()[name], Path(folder), file.read_bytes()) else "refused"
    sys.stdout.write(said + "\n")
    return 0


def _in_memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())
