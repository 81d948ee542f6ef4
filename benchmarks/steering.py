"""What does steering cost, per decoded token?

    python benchmarks/steering.py                        random weights of Llama-3.2-1B's shape, on a GPU if it has one
    python benchmarks/steering.py --model smollm2        the embedded model, on the CPU unless there is a GPU
    python benchmarks/steering.py --eager-only           without compiling, which takes minutes on a CPU
    python benchmarks/steering.py --peers                also steering-vectors and repeng, in the same way
    python benchmarks/steering.py --record               also appends the lines to results/<device>.csv

Variants, all at one hook point in the middle of the model (`_decoding.py` says how they are timed and compared):

    alone    the model without saekit
    idle     inside `steering` with nothing to steer
    one      one vector, added to every sequence
    rows     another vector at another coefficient for each sequence of the batch
    gate     one direction, ablated while a gate with hysteresis two blocks earlier is open
    mixed    sequences that are added to, ablated, clamped, rotated and gated, in one batch

`idle`, `one` and `rows` are the contents of one table, `gate` and `mixed` of another; no change compiles anything.
Prints one JSON line a batch size: `compiled` is with a static cache, torch.compile(fullgraph=True) and, on a GPU, CUDA
graphs; `eager` is plain Python, where launches bound a GPU. `graphs` counts what was compiled for all variants (one a
module, three), `agrees` is the largest difference between the logits of compiled and eager decoding with `mixed`, in
units of the largest logit, and `set_us` what a change of all rows takes. Peers run in an environment of their own
(STEERING_PEERS_PYTHON; else .venv-steering; else this one), against the model alone there. Sections that would start
after --budget-s are left out. Left out: prefill, and text (`steer.measures.effect`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from _decoding import SHAPES, Decoder, Settings, Turn, compare, load, twin
from _results import device_name, record

from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.gates import Gate, cosine
from steer.operations import Ablate, Add, Clamp, Intervention, Rotate
from steer.runtime import Steering, steering

ROOT = Path(__file__).resolve().parent
PEERS_S = 240
"""seconds that the peers may take"""


class Contents:
    """What each variant steers with: lists of interventions, one a sequence."""

    def __init__(self, loaded: LoadedModel, settings: Settings):
        """Draw the directions."""
        middle = loaded.n_layers // 2
        point, n = HookPoint("resid_post", middle), settings.batch
        generator = torch.Generator().manual_seed(settings.seed)
        drawn = torch.randn(n + 2, loaded.d_model, generator=generator)
        read, one, *others = drawn / drawn.norm(dim=1, keepdim=True)
        gate = Gate(cosine(read, f"resid_post.{max(middle - 2, 0)}"), 0.0, -0.01, 2)
        self.one = [[Intervention(Add(one, 2.0), point)]] * n
        self.rows = [[Intervention(Add(v, 1.0 + i), point)] for i, v in enumerate(others)]
        self.gate = [[Intervention(Ablate(one), point, gate=gate)]] * n
        operations = [lambda v: Add(v, 2.0), Ablate, lambda v: Clamp(v, 3.0, 3.0), lambda v: Rotate(v, 4.0)]
        self.mixed = [
            [Intervention(operations[i % 4](v), point, gate=gate if i % 3 == 0 else None)] for i, v in enumerate(others)
        ]
        self.any = [Intervention(operation(one), point, gate=gate) for operation in operations]


def variants(loaded: LoadedModel, settings: Settings, stack: ExitStack, *, compiled: bool) -> dict[str, Turn]:
    """A decoder for each variant; those that share a table share a decoder."""
    contents = Contents(loaded, settings)
    modules = [twin(loaded.model) for _ in range(3)]
    steered = [
        stack.enter_context(steering(replace(loaded, model=module), rows=[[]] * settings.batch, reserve=reserve))
        for module, reserve in zip(modules[1:], (contents.one[0], contents.any), strict=True)
    ]
    alone, table, full = (Decoder(module, settings, compiled=compiled) for module in modules)

    def with_rows(which: Steering, rows: list[list[Intervention]]) -> Callable[[], None]:
        return lambda: which.set(rows=rows)

    adds, every = steered
    return {
        "alone": (alone, lambda: None),
        "idle": (table, with_rows(adds, [[]] * settings.batch)),
        "one": (table, with_rows(adds, contents.one)),
        "rows": (table, with_rows(adds, contents.rows)),
        "gate": (full, with_rows(every, contents.gate)),
        "mixed": (full, with_rows(every, contents.mixed)),
    }


def measure(loaded: LoadedModel, settings: Settings, late: Callable[[], bool]) -> dict[str, Any]:
    """The line of one batch size."""
    line: dict[str, Any] = {}
    ends: dict[bool, torch.Tensor] = {}
    for compiled in (False, True) if settings.compiled else (False,):
        if late():
            break
        with ExitStack() as stack:
            decoders = variants(loaded, settings, stack, compiled=compiled)
            before, start = _graphs(), time.perf_counter()
            line["compiled" if compiled else "eager"] = compare(decoders, settings, compiled=compiled)
            if compiled:
                line |= {"graphs": _graphs() - before, "compiled_s": round(time.perf_counter() - start, 1)}
            decoder, prepare = decoders["mixed"]
            prepare()
            ends[compiled] = decoder.turn(4, given=True)
            line["set_us"] = _set_us(decoders["rows"][1])
        torch.compiler.reset()
    if len(ends) == 2:
        line["agrees"] = round(float((ends[True] - ends[False]).abs().max() / ends[False].abs().max()), 5)
    return line


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _set_us(prepare: Callable[[], None]) -> float:
    times = []
    for _ in range(20):
        start = time.perf_counter()
        prepare()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e6, 1)


def peers(settings: Settings) -> dict[str, Any]:
    """The same of other projects' hooks."""
    local = ROOT.parent / ".venv-steering" / "bin" / "python"
    python = os.environ.get("STEERING_PEERS_PYTHON", str(local) if local.exists() else sys.executable)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [python, str(ROOT / "peers" / "steering_hooks.py"), json.dumps(settings._asdict())]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PEERS_S, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer in {PEERS_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}
    return json.loads(lines[-1])


def lines(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One a batch size."""
    start = time.perf_counter()
    is_cuda = torch.cuda.is_available()

    def late() -> bool:
        return time.perf_counter() - start > arguments.budget_s

    about = {
        "model": arguments.model,
        "dtype": "bfloat16" if is_cuda else "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device_name("cuda" if is_cuda else "cpu"),
    }
    loaded = load(arguments.model, 0)
    for batch in arguments.batch:
        settings = Settings(
            model=arguments.model,
            batch=batch,
            cache=arguments.cache,
            tokens=arguments.tokens,
            eager_tokens=arguments.eager_tokens,
            rounds=arguments.rounds,
            compiled=not arguments.eager_only,
        )
        asked = {key: value for key, value in settings._asdict().items() if key != "compiled"}
        line = {**about, **asked, **measure(loaded, settings, late)}
        if arguments.peers and not late():
            line["peers"] = peers(settings)
        yield line


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SHAPES, "smollm2"], default="llama-1b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--cache", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="a turn of a compiled model")
    parser.add_argument("--eager-tokens", type=int, default=16, help="a turn of an eager one")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--budget-s", type=float, default=240)
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    for line in lines(arguments):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        if arguments.record:
            record("steering", line)


if __name__ == "__main__":
    main()
