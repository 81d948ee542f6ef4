"""From text to an activation store.

Flow:
1. load the model and the text; pack documents into sequences of `ctx` tokens, one document a sequence unless asked
   otherwise, on a thread of its own;
2. take the sequences in groups of `commit_sequences` and run each through the model (`activations/forward.py`);
3. mask what an SAE should not learn from: padding, BOS, control tokens, and tokens whose norm is above `outlier_norm`
   times the median norm of the first group (attention sinks, mostly);
4. hand the group to a writer thread, which commits it while the next groups are computed; on a GPU step 3 has a thread
   of its own, too. There are N_BUFFERS buffers, so a disk that is slower than the model slows the model down instead of
   filling the memory;
5. in ring mode, wait for the trainer where the store is full (`activations/ring.py`).

A group's content depends only on the settings and on its place in the text, so a run that was stopped anywhere goes on
with the next group and ends with the same store. Left out: several processes, which `activations/ray_harvest.py` has.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Float64, Int32

from activations.ahead import ahead
from activations.config import HarvestConfig
from activations.errors import ConfigError, InterruptedRunError, NumericsError, TextError
from activations.forward import Buffer, GroupRunner, Running
from activations.hook_points import HookPoint
from activations.models import LoadedModel, Status, load_model
from activations.plan import choose_batch_tokens, plan
from activations.progress import Advance, progress
from activations.ring import POLL_S, is_full, read_reader
from activations.storage import open_storage
from activations.store_schema import GROUP_KEY, HookState, Ring, StoreMeta, StoreState, parse_group_json
from activations.store_writer import Group, StoreWriter
from activations.text import documents, text_fingerprint
from activations.tokens import TokenSequence, bos_ids, pack

CONFIG_KEY = "harvest.yaml"
N_BUFFERS = 3
RING_GROUPS = 4
PREFETCHED = 2
_T = TypeVar("_T")


class HarvestResult(NamedTuple):
    """What a harvest did."""

    path: str
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


class Rows(NamedTuple):
    """The sequences of one group; see TokenSequence."""

    tokens: Int32[np.ndarray, "seq ctx"]
    attend: Bool[np.ndarray, "seq ctx"]
    special: Bool[np.ndarray, "seq ctx"]
    documents: Int32[np.ndarray, " seq"]
    after: tuple[int, int]

    @property
    def is_text(self) -> Bool[np.ndarray, "seq ctx"]:
        """True for tokens that are neither padding nor special."""
        return self.attend & ~self.special


def find_hook_points(config: HarvestConfig, loaded: LoadedModel) -> list[HookPoint]:
    """The hook points of a config; raises HookPointError if the model does not have one."""
    sites = loaded.family.sites(loaded.model.config)
    return [HookPoint.parse(name).check(loaded.n_layers, sites) for name in config.hook_points]


def store_meta(config: HarvestConfig, loaded: LoadedModel) -> StoreMeta:
    """What the store of a harvest is made of; `batch_tokens: auto` is settled here.

    Raises: HookPointError if the model does not have a hook point; ConfigError if a ring is too small.
    """
    find_hook_points(config, loaded)
    ring = config.keep_tokens and Ring(keep_tokens=config.keep_tokens, max_tokens=config.max_tokens)
    meta = StoreMeta(
        model=loaded.ref,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        text=config.text,
        text_fingerprint=text_fingerprint(config.text),
        hook_points=config.hook_points,
        ctx=config.ctx,
        cross_documents=config.cross_documents,
        store_dtype=config.store_dtype,
        compute_dtype=str(loaded.dtype).removeprefix("torch."),
        compiled=config.compile,
        batch_tokens=1 if config.batch_tokens == "auto" else config.batch_tokens,
        commit_sequences=config.commit_sequences,
        outlier_norm=config.outlier_norm,
        ring=ring or None,
    )
    _check_ring(meta)
    if config.batch_tokens != "auto":
        return meta
    chosen = _batch_tokens_of_store(config) or choose_batch_tokens(config, loaded, meta)
    return meta.model_copy(update={"batch_tokens": chosen})


def harvest(
    config: HarvestConfig, loaded: LoadedModel | None = None, *, on_status: Status | None = None
) -> HarvestResult:
    """Harvest `config.text` into the store at `config.out`; goes on where an earlier run stopped.

    Args:
      loaded: the model, if the caller has it already; must be what `config.model` names. Workers of Ray load their own.
      on_status: told in one line what takes long before the first token.
    Raises: InterruptedRunError on Ctrl-C, after the commit in flight; NumericsError for NaN or infinity; TextError if
      the text has no tokens; MismatchError if the store was made with other settings; DiskSpaceError or StorageError
      if it cannot be written; with `config.ray` also WorkerError if Ray or its workers do not hold.
    """
    if config.ray is not None:
        from activations.ray_harvest import harvest_on_ray

        return harvest_on_ray(config, on_status=on_status)
    loaded = loaded or load_model(config.model, device=config.device, dtype=config.compute_dtype, on_status=on_status)
    meta = store_meta(config, loaded)
    plan(config, loaded, meta)
    with StoreWriter.open(config.out, meta) as writer:
        writer.storage.write(CONFIG_KEY, config.to_yaml().encode())
        start = time.perf_counter()
        new_tokens, exhausted = _Harvest(config, loaded, writer).run()
        return finish(config, writer, new_tokens, time.perf_counter() - start, exhausted=exhausted)


def finish(
    config: HarvestConfig, writer: StoreWriter, new_tokens: int, seconds: float, *, exhausted: bool
) -> HarvestResult:
    """Record that a harvest ended, and what it did. Raises: TextError if there is nothing."""
    if writer.state.committed == 0:
        raise TextError(config.text, expected="some text", got="no tokens", fix="Choose a text that is not empty.")
    writer.finish(complete=exhausted or writer.state.tokens >= config.max_tokens)
    return HarvestResult(config.out, writer.state.committed, writer.state.tokens, new_tokens, seconds)


class _Measured(NamedTuple):
    """A group that is ready to be written."""

    group: Group
    after: StoreState
    """the state that its commit leads to"""
    tokens: int
    """unmasked tokens up to its end"""
    text: int
    """its tokens that would be unmasked if none were an outlier"""


class _Inline(Executor):
    """Does at once what it is given."""

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        done: Future[_T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class _Harvest:
    """One run of the pipeline: launch, then measure, then write, each group behind the one before."""

    def __init__(self, config: HarvestConfig, loaded: LoadedModel, writer: StoreWriter):
        self._config, self._loaded, self._writer = config, loaded, writer
        self._runner = GroupRunner(writer.meta, loaded)
        self._buffers = [Buffer(writer.meta, loaded.device) for _ in range(N_BUFFERS)]
        self._n_bos = len(bos_ids(loaded.tokenizer))
        self._state = writer.state

    def run(self) -> tuple[int, bool]:
        """Compute and commit groups up to the token budget.

        Returns: attended tokens, and whether the text, or a trainer that a ring is made for, has come to its end.
        """
        config, writer = self._config, self._writer
        left = config.max_tokens - min(writer.state.tokens, config.max_tokens)
        # On a CPU the model's own threads use every core; another one beside them would only slow them down.
        measuring = ThreadPoolExecutor(1) if self._loaded.device.type == "cuda" else _Inline()
        with measuring, ThreadPoolExecutor(1) as writing, progress("harvest", left, "tok") as advance:
            try:
                return self._loop(measuring, writing, advance)
            except KeyboardInterrupt:
                measuring.shutdown()
                writing.shutdown()
                raise interrupted(config, writer) from None

    def _loop(self, measuring: Executor, writing: Executor, advance: Advance) -> tuple[int, bool]:
        new_tokens, committed, budget = 0, self._state.committed, self._config.max_tokens
        measured: deque[Future[_Measured]] = deque()
        written: deque[Future[None]] = deque()
        # Tokens there will be once what is under way is measured, if none of them is masked.
        at_most = known = self._state.tokens
        with ahead(read_groups(self._config, self._loaded.tokenizer, self._state.position), PREFETCHED) as groups:
            for number in count():
                while measured and (measured[0].done() or at_most >= budget):
                    tokens, text = measured.popleft().result()[2:]
                    advance(tokens - known)
                    known, at_most = tokens, at_most - (text - (tokens - known))
                if known >= budget or not self._wait_for_room(committed, written):
                    break
                rows = next(groups, None)
                if rows is None:
                    break
                _finish(written, but=N_BUFFERS - 1)
                buffer = self._buffers[number % N_BUFFERS]
                running = self._runner.run(rows.tokens, rows.attend, buffer)
                measured.append(measuring.submit(self._measure, rows, running, buffer))
                written.append(writing.submit(self._write, measured[-1]))
                at_most += int((rows.attend & ~rows.special).sum())
                new_tokens, committed = new_tokens + int(rows.attend.sum()), committed + len(rows.tokens)
        _finish(written)
        while measured:
            tokens = measured.popleft().result().tokens
            advance(tokens - known)
            known = tokens
        return new_tokens, known < budget

    def _measure(self, rows: Rows, running: Running, buffer: Buffer) -> _Measured:
        """Mask one group and count it in; `self._state` becomes the state that its commit leads to."""
        with self._runner.beside():
            norms = running.norms()
            check_finite(self._writer.meta, norms, rows)
            limits = self._state.outlier_limits or outlier_limits(self._config, rows, norms)
            mask, counts = count_in(rows, norms, limits, partial(self._runner.sums, buffer), self._n_bos)
            self._state = self._state.plus(counts)
            group = Group(rows.tokens, mask, rows.documents, buffer.arrays(len(mask)))
        return _Measured(group, self._state, self._state.tokens, int(rows.is_text.sum()))

    def _write(self, measured: Future[_Measured]) -> None:
        """The writer thread's part."""
        group, after = measured.result()[:2]
        if self._writer.meta.ring:
            self._writer.release(read_reader(self._writer.storage).released)
        self._writer.append(group, after)

    def _wait_for_room(self, committed: int, written: deque[Future[None]]) -> bool:
        """In ring mode, return once another group fits; False if the trainer needs no more."""
        writer = self._writer
        while writer.meta.ring:
            reader = read_reader(writer.storage)
            if reader.done:
                return False
            if not is_full(writer.meta, committed, reader.released):
                return True
            _finish(written)
            writer.release(reader.released)
            time.sleep(POLL_S)
        return True


