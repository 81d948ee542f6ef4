"""Which chunks, shards, codecs and dtypes suit an activation store?

    python benchmarks/store.py                     groups of 64 sequences of 128 tokens, d_model 576 (SmolLM2-135M)
    python benchmarks/store.py --case llama-1b     groups of 64 sequences of 1024 tokens, d_model 2048

Writes the same activations in each layout, one group at a time, and syncs each group to disk, as a harvest does; with
`overlap` the next group is written while one is synced. Then reads them as a trainer does, shard by shard, and as a
browser does, one random sequence at a time. Prints one JSON line with a row a layout; `--record` keeps it. Reads come
from the page cache: they compare decoding, not the disk.

Values are correlated normals with a few large components, like a residual stream, since random bits would make every
compressor look useless.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from _results import device_name, record
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from activations.store import ActivationStore
from activations.store_schema import ModelRef, StoreMeta, StoreState
from activations.store_schema import layout as layout_of
from activations.store_writer import Group, StoreWriter

ZARRS, PLAIN = "zarrs.ZarrsCodecPipeline", "zarr.core.codec_pipeline.BatchedCodecPipeline"
CASES = {"smollm2": (64, 128, 576), "llama-1b": (64, 1024, 2048)}


class Layout(NamedTuple):
    """One way to lay out a group."""

    chunk_kib: int = 1024
    shard_mib: int = 0
    """0: one shard a group; -1: no shards"""
    codec: str = "crc32c"
    dtype: str = "bfloat16"
    pipeline: str = ZARRS
    direct_io: bool = False
    overlap: bool = False


LAYOUTS = (
    Layout(),
    Layout(overlap=True),
    Layout(shard_mib=64),
    Layout(shard_mib=64, overlap=True),
    Layout(shard_mib=16, overlap=True),
    Layout(shard_mib=64, direct_io=True),
    Layout(shard_mib=64, direct_io=True, overlap=True),
    Layout(chunk_kib=256, shard_mib=64, overlap=True),
    Layout(chunk_kib=4096, shard_mib=64, overlap=True),
    Layout(shard_mib=-1),
    Layout(pipeline=PLAIN),
    Layout(codec="none", shard_mib=64, overlap=True),
    Layout(codec="zstd1", shard_mib=64, overlap=True),
    Layout(codec="shuffle+zstd1", shard_mib=64, overlap=True),
    Layout(codec="shuffle+lz4", shard_mib=64, overlap=True),
    Layout(dtype="int8", shard_mib=64, overlap=True),
    Layout(dtype="int8", codec="zstd1", shard_mib=64, overlap=True),
    Layout(dtype="float32", shard_mib=64, overlap=True),
)


def activations(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Float32 values that resemble a residual stream."""
    rng = np.random.default_rng(seed)
    rows, ctx, width = shape
    scales = np.exp(rng.normal(size=width) * 0.7).astype(np.float32)
    mean = (rng.normal(size=width) * 2 * scales).astype(np.float32)
    x = rng.standard_normal((rows, ctx, width), dtype=np.float32)
    x *= scales
    x += mean
    x[..., 7] *= 30
    return x


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """The values in their form on disk."""
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if dtype == "int8":
        scale = np.abs(x).max(axis=-1, keepdims=True) / 127
        return np.rint(x / scale).astype(np.int8)
    return x


def codecs(name: str) -> tuple[Any, ...]:
    """Codecs of a chunk."""
    return {
        "none": (),
        "crc32c": (Crc32cCodec(),),
        "zstd1": (ZstdCodec(level=1), Crc32cCodec()),
        "shuffle+zstd1": (BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=2), Crc32cCodec()),
        "shuffle+lz4": (BloscCodec(cname="lz4", clevel=1, shuffle="shuffle", typesize=2), Crc32cCodec()),
    }[name]


def divisor(rows: int, row_bytes: int, limit: int) -> int:
    """Most rows that divide the group and stay under a limit of bytes; at least one."""
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * row_bytes <= limit))


def measure(layout: Layout, group: np.ndarray, n_groups: int, folder: Path) -> dict[str, Any]:
    """Write, read, and count."""
    rows, ctx, width = group.shape
    row_bytes = ctx * width * group.itemsize
    chunk = divisor(rows, row_bytes, layout.chunk_kib << 10)
    shard = rows if layout.shard_mib == 0 else divisor(rows, row_bytes, layout.shard_mib << 20)
    shard = max(shard, chunk)
    settings = {"codec_pipeline.path": layout.pipeline, "codec_pipeline.direct_io": layout.direct_io}
    with zarr.config.set(settings):
        array = zarr.create_array(
            folder / "store",
            shape=(n_groups * rows, ctx, width),
            chunks=(chunk, ctx, width),
            shards=None if layout.shard_mib < 0 else (shard, ctx, width),
            dtype=group.dtype,
            compressors=codecs(layout.codec),
        )
        files_a_group = rows // (chunk if layout.shard_mib < 0 else shard)
        start = time.perf_counter()
        _write(array, group, n_groups, folder / "store", files_a_group, layout.overlap)
        write_s = time.perf_counter() - start
        start = time.perf_counter()
        for i in range(n_groups):
            np.asarray(array[i * rows : (i + 1) * rows])
        read_s = time.perf_counter() - start
        order = np.random.default_rng(0).integers(n_groups * rows, size=64)
        start = time.perf_counter()
        for i in order.tolist():
            np.asarray(array[i : i + 1])
        random_s = time.perf_counter() - start
    tokens = n_groups * rows * ctx
    size = sum(file.stat().st_size for file in (folder / "store").rglob("*") if file.is_file())
    return {
        **layout._asdict(),
        "pipeline": layout.pipeline.split(".")[0],
        "write_tok_s": round(tokens / write_s),
        "write_mb_s": round(tokens * width * group.itemsize / write_s / 1e6),
        "read_mb_s": round(tokens * width * group.itemsize / read_s / 1e6),
        "random_sequence_ms": round(1e3 * random_s / len(order), 2),
        "bytes_per_token": round(size / tokens, 1),
        "files_a_group": files_a_group,
    }


