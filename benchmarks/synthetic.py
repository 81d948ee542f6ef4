"""Do SAEs find the features of data that is made of known ones?

    python benchmarks/synthetic.py                                            all sets, architectures and seeds
    python benchmarks/synthetic.py --set hierarchical --arch batchtopk,matryoshka --seeds 0,1,2 --tokens 1000000

1. Make activations x = mean + sum_i m_i d_i + noise of a set (`world`, `draw`): features i fire rarely, m_i > 0, and
have random unit directions d_i, more of them than dimensions. 2. Write them to a store, as a harvest would. 3. Train
with `sae.train` and its defaults, k at the true L0 and one latent a feature; seeds change the initial weights and the
order of the data, not the data. 4. Measure in the saved form, on tokens drawn anew. 5. Print one JSON line a run, and
one a set and architecture with the medians of its runs and the share of latents that they have in common.

plain: features fire independently of each other. correlated: they fire together more, or less, often than chance,
through a Gaussian copula of few factors. hierarchical: trees; a child fires only if its parent does, one child at most,
and parents fire alone too. An SAE can save a latent there by leaving the parent's off where the child's has taken over
its direction, which is absorption (Chanin et al. 2024, arXiv:2409.14507). Left out: speed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _matching import agreement, unit_rows
from _results import device_name, record
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment  # scipy comes with jax
from scipy.special import ndtri

from activations.store_schema import HookState, ModelRef, StoreMeta, StoreState
from activations.store_writer import Group, StoreWriter
from sae.artefact import SaeArtefact
from sae.config import TrainConfig
from sae.data import philox
from sae.jax_view import JaxSae
from sae.metrics import Evaluation
from sae.step import peak_lr
from sae.train import train

SETS = ("plain", "correlated", "hierarchical")
ARCHITECTURES = ("standard", "gated", "topk", "batchtopk", "jumprelu", "jumprelu_tanh", "matryoshka")
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"sae.architecture": name} for name in ARCHITECTURES},
    "batchtopk_orthogonal": {"sae.orthogonality": 0.25},
    "batchtopk_frozen_decoder": {"sae.frozen": "decoder"},
    "batchtopk_frozen_encoder": {"sae.frozen": "encoder"},
}
"""settings by the name that --arch takes; the last two are the baselines of arXiv:2602.14111"""

D_MODEL, N_FEATURES, TRUE_L0 = 64, 192, 6
N_FACTORS, SHARED = 6, 0.6
"""correlated: factors of the copula, and the share of its variance that they explain"""
CHILDREN, CHILD_FIRES = 3, 0.2
"""hierarchical: children a parent, and how often each fires when the parent does"""
SPREAD, NOISE, MEAN_NORM = 0.3, 0.02, 3.0
"""of the log of magnitudes; of noise in each dimension; norm of the mean"""

STORED, HELD_OUT, CTX, COMMIT = 262_144, 16_384, 64, 512
HOOK_POINT, NEVER = "resid_post.0", 10**9
LEARNABLE = 1000
"""firings in training that a feature must have to be asked for"""
FOUND, SAME = 0.9, 0.9
"""cosine from which a latent is a feature, and from which latents of two seeds are the same"""


class World(NamedTuple):
    """Known features and how they fire."""

    directions: Float[np.ndarray, "feature d_model"]
    """unit rows, random and so not orthogonal"""
    rates: Float[np.ndarray, " feature"]
    """share of tokens on which each fires"""
    mean: Float[np.ndarray, " d_model"]
    loadings: Float[np.ndarray, "feature factor"]
    """correlated: of the copula; 0 elsewhere"""
    parent: Int[np.ndarray, " feature"]
    """hierarchical: each feature's parent, or -1"""


class Tokens(NamedTuple):
    """Activations and what they are made of."""

    x: Float[np.ndarray, "token d_model"]
    fires: Bool[np.ndarray, "token feature"]


# --- data ------------------------------------------------------------------------------------------------------------


def world(name: str, seed: int = 0) -> World:
    """The features of a set.

    Rates fall as 1 / (rank + 10), which is Zipf's law without its few extremes, and add up to the true L0; among
    children they follow from the rates of their parents.
    """
    rng = philox(seed, 1)
    directions = rng.normal(size=(N_FEATURES, D_MODEL))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    mean = rng.normal(size=D_MODEL)
    mean *= MEAN_NORM / np.linalg.norm(mean)
    loadings, parent = np.zeros((N_FEATURES, N_FACTORS)), np.full(N_FEATURES, -1)
    if name == "correlated":
        loadings = rng.normal(size=loadings.shape)
        loadings *= np.sqrt(SHARED) / np.linalg.norm(loadings, axis=1, keepdims=True)
    if name != "hierarchical":
        return World(directions, zipf(N_FEATURES, TRUE_L0), mean, loadings, parent)
    n_parents = N_FEATURES // (1 + CHILDREN)
    parent[n_parents:] = np.repeat(np.arange(n_parents), CHILDREN)
    rates = zipf(n_parents, TRUE_L0 / (1 + CHILDREN * CHILD_FIRES))
    return World(directions, np.concatenate([rates, CHILD_FIRES * rates[parent[n_parents:]]]), mean, loadings, parent)