def _stack(rows: Sequence[TokenSequence]) -> Rows:
    return Rows(
        np.stack([row.tokens for row in rows]),
        np.stack([row.attend for row in rows]),
        np.stack([row.special for row in rows]),
        np.array([row.document for row in rows], dtype=np.int32),
        rows[-1].after,
    )


def read_groups(config: HarvestConfig, tokenizer: Any, position: tuple[int, int]) -> Iterator[Rows]:
    """The sequences of a text from a position on, in groups of `commit_sequences`."""
    sequences = pack(
        documents(config.text), tokenizer, config.ctx, start=position, cross_documents=config.cross_documents
    )
    while rows := list(islice(sequences, config.commit_sequences)):
        yield _stack(rows)


def outlier_limits(
    config: HarvestConfig, rows: Rows, norms: Mapping[str, Float[np.ndarray, "seq ctx"]]
) -> dict[str, float]:
    """What a text's first group sets for all of it: `outlier_norm` times its median norm, by hook point."""
    used = {name: of_hook[rows.is_text] for name, of_hook in norms.items()}
    return {name: config.outlier_norm * (float(np.median(x)) if x.size else 1.0) for name, x in used.items()}


def find_outliers(
    rows: Rows, norms: Mapping[str, Float[np.ndarray, "seq ctx"]], limits: Mapping[str, float]
) -> Bool[np.ndarray, "seq ctx"]:
    """Tokens of text whose norm is above the limit of some hook point."""
    return np.any([norms[name] > limit for name, limit in limits.items()], axis=0) & rows.is_text


