"""What the peers' scripts that time a training step share; needs torch and numpy alone.

A script gets one JSON object as its argument, the fields of `_steps.Settings` and what it asks for besides, and prints
one JSON line. `benchmarks/` has to be on PYTHONPATH.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _steps import HIGHEST, LOWEST, NOISE, Settings, figures, measure, recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Step = Callable[[torch.Tensor], None]


def answer(make: Callable[[Settings, dict[str, Any]], tuple[Step, Callable[[], dict[str, Any]]]]) -> None:
    """Time what `make` returns, and print the line.

    Args:
      make: takes the settings and what is asked for besides; returns a step, and what tells of it once it was
        timed: `dtype`, `kernels`, `optimizer`, `dead_latents` and `versions`.
    """
    out, sys.stdout = sys.stdout, sys.stderr  # the peers print
    asked = json.loads(sys.argv[1])
    settings = Settings(**asked.pop("settings"))
    torch.manual_seed(settings.seed)
    batches = itertools.cycle(activations(settings))
    step, tell = make(settings, asked)
    timing = measure(lambda n: run(step, batches, n), settings)
    about = tell()
    if DEVICE.type == "cuda":
        about["peak_bytes"] = torch.cuda.max_memory_allocated()
    about["tf32"] = DEVICE.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    out.write(json.dumps({**figures(settings, timing), **about}) + "\n")
    out.flush()  # it is no longer sys.stdout, which Python flushes at the end


def run(step: Step, batches: Iterator[torch.Tensor], n: int) -> None:
    """Take n steps and wait for them."""
    for batch in itertools.islice(batches, n):
        step(batch)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def activations(settings: Settings) -> list[torch.Tensor]:
    """Batches on the device, as `_steps` describes them."""
    random = torch.Generator(DEVICE).manual_seed(settings.seed)
    rates, scale = recipe(settings)
    directions = torch.randn(settings.n_features, settings.d_model, generator=random, device=DEVICE)
    directions *= scale / directions.norm(dim=1, keepdim=True)
    fire_below = torch.from_numpy(rates).to(DEVICE)

    def batch() -> torch.Tensor:
        shape = settings.batch, settings.n_features
        fires = torch.rand(shape, generator=random, device=DEVICE) < fire_below
        magnitudes = LOWEST + (HIGHEST - LOWEST) * torch.rand(shape, generator=random, device=DEVICE)
        noise = torch.randn(settings.batch, settings.d_model, generator=random, device=DEVICE)
        return (fires * magnitudes) @ directions + NOISE * noise

    return [batch() for _ in range(settings.n_batches)]