def zipf(n: int, total: float) -> Float[np.ndarray, " n"]:
    """Rates that fall as 1 / (rank + 10) and add up to `total`.

    >>> zipf(3, 1.0).round(3).tolist()
    [0.363, 0.332, 0.305]
    """
    rates = 1 / (np.arange(n) + 10)
    return rates * total / rates.sum()


def draw(world: World, n: int, seed: int) -> Tokens:
    """Draw `n` tokens."""
    rng = philox(seed, 2)
    factors = rng.normal(size=(n, N_FACTORS)) @ world.loadings.T
    own = np.sqrt(1 - (world.loadings**2).sum(axis=1))
    fires = factors + own * rng.normal(size=(n, N_FEATURES)) > ndtri(1 - world.rates)
    children = world.parent >= 0
    if children.any():
        first = int(children.argmax())
        which = rng.random((n, first)) // CHILD_FIRES  # 0, 1, .. CHILDREN - 1: that child; more: none
        number = np.arange(N_FEATURES - first) % CHILDREN
        fires[:, first:] = fires[:, world.parent[first:]] & (which[:, world.parent[first:]] == number)
    magnitudes = fires * rng.lognormal(0, SPREAD, fires.shape)
    x = magnitudes @ world.directions + world.mean + NOISE * rng.normal(size=(n, D_MODEL))
    return Tokens(x.astype(np.float32), fires)


def write_store(path: Path, x: Float[np.ndarray, "token d_model"]) -> None:
    """Write activations as a finished harvest whose sequences are documents of their own."""
    sequences = x.reshape(-1, CTX, x.shape[1])
    meta = StoreMeta(
        model=ModelRef(id="synthetic", fingerprint="synthetic", n_layers=1, d_model=x.shape[1]),
        tokenizer_fingerprint="synthetic", text="synthetic", text_fingerprint="synthetic", hook_points=(HOOK_POINT,),
        ctx=CTX, store_dtype="float32", compute_dtype="float32", batch_tokens=COMMIT * CTX, commit_sequences=COMMIT,
        outlier_norm=10.0,
    )  # fmt: skip
    with StoreWriter.open(path, meta) as writer:
        for start in range(0, len(sequences), COMMIT):
            part = sequences[start : start + COMMIT]
            used = part.reshape(-1, x.shape[1])
            counted = writer.state.hooks.get(HOOK_POINT) or HookState()
            counted = counted.add(np.linalg.norm(used, axis=1), used.sum(axis=0, dtype=np.float64))
            shape, documents = part.shape[:2], np.arange(start, start + len(part), dtype=np.int32)
            group = Group(np.zeros(shape, np.int32), np.ones(shape, bool), documents, {HOOK_POINT: part})
            writer.append(group, StoreState(hooks={HOOK_POINT: counted}, tokens=counted.n_tokens))
        writer.finish(complete=True)


# --- measures --------------------------------------------------------------------------------------------------------


def recovery(
    W_dec: Float[np.ndarray, "latent d_model"], directions: Float[np.ndarray, "feature d_model"]
) -> dict[str, float]:
    """How well decoder rows are features, by the cosines c_ij of feature i with latent j.

    mean_max_cosine = mean_i max_j c_ij; recovered = share of i whose max_j c_ij is at least 0.9; mcc = the largest
    mean_i c_i,s(i) over all ways s to give each feature a latent of its own.
    """
    cosines = cosines_of(directions, W_dec)
    best = cosines.max(axis=1)
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return {
        "mean_max_cosine": float(best.mean()),
        "recovered": float((best >= FOUND).mean()),
        "mcc": float(cosines[rows, columns].mean()),
    }


def absorption(
    W_dec: Float[np.ndarray, "latent d_model"],
    active: Bool[np.ndarray, "token latent"],
    fires: Bool[np.ndarray, "token feature"],
    known: World,
) -> dict[str, float | int]:
    """How often a parent's latent is off because a child fires.

    A parent's latent is the one whose decoder row is nearest to its direction, if their cosine is at least 0.9 and the
    latent is active on at least half of the tokens on which the parent fires and none of its children. Then, as means
    over the pairs of such a parent and a child:

        absorption = share of tokens on which both fire where the parent's latent is off
        missed_alone = share of tokens on which the parent fires alone where its latent is off, for comparison

    and pairs = the number of such pairs; without any, it is all that is returned.
    """
    cosines = cosines_of(known.directions, W_dec)
    together, alone = [], []
    for parent in np.unique(known.parent[known.parent >= 0]):
        children = np.flatnonzero(known.parent == parent)
        latent = int(cosines[parent].argmax())
        off = ~active[:, latent]
        missed = off[fires[:, parent] & ~fires[:, children].any(axis=1)].mean()
        if cosines[parent, latent] >= FOUND and missed <= 0.5:
            together += [off[fires[:, child]].mean() for child in children if fires[:, child].any()]
            alone += [missed] * (len(together) - len(alone))
    if not together:
        return {"pairs": 0}
    return {"absorption": float(np.mean(together)), "missed_alone": float(np.mean(alone)), "pairs": len(together)}


