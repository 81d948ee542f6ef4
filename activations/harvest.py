"""From text to an activation store.

Flow:
1. load the model and the text; pack documents into sequences of `ctx` tokens, one document a sequence;
2. take the sequences in groups of `commit_sequences`; inside a group run batches of similar length through the model,
   up to the last hook point and no further;
3. mask what an SAE should not learn from: padding, special tokens, and tokens whose norm is above `outlier_norm`
   times the median norm of the first group (attention sinks, mostly);
4. hand the group to a writer thread, which commits it while the next group is computed.

A group's content depends only on the settings and on its place in the text, so a run that was stopped anywhere goes on
with the next group and ends with the same store. Left out: several processes writing one store.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from activations.config import HarvestConfig
from activations.errors import DiskSpaceError, InterruptedRunError, NumericsError, TextError
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel, Status, load_model
from activations.progress import progress
from activations.store import Group, HookState, StoreMeta, StoreState, StoreWriter, to_float32
from activations.text import documents, text_fingerprint
from activations.tokens import TokenSequence, pack

_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class HarvestResult(NamedTuple):
    """What a harvest did."""

    path: Path
    """the store"""
    n_sequences: int
    """sequences in the store"""
    n_tokens: int
    """unmasked tokens in the store"""
    new_tokens: int
    """attended tokens that this run sent through the model"""
    seconds: float
    """wall time of this run's forward passes and writing"""

    @property
    def tok_s(self) -> float:
        """Attended tokens a second in this run."""
        return self.new_tokens / max(self.seconds, 1e-9)


class HarvestPlan(NamedTuple):
    """What a harvest would do, known before it starts."""

    max_tokens: int
    """unmasked tokens it stops at"""
    bytes_needed: int
    """upper estimate of the bytes it writes"""
    bytes_free: int
    """bytes free where the store goes"""


def plan(config: HarvestConfig, d_model: int) -> HarvestPlan:
    """Estimate the disk a harvest needs and compare it with what is free.

    Raises: DiskSpaceError if it cannot fit.
    """
    itemsize = 4 if config.store_dtype == "float32" else 2
    # Masked and padded positions are stored too; a tenth on top covers them and the token arrays.
    needed = int(1.1 * config.max_tokens * (itemsize * d_model * len(config.hook_points) + 6))
    parent = next(path for path in (config.out, *config.out.absolute().parents) if path.exists())
    written = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    free = shutil.disk_usage(parent).free
    if needed - written > free:
        raise DiskSpaceError(
            config.out,
            expected=f"{needed / 1e9:.1f} GB of room for {config.max_tokens:,} tokens",
            got=f"{free / 1e9:.1f} GB free",
            fix="Lower max_tokens or choose another out.",
        )
    return HarvestPlan(config.max_tokens, needed, free)


def find_hook_points(config: HarvestConfig, loaded: LoadedModel) -> list[HookPoint]:
    """The hook points of a config; raises HookPointError if the model does not have one."""
    return [HookPoint.parse(name).check(loaded.n_layers) for name in config.hook_points]