def count_in(
    rows: Rows,
    norms: Mapping[str, Float[np.ndarray, "seq ctx"]],
    limits: Mapping[str, float],
    sums: Callable[[str, Bool[np.ndarray, "seq ctx"]], Float64[np.ndarray, " d_model"]],
    n_bos: int,
) -> tuple[Bool[np.ndarray, "seq ctx"], StoreState]:
    """Mask one group, and count it by itself, as `StoreState.plus` takes it.

    Args:
      sums: the sum over the unmasked tokens of a hook point.
      n_bos: tokens that the tokenizer puts in front.
    """
    special, outlier = rows.special & rows.attend, find_outliers(rows, norms, limits)
    mask, is_bos = rows.is_text & ~outlier, special & (np.arange(special.shape[1]) < n_bos)
    masked = {"padding": ~rows.attend, "bos": is_bos, "control": special & ~is_bos, "norm_outlier": outlier}
    return mask, StoreState(
        position=rows.after,
        tokens=int(mask.sum()),
        masked={reason: int(m.sum()) for reason, m in masked.items()},
        hooks={
            name: HookState(outlier_limit=limit).add(norms[name][mask], sums(name, mask))
            for name, limit in limits.items()
        },
    )


def interrupted(config: HarvestConfig, writer: StoreWriter) -> InterruptedRunError:
    """The error of a run that was stopped with Ctrl-C."""
    return InterruptedRunError(
        config.out,
        expected="to run to the end",
        got=f"Ctrl-C; {writer.state.tokens:,} tokens are committed",
        fix="Run the same command again to go on from there.",
    )


def check_finite(meta: StoreMeta, norms: Mapping[str, Float[np.ndarray, "seq ctx"]], rows: Rows) -> None:
    """Raise NumericsError naming the first token whose activation is NaN or infinite."""
    for name, values in norms.items():
        bad = ~np.isfinite(values) & rows.attend
        if bad.any():
            sequence, position = np.argwhere(bad)[0]
            raise NumericsError(
                f"{name} in document {rows.documents[sequence]}, position {position}",
                expected="finite activations",
                got="NaN or infinity",
                fix="Try compute_dtype=float32 and store_dtype=bfloat16; "
                f"now {meta.compute_dtype}, {meta.store_dtype}.",
            )


def _finish(pending: deque[Future[None]], but: int = 0) -> None:
    """Wait for all but the last `but` writes, and raise what they raised."""
    while len(pending) > but:
        pending.popleft().result()


def _batch_tokens_of_store(config: HarvestConfig) -> int | None:
    """What an earlier run settled on; going on with another size would round differently."""
    found = open_storage(config.out).read(GROUP_KEY)
    return parse_group_json(config.out, found[0])[0].batch_tokens if found else None


def _check_ring(meta: StoreMeta) -> None:
    least = RING_GROUPS * meta.commit_sequences * meta.ctx
    if meta.ring and meta.ring.keep_tokens < least:
        raise ConfigError(
            "keep_tokens",
            expected=f"{least} or more: {RING_GROUPS} times {meta.commit_sequences} sequences of {meta.ctx} tokens",
            got=meta.ring.keep_tokens,
            fix="Raise keep_tokens, or lower commit_sequences.",
        )