def cosines_of(
    directions: Float[np.ndarray, "feature d_model"], W_dec: Float[np.ndarray, "latent d_model"]
) -> Float[np.ndarray, "feature latent"]:
    """Cosines of unit directions with decoder rows of any norm."""
    return directions @ (W_dec / np.maximum(np.linalg.norm(W_dec, axis=1, keepdims=True), 1e-12)).T


# --- runs ------------------------------------------------------------------------------------------------------------


class Bench:
    """One set: its features, its store and its held-out tokens."""

    def __init__(self, name: str, folder: Path):
        self.name, self._folder, self._world = name, folder / name, world(name)
        stored = draw(self._world, STORED, seed=0)
        write_store(self._folder / "store", stored.x)
        self._mean = stored.x.mean(axis=0)
        self._firings = stored.fires.mean(axis=0)
        self._held_out = draw(self._world, HELD_OUT, seed=1)

    def run(self, arch: str, seed: int, tokens: int, settings: list[str]) -> tuple[dict[str, Any], np.ndarray]:
        """Train and measure one SAE; returns its line and the decoder rows of the latents that are alive."""
        out = self._folder / f"{arch}-{seed}"
        given = {
            "store": str(self._folder / "store"), "hook_points": [HOOK_POINT], "out": str(out),
            "sae.d_sae": N_FEATURES, "sae.k": TRUE_L0, "train_tokens": tokens, "seed": seed,
            "eval_every": NEVER, "checkpoint_every": NEVER, "log_every": NEVER, **VARIANTS[arch],
        }  # fmt: skip
        config = TrainConfig.load(overrides=[f"{key}={json.dumps(value)}" for key, value in given.items()] + settings)
        start = time.perf_counter()
        artefact = train(config).saes[HOOK_POINT].artefact
        seconds = time.perf_counter() - start
        active, figures = self._measure(artefact, tokens)
        line = {
            "set": self.name, "arch": arch, "seed": seed, "tokens": tokens, "batch": config.batch_size,
            "lr": round(peak_lr(config, artefact.d_sae), 5), "d_model": D_MODEL, "d_sae": artefact.d_sae,
            "features": N_FEATURES, "k": config.sae.k, "settings": settings, **figures, "train_s": round(seconds, 1),
        }  # fmt: skip
        return line, artefact.W_dec[active.any(axis=0)]

    def _measure(self, artefact: SaeArtefact, tokens: int) -> tuple[np.ndarray, dict[str, float | int]]:
        sae, (x, fires) = JaxSae(artefact), self._held_out
        latents = sae.encode(jnp.asarray(x))
        evaluation = Evaluation(self._mean, artefact.d_sae)
        evaluation.add(x, np.asarray(sae.reconstruct(jnp.asarray(x), latents)), np.asarray(latents))
        active = np.asarray(latents) > 0
        learnable = self._firings * tokens >= LEARNABLE
        figures: dict[str, float | int] = {
            "learnable": int(learnable.sum()),
            **recovery(artefact.W_dec, self._world.directions[learnable]),
            "fvu": evaluation.fvu, "l0": evaluation.l0, "true_l0": fires.sum(axis=1).mean(),
            "never_fired": evaluation.dead_fraction,
        }  # fmt: skip
        if self.name == "hierarchical":
            figures |= absorption(artefact.W_dec, active, fires, self._world)
        return active, {
            name: value if isinstance(value, int) else round(float(value), 5) for name, value in figures.items()
        }


def lines(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A line a run, and one a set and architecture."""
    for name in arguments.set:
        bench = Bench(name, folder)
        for arch in arguments.arch:
            runs, alive = [], []
            for seed in arguments.seeds:
                line, rows = bench.run(arch, seed, arguments.tokens, arguments.settings)
                runs.append(line)
                alive.append(unit_rows(rows))
                yield line
            numbers = {key for line in runs for key, value in line.items() if isinstance(value, float)} | {"pairs"}
            values = {key: [line[key] for line in runs if key in line] for key in numbers}
            medians = {key: round(statistics.median(given), 5) for key, given in values.items() if given}
            found = agreement(alive, SAME) if len(alive) > 1 else {}
            yield {**runs[0], "seed": None, "seeds": arguments.seeds, **medians, **found}


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of names with commas between them."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
        return names

    return parse


def main() -> None:
    """Train and measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Train SAEs on data whose true features are known.")
    parser.add_argument("--set", type=some_of(SETS), default=list(SETS), metavar="NAME,..")
    parser.add_argument("--arch", type=some_of(VARIANTS), default=list(VARIANTS), metavar="NAME,..")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to train on, counted in each epoch")
    parser.add_argument("--record", action="store_true", help="also append to results/<device>.csv")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="other settings of saekit train")
    arguments = parser.parse_args()
    device = device_name("cuda" if jax.default_backend() == "gpu" else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        # Runs that differ in their seed compile the same step.
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        for line in lines(arguments, Path(folder)):
            line["device"] = device
            if arguments.record:
                record("synthetic", line)
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
