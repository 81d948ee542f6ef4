"""A library for the tiny model, and an engine's view of both."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from steer.config import AddConfig
from steer.gates import Gate, probe
from steer.library import Library
from steer.library_edit import add
from steer.pack import About
from steer.vectors import SteeringVector
from steer.vllm.catalogue import Catalogue

NORM = 4.0


@pytest.fixture(scope="session")
def made(tiny: LoadedModel) -> Callable[..., SteeringVector]:
    """A random vector of the tiny model: name, layer, and whatever else a vector has."""

    def make(name: str, layer: int = 1, **changes: object) -> SteeringVector:
        drawn = np.random.default_rng(len(name) + layer).standard_normal(tiny.d_model).astype(np.float32)
        fields = {"coefficient": 2.0, **changes}
        direction = drawn / np.linalg.norm(drawn)
        return SteeringVector(
            name, direction, f"resid_post.{layer}", tiny.ref, NORM, {"kind": "combination"}, **fields  # type: ignore
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def library(tiny: LoadedModel, made: Callable[..., SteeringVector], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of every operation and scope that there is under vLLM, one of a scope that there is not, and an SAE."""
    folder = tmp_path_factory.mktemp("libraries") / "small"
    probing = made("read", 0)
    gate = Gate(probe(torch.from_numpy(probing.direction), 0.1, "resid_post.0"), 0.2, -0.2, 2, "probing")
    vectors = [
        made("plus"), made("out", operation="ablate", coefficient=1.0), made("turn", operation="rotate"),
        made("early", scope="prompt"), made("late", scope="generated"), made("some", scope="after:3 before:7"),
        made("gated", gate=gate), made("pair@resid_post.1"), made("pair@resid_post.2", 2),
        made("chat", scope="assistant"),
    ]  # fmt: skip
    Library(vectors={each.name: each for each in vectors}, about=About(name="small")).save(folder)
    put_sae(tiny, folder, "resid_post.1", "standard")
    return folder


def put_sae(model: LoadedModel, library: Path, hook_point: str, architecture: str, k: int | None = None) -> None:
    """A random SAE of 8 latents into a library."""
    rng, d, transcodes = np.random.default_rng(0), model.d_model, "->" in hook_point
    enc, dec = (rng.standard_normal(shape).astype(np.float32) / d**0.5 for shape in ((d, 8), (8, d)))
    zeros = [np.zeros(n, np.float32) for n in (8, d)]
    about = {"hook_point": hook_point, "model": model.ref.model_dump()}
    path = library.with_name(f"{library.name} sae")
    SaeArtefact(
        architecture, enc, zeros[0], dec, zeros[1], k=k, apply_b_dec_to_input=not transcodes, transcodes=transcodes,
        metadata=about,
    ).save(path)  # fmt: skip
    add(AddConfig(library=library, sae=path, embed=True))


@pytest.fixture(scope="session")
def apart(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Libraries of SAEs: `encoded`, a TopK SAE, and `across`, a transcoder."""
    folder = tmp_path_factory.mktemp("apart")
    for name in ("encoded", "across"):
        Library(vectors={}, about=About(name=name)).save(folder / name)
    put_sae(tiny, folder / "encoded", "resid_post.1", "topk", 3)
    put_sae(tiny, folder / "across", "resid_post.0->resid_post.1", "standard")
    return {name: folder / name for name in ("encoded", "across")}


@pytest.fixture(scope="session")
def catalogue(tiny: LoadedModel, library: Path) -> Catalogue:
    return Catalogue(tiny, [str(library)], 4)
