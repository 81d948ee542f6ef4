"""Write a feature index of random latents, as large as asked for, for benchmarks and load tests of what reads one.

    python benchmarks/synthetic_index.py --latents 65536 --out runs/index64k
    python benchmarks/synthetic_index.py --latents 1000000 --out runs/index1m --small

Figures are drawn so that a row is as long as those of real indices: densities are log-normal, one latent in twenty was
never active, tokens are made-up words whose frequencies fall as 1 / (rank + 10), contexts are as many and as long as
the defaults of `saekit index` make them, or with `--small` six of 25 tokens, so that a million latents take a few GB.
Each latent has the two labels that `saekit label` gives without a language model, and one in ten an explanation.
Nothing of it means anything.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from activations.progress import Advance, progress
from sae.contexts import Context
from sae.index_db import FILE_NAME, LatentRow, write_index
from sae.labels.store import LabelStore, NewLabel
from sae.vocabulary import Vocabulary

SHA256, VOCABULARY, N_LOGITS, N_OTHERS = "5e" * 32, 49_152, 10, 8
CHUNK = 1000
"""latents drawn together"""
DEAD, EXPLAINED, N_TOKENS = 0.05, 0.1, 10_000_000
_SYLLABLES = [first + vowel for first, vowel in product("bcdfghjklmnprstvwz", "aeiou")]


class Size(NamedTuple):
    """Contexts of a latent."""

    n_top: int = 12
    n_sampled: int = 20
    n_near: int = 6
    before: int = 24
    after: int = 12


SMALL = Size(3, 2, 1, 16, 8)


def words() -> list[str]:
    """A word for each token, with a space in front; frequent ones are short."""
    spelled = (" " + "".join(parts) for n in (1, 2, 3) for parts in product(_SYLLABLES, repeat=n))
    return [word for word, _ in zip(spelled, range(VOCABULARY), strict=False)]


def write_synthetic_index(path: Path, n: int, size: Size = SMALL, seed: int = 0) -> None:
    """Write an index of `n` latents, with labels, into directory `path`."""
    known = words()
    info = {
        "d_sae": n, "hook_point": "resid_post.12", "sae_sha256": SHA256, "n_tokens": N_TOKENS, "sources": [],
        "model": {"id": "synthetic", "fingerprint": "synthetic", "n_layers": 24, "d_model": 2048},
    }  # fmt: skip
    vocabulary = Vocabulary.of(word.encode() for word in known)
    with progress("index", n, "latents") as advance:
        write_index(path, info, _counted(synthetic_rows(n, known, size, seed), advance), vocabulary)
    with LabelStore.open(path, SHA256) as store:
        store.add_labels(_labels(n, known, seed))


def synthetic_rows(n: int, known: list[str], size: Size, seed: int) -> Iterator[LatentRow]:
    """Random latents; the same ones for the same arguments."""
    rng = np.random.default_rng([seed, 0])
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        logits, drops = (_frequent(rng, (count, N_LOGITS)) for _ in range(2))
        rises = -np.sort(-rng.gamma(2, 0.4, (2, count, N_LOGITS)), axis=-1)
        others = rng.integers(n, size=(2, count, N_OTHERS))
        alike = -np.sort(-rng.beta(1, 5, (3, count, N_OTHERS)), axis=-1)
        density = np.where(rng.random(count) < DEAD, 0, np.minimum(rng.lognormal(-7, 1.5, count), 0.5))
        figures = rng.random((4, count))
        tables = [[column.round(4).tolist() for column in part] for part in (rises, alike, figures)]
        peaks = np.where(density > 0, rng.gamma(4, 3, count), 0)
        shape = np.exp(-0.5 * np.linspace(-2, 2, 24) ** 2) / 24
        histogram = rng.poisson(density[:, None] * N_TOKENS * shape).tolist()
        kinds = (size.n_top, peaks, 0.01), (size.n_sampled, peaks / 2, np.nan), (size.n_near, 0 * peaks, np.nan)
        top, sampled, near = (_contexts(rng, n_kept, size, height, cost) for n_kept, height, cost in kinds)
        for i in range(count):
            is_live = density[i] > 0
            yield LatentRow(
                latent=start + i,
                density=round(float(density[i]), 9),
                max_activation=float(peaks[i]),
                mean_activation=float(peaks[i]) * tables[2][0][i] / 2,
                histogram=histogram[i] if is_live else [],
                histogram_start=55,
                top_logits=_pairs([known[token] for token in logits[i]], tables[0][0][i]),
                bottom_logits=_pairs([known[token] for token in drops[i]], [-value for value in tables[0][1][i]]),
                neighbours=_pairs(others[0, i].tolist(), tables[1][0][i]),
                coactivations=list(zip(others[1, i].tolist(), tables[1][1][i], tables[1][2][i], strict=True)),
                logit_entropy=10 * tables[2][1][i],
                output_score=tables[2][2][i] if is_live else None,
                confidence_change=tables[2][3][i] - 0.5 if is_live else None,
                contexts=top[i] if is_live else [],
                sampled=sampled[i] if is_live else [],
                near_misses=near[i],
            )


def _frequent(rng: np.random.Generator, shape: tuple[int, ...]) -> Int[np.ndarray, "*shape"]:
    """Tokens with frequencies that fall as 1 / (rank + 10), by the inverse of the logarithm that their sums follow."""
    return (10 * (VOCABULARY / 10 + 1) ** rng.random(shape) - 10).astype(np.int32).clip(0, VOCABULARY - 1)


def _pairs(keys: list[Any], values: list[float]) -> list[tuple[Any, float]]:
    return list(zip(keys, values, strict=True))


def _contexts(
    rng: np.random.Generator, n: int, size: Size, peaks: Float[np.ndarray, " latent"], cost: float
) -> list[list[Context]]:
    """`n` contexts of each latent, whose ablation effect is about `cost`."""
    shape = len(peaks), n, size.before + 1 + size.after
    tokens, values = _frequent(rng, shape), np.zeros(shape, np.float32)
    scores = peaks[:, None] * (0.7 + 0.3 * rng.random(shape[:2]))
    values[..., size.before], values[..., size.before + 1] = scores, 0.3 * scores * (rng.random(shape[:2]) < 0.5)
    columns = rng.integers(1 << 20, size=shape[:2]), scores, cost * rng.normal(size=shape[:2])
    figures = [column.tolist() for column in columns]
    return [
        [
            Context(document, size.before, tokens[i, rank], values[i, rank], 0, score, effect)
            for rank, (document, score, effect) in enumerate(zip(*(column[i] for column in figures), strict=True))
        ]
        for i in range(len(peaks))
    ]


def _labels(n: int, known: list[str], seed: int) -> Iterator[NewLabel]:
    rng = np.random.default_rng([seed, 1])
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        named, is_explained = _frequent(rng, (count, 3, 8)).tolist(), rng.random(count) < EXPLAINED
        for i, parts in enumerate(named):
            on, raises, about = (",".join(known[token] for token in part) for part in parts)
            yield NewLabel(start + i, "tokens", f"tokens{on}", "saekit")
            yield NewLabel(start + i, "logits", f"raises{raises}", "saekit")
            if is_explained[i]:
                yield NewLabel(start + i, "explanation", f"text about{about}", "synthetic")


def _counted(rows: Iterator[LatentRow], advance: Advance) -> Iterator[LatentRow]:
    for row in rows:
        yield row
        advance(1)


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description="Write a feature index of random latents.")
    parser.add_argument("--latents", type=int, default=65_536)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="six short contexts a latent")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    size = SMALL if arguments.small else Size()
    write_synthetic_index(arguments.out, arguments.latents, size, arguments.seed)
    seconds, n_bytes = time.perf_counter() - start, (arguments.out / FILE_NAME).stat().st_size
    line = {"latents": arguments.latents, "write_s": round(seconds, 1), "file_mb": round(n_bytes / 1e6)}
    print(json.dumps(line))  # noqa: T201


if __name__ == "__main__":
    main()