def measure_ours(group: np.ndarray, dtype: str, n_groups: int, folder: Path) -> dict[str, Any]:
    """The same through saekit's own writer, tokens, mask and commits included."""
    rows, ctx, width = group.shape
    meta = StoreMeta(
        model=ModelRef(id="m", fingerprint="f", n_layers=1, d_model=width), tokenizer_fingerprint="t", text="x",
        text_fingerprint="x", hook_points=("resid_post.0",), ctx=ctx, store_dtype=dtype, compute_dtype="float32",
        batch_tokens=1, commit_sequences=rows, outlier_norm=10.0,
    )  # fmt: skip
    ids, mask = np.zeros((rows, ctx), np.int32), np.ones((rows, ctx), bool)
    arrays = {"resid_post.0": group, "scale.resid_post.0": np.ones((rows, ctx), np.float32)}
    arrays = {name: arrays[name] for name in layout_of(meta) if name in arrays}
    start = time.perf_counter()
    with StoreWriter.open(folder / "store", meta) as writer:
        for _ in range(n_groups):
            writer.append(Group(ids, mask, ids[:, 0], arrays), StoreState(tokens=rows * ctx))
        write_s = time.perf_counter() - start
        writer.finish(complete=True)
    store = ActivationStore.open(folder / "store")
    start = time.perf_counter()
    for i in range(n_groups):
        store._read("resid_post.0", i * rows, (i + 1) * rows)
    read_s = time.perf_counter() - start
    order = np.random.default_rng(0).integers(n_groups * rows, size=64)
    start = time.perf_counter()
    for i in order.tolist():
        store._read("resid_post.0", i, i + 1)
    random_s = time.perf_counter() - start
    tokens, size = n_groups * rows * ctx, sum(store.storage.sizes().values())
    return {
        **Layout(dtype=dtype, shard_mib=16, pipeline="saekit's StoreWriter")._asdict(),
        "write_tok_s": round(tokens / write_s),
        "write_mb_s": round(tokens * width * group.itemsize / write_s / 1e6),
        "read_mb_s": round(tokens * width * group.itemsize / read_s / 1e6),
        "random_sequence_ms": round(1e3 * random_s / len(order), 2),
        "bytes_per_token": round(size / tokens, 1),
    }


def _write(array: zarr.Array, group: np.ndarray, n_groups: int, folder: Path, n_files: int, overlap: bool) -> None:
    rows = len(group)
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for i in range(n_groups):
            array[i * rows : (i + 1) * rows] = group
            files = [folder / "c" / str(number) / "0" / "0" for number in range(i * n_files, (i + 1) * n_files)]
            pending.append(pool.submit(_sync, files))
            while len(pending) > int(overlap):
                pending.popleft().result()
        while pending:
            pending.popleft().result()


def _sync(files: list[Path]) -> None:
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def main() -> None:
    """Measure every layout."""
    parser = argparse.ArgumentParser(description="Time layouts of the activation store.")
    parser.add_argument("--case", choices=CASES, default="smollm2")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="the median by write_tok_s is kept")
    parser.add_argument("--dir", help="where the arrays go meanwhile")
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    arguments = parser.parse_args()
    x = activations(CASES[arguments.case], 0)
    table = []
    for dtype in ("bfloat16", "int8"):
        runs = []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
                runs.append(measure_ours(stored(x, dtype), dtype, arguments.groups, Path(name)))
        table.append(sorted(runs, key=lambda run: run["write_tok_s"])[len(runs) // 2])
    for layout in LAYOUTS:
        group = stored(x, layout.dtype)
        runs = []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
                runs.append(measure(layout, group, arguments.groups, Path(name)))
                shutil.rmtree(Path(name) / "store")
        table.append(sorted(runs, key=lambda run: run["write_tok_s"])[len(runs) // 2])
    line = {"case": arguments.case, "device": device_name("cpu"), "groups": arguments.groups, "layouts": table}
    if arguments.record:
        record("store", line)
    print(json.dumps(line))  # noqa: T201


if __name__ == "__main__":
    main()
