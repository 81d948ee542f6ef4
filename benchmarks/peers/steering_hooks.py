"""What steering-vectors and repeng cost per decoded token; run by `benchmarks/steering.py --peers`.

Takes the settings of `_decoding.Settings` as JSON and prints one JSON line: for `eager` and `compiled`, the model alone
and each peer with one vector at one block's output; a peer that is not installed, or that torch.compile or its CUDA
graphs will not take, has its reason instead. Needs torch, transformers, and those of the peers that are to be measured.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from _decoding import Decoder, Settings, compare, random_model, twin


def main() -> None:
    """Measure what is there."""
    out, sys.stdout = sys.stdout, sys.stderr  # the peers print
    settings = Settings(**json.loads(sys.argv[1]))
    name = "smollm2-random" if settings.model == "smollm2" else settings.model
    model = random_model(name, settings.seed)
    line: dict[str, Any] = {"torch": torch.__version__, "versions": versions()}
    for compiled in (False, True) if settings.compiled else (False,):
        figures: dict[str, Any] = {}
        for peer, attach in PEERS.items():
            try:
                figures |= one(model, peer, attach, settings, compiled=compiled)
            except Exception as error:
                text = str(error).strip().splitlines() or [""]
                figures[peer] = {"failed": f"{type(error).__name__}: {text[0][:200]}"}
            torch.compiler.reset()
        line["compiled" if compiled else "eager"] = figures
    out.write(json.dumps(line) + "\n")
    out.flush()


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def one(model: Any, peer: str, attach: Callable[..., Any], settings: Settings, *, compiled: bool) -> dict[str, Any]:
    """Figures of one peer, beside the model alone."""
    alone, other = twin(model), twin(model)
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(settings.seed))
    direction = (direction / direction.norm()).to(model.device, model.dtype)
    with attach(other, model.config.num_hidden_layers // 2, direction) as steered:
        decoders = {
            f"alone ({peer})": (Decoder(alone, settings, compiled=compiled), lambda: None),
            peer: (Decoder(steered, settings, compiled=compiled), lambda: None),
        }
        return compare(decoders, settings, compiled=compiled)


@contextmanager
def steering_vectors(model: Any, layer: int, direction: torch.Tensor) -> Iterator[Any]:
    """Its hook on the output of the block."""
    from steering_vectors import SteeringVector

    with SteeringVector(layer_activations={layer: direction}).apply(model, multiplier=2.0):
        yield model


@contextmanager
def repeng(model: Any, layer: int, direction: torch.Tensor) -> Iterator[Any]:
    """Its module around the block."""
    import numpy as np

    np.float_ = np.float64  # which repeng 0.4.0 asks for, and NumPy 2 no longer has
    from repeng import ControlModel, ControlVector

    control = ControlModel(model, [layer])
    vector = {layer: direction.float().cpu().numpy()}
    control.set_control(ControlVector(model_type="llama", directions=vector), 2.0)
    yield control


PEERS: dict[str, Callable[..., Any]] = {"steering-vectors": steering_vectors, "repeng": repeng}


if __name__ == "__main__":
    main()
