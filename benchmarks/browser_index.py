"""How fast does an index answer what a list of its latents asks for?

    python benchmarks/synthetic_index.py --latents 1000000 --out runs/index1m --small
    python benchmarks/browser_index.py --index runs/index1m
    python benchmarks/browser_index.py --index runs/index1m --repeats 50 --record

`import_s`, `open_ms`, `columns_ms` and `first_sort_ms` are what one waits for once, in a new process. Then, as p50 and
p95 of the repeats, in ms: `sort` all latents by a column, in turn; `filter` them by two columns and sort; `rank` of a
latent in an order; a `page` of 50 rows with their words and labels, anywhere in an order; `search` for 50 latents by a
word that is rare, one that is common, the beginning of many, and the one that a label of every latent has; one `latent`
whole, with its labels and the text of its contexts. `peak_mb` is the memory of the process, `load` that of the
machine in the last minute. The file is in the page cache, as far as it fits. Prints one JSON line; `--record` keeps it.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _results import device_name, record

PAGE, FOUND = 50, 50
WORDS = {"rare": 30_000, "common": 0, "many": 2}
"""place of a word in the vocabulary, from the most frequent one on; of the last only the first letter is asked for"""


def once(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives and the ms that it took."""
    start = time.perf_counter()
    result = work()
    return result, round(1e3 * (time.perf_counter() - start), 2)


def often(work: Callable[[], Any], repeats: int) -> list[float]:
    """p50 and p95 in ms."""
    times = [once(work)[1] for _ in range(repeats)]
    return np.quantile(times, [0.5, 0.95]).round(2).tolist()


def measure(path: Path, repeats: int) -> dict[str, Any]:
    """Time everything on the index at `path`."""
    start = time.perf_counter()
    from sae.index_db import FILE_NAME, FeatureIndex
    from sae.latent_query import LatentQuery, Range, order_of, rank_of

    imported = time.perf_counter() - start
    index, open_ms = once(lambda: FeatureIndex.open(path))
    columns, columns_ms = once(index.columns)
    order, first_ms = once(lambda: order_of(columns, LatentQuery("max_activation", descending=True)))
    rng, n = np.random.default_rng(0), index.info["d_sae"]
    words = {name: index.token_texts([place])[0].strip() for name, place in WORDS.items()}
    words |= {"many": words["many"][0], "every": "tokens"}

    def page() -> Any:
        first = int(rng.integers(max(n - PAGE, 1)))
        return index.rows_of(order[first : first + PAGE], ("top_logits", "label"))

    def latent() -> Any:
        row = index.latent(int(rng.integers(n)))
        texts = [index.token_texts(one.tokens) for one in (*row.contexts, *row.sampled, *row.near_misses)]
        return index.labels(row.latent), texts

    bounds = Range("density", 1e-4, 1e-2), Range("output_score", 0.5)
    filtered = LatentQuery("logit_entropy", ranges=bounds, live_only=True)
    names = iter(list(columns) * repeats)
    tasks: dict[str, Callable[[], Any]] = {
        "sort": lambda: order_of(columns, LatentQuery(next(names), descending=True)),
        "filter": lambda: order_of(columns, filtered),
        "rank": lambda: rank_of(order, int(rng.integers(n))),
        "page": page,
        **{f"search_{name}": lambda word=word: index.search(word, FOUND) for name, word in words.items()},
        "latent": latent,
    }
    return {
        "device": device_name("cpu"),
        "latents": n,
        "file_mb": round((path / FILE_NAME).stat().st_size / 1e6),
        "repeats": repeats,
        "load": round(os.getloadavg()[0], 1),
        "import_s": round(imported, 2),
        "open_ms": open_ms,
        "columns_ms": columns_ms,
        "first_sort_ms": first_ms,
        **{name: often(work, repeats) for name, work in tasks.items()},
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description="Time what a browser asks an index for.")
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    arguments = parser.parse_args()
    line = measure(arguments.index, arguments.repeats)
    if arguments.record:
        record("browser_index", line)
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