def measure_speed(config: HarvestConfig, loaded: LoadedModel, seconds: float = 3.0) -> float:
    """Tokens a second that a harvest of full sequences would make, from a few forward passes after a first one."""
    points = find_hook_points(config, loaded)
    shape = (max(1, config.batch_tokens // config.ctx), config.ctx)
    vocabulary = int(loaded.model.config.vocab_size)
    tokens = np.random.default_rng(0).integers(vocabulary, size=shape, dtype=np.int32)
    attend = np.ones(shape, bool)
    _forward(config, loaded, points, tokens, attend)
    start, n_passes = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        _forward(config, loaded, points, tokens, attend)
        n_passes += 1
    return n_passes * tokens.size / (time.perf_counter() - start)


def harvest(
    config: HarvestConfig, loaded: LoadedModel | None = None, *, on_status: Status | None = None
) -> HarvestResult:
    """Harvest `config.text` into the store at `config.out`; goes on where an earlier run stopped.

    Args:
      loaded: the model, if the caller has it already; must be what `config.model` names.
      on_status: told in one line what takes long before the first token.
    Raises: InterruptedRunError on Ctrl-C, after the commit in flight; NumericsError for NaN or infinity; TextError if
      the text has no tokens; MismatchError if the store was made with other settings.
    """
    loaded = loaded or load_model(config.model, device=config.device, dtype=config.compute_dtype, on_status=on_status)
    points = find_hook_points(config, loaded)
    plan(config, loaded.d_model)
    with StoreWriter.open(config.out, _meta(config, loaded)) as writer:
        config.save(config.out / "harvest.yaml")
        state = writer.state
        sequences = islice(pack(documents(config.text), loaded.tokenizer, config.ctx), state.committed, None)
        start = time.perf_counter()
        new_tokens, exhausted = _harvest_groups(config, loaded, points, sequences, writer)
        seconds = time.perf_counter() - start
        if writer.state.committed == 0:
            raise TextError(config.text, expected="some text", got="no tokens", fix="Choose a text that is not empty.")
        writer.finish(complete=exhausted or writer.state.tokens >= config.max_tokens)
        return HarvestResult(config.out, writer.state.committed, writer.state.tokens, new_tokens, seconds)


def _harvest_groups(
    config: HarvestConfig,
    loaded: LoadedModel,
    points: Sequence[HookPoint],
    sequences: Iterator[TokenSequence],
    writer: StoreWriter,
) -> tuple[int, bool]:
    """Compute and commit groups up to the token budget; returns (attended tokens, whether the text ended)."""
    state, new_tokens = writer.state, 0
    pending: Future[None] | None = None
    done = min(state.tokens, config.max_tokens)
    with ThreadPoolExecutor(1) as pool, progress("harvest", config.max_tokens - done, "tok") as advance:
        try:
            while state.tokens < config.max_tokens:
                rows = list(islice(sequences, config.commit_sequences))
                if not rows:
                    return new_tokens, True
                group, after = _compute_group(config, loaded, points, rows, state)
                if pending:
                    pending.result()
                pending = pool.submit(writer.append, group, after)
                advance(after.tokens - state.tokens)
                new_tokens += sum(int(row.attend.sum()) for row in rows)
                state = after
            return new_tokens, False
        except KeyboardInterrupt:
            pool.shutdown(wait=True)
            raise InterruptedRunError(
                config.out,
                expected="to run to the end",
                got=f"Ctrl-C; {writer.state.tokens:,} tokens are committed",
                fix="Run the same command again to go on from there.",
            ) from None
        finally:
            if pending and not pending.cancelled():
                pending.result()


def _compute_group(
    config: HarvestConfig,
    loaded: LoadedModel,
    points: Sequence[HookPoint],
    rows: Sequence[TokenSequence],
    state: StoreState,
) -> tuple[Group, StoreState]:
    """Run one group through the model and mask it; returns it with the state that its commit leads to."""
    tokens = np.stack([row.tokens for row in rows])
    attend = np.stack([row.attend for row in rows])
    special = np.stack([row.special for row in rows]) & attend
    documents_ = np.array([row.document for row in rows], dtype=np.int32)
    stored = _forward(config, loaded, points, tokens, attend)
    wide = {name: to_float32(values) for name, values in stored.items()}
    _check_finite(config, wide, attend, documents_)
    norms = {name: np.sqrt(np.einsum("scd,scd->sc", x, x)) for name, x in wide.items()}
    hooks = {name: state.hooks.get(name) or _first_state(config, norms[name][attend & ~special]) for name in wide}
    outlier = np.any([norms[name] > hooks[name].outlier_limit for name in wide], axis=0) & attend & ~special
    mask = attend & ~special & ~outlier
    masked = {"padding": ~attend, "special": special, "norm_outlier": outlier}
    after = state.model_copy(
        update={
            "tokens": state.tokens + int(mask.sum()),
            "masked": {reason: state.masked.get(reason, 0) + int(m.sum()) for reason, m in masked.items()},
            "hooks": {name: hooks[name].add(x[mask]) for name, x in wide.items()},
        }
    )
    return Group(tokens, mask, documents_, stored), after


def _first_state(config: HarvestConfig, norms: np.ndarray) -> HookState:
    median = float(np.median(norms)) if norms.size else 1.0
    return HookState(outlier_limit=config.outlier_norm * median)


def _forward(
    config: HarvestConfig,
    loaded: LoadedModel,
    points: Sequence[HookPoint],
    tokens: np.ndarray,
    attend: Bool[np.ndarray, "seq ctx"],
) -> dict[str, np.ndarray]:
    """Activations of a group in the stored representation, zero where nothing is attended."""
    dtype = _TORCH_DTYPES[config.store_dtype]
    shape = (*tokens.shape, loaded.d_model)
    out = {str(point): torch.zeros(shape, dtype=dtype) for point in points}
    lengths = attend.sum(axis=1)
    order = np.argsort(-lengths, kind="stable")
    rows = max(1, config.batch_tokens // tokens.shape[1])
    with capture(loaded.model, loaded.family, points, stop_after_last=True) as captured:
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            width = int(lengths[batch[0]])
            keep = torch.from_numpy(attend[batch, :width])
            inputs = {"input_ids": torch.from_numpy(tokens[batch, :width]).long(), "attention_mask": keep.long()}
            run_until(loaded.model, {key: value.to(loaded.device) for key, value in inputs.items()})
            for point, resid in captured.items():
                values = resid.to(device="cpu", dtype=dtype).masked_fill_(~keep[..., None], 0)
                out[str(point)][torch.from_numpy(batch), :width] = values
    return {name: _stored(values) for name, values in out.items()}


def _stored(values: Tensor) -> np.ndarray:
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()


def _check_finite(
    config: HarvestConfig, wide: Mapping[str, np.ndarray], attend: np.ndarray, documents_: np.ndarray
) -> None:
    for name, x in wide.items():
        bad = ~np.isfinite(x).all(axis=2) & attend
        if bad.any():
            sequence, position = np.argwhere(bad)[0]
            raise NumericsError(
                f"{name} in document {documents_[sequence]}, position {position}",
                expected="finite activations",
                got="NaN or infinity",
                fix=f"Try compute_dtype=float32 and store_dtype=bfloat16; now {config.compute_dtype}, "
                f"{config.store_dtype}.",
            )


def _meta(config: HarvestConfig, loaded: LoadedModel) -> StoreMeta:
    return StoreMeta(
        model=loaded.ref,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        text=config.text,
        text_fingerprint=text_fingerprint(config.text),
        hook_points=config.hook_points,
        ctx=config.ctx,
        store_dtype=config.store_dtype,
        compute_dtype=str(loaded.dtype).removeprefix("torch."),
        commit_sequences=config.commit_sequences,
        outlier_norm=config.outlier_norm,
    )
