"""What happens at one hook point of a packed pass, as one kernel of Triton: a single launch, on a GPU.

Every token has a program. It ends at once where nothing steers the token, so that a point which rests costs a launch
and no more. Otherwise it looks for the slots in whose range the token's index lies, asks their conditions, and adds up
what they write. Where gates are read, the program of a request's first token goes over all its tokens of this pass, one
after the other, as the automaton does by definition; the programs of the others end.

It does what `Site.act` does with operations of PyTorch, to rounding: `tests/steer/packed/test_rows.py` compares them
in Triton's interpreter, and `benchmarks/vllm_equal.py` on a GPU. Left out: what lanes read that `reads_apart`, which is
given to it (`steer.packed.apart`, `Lane.read`); what goes into the tables (`steer.packed.rows`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import unwrap
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from steer.packed.prepared import MAX_AGE, MAX_CLAUSES, MAX_FLAGS
from steer.packed.tables import LOG_TOKENS, NOBODY, Batch
from steer.tables import Lane, LaneKey

# Triton's own annotations take a block for a number.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

MOST_GATED = 512
"""tokens of a request up to which gates are gone over one by one; more take the scan of PyTorch, in log2(pos) steps"""
FEWEST = 64
"""slots that are looked through at once, at least: a kernel is compiled for each power of 2 from there on"""
_ADDS = ("writes", "constant", "low", "high", "need", "veto")
_GIVEN = (*_ADDS, "gain", "floor", "ceiling", "strength")
_READS = (*_GIVEN, "reads", "bias", "threshold")
_KINDS = {"adds": _ADDS, "keeps": _ADDS, "reads": _READS, "given": _GIVEN}
"""kinds of lanes, of which a hook point may have one each -> what is looked at of their slots"""


def can_run(lanes: Sequence[Lane], n_gated: int) -> bool:
    """Whether it does what these lanes do. Args: n_gated: most tokens of a gated request in the pass; 0: no gates."""
    kinds = [_kind(lane.key) for lane in lanes]
    return n_gated <= MOST_GATED and None not in kinds and len({*kinds}) == len(kinds)


def _kind(key: LaneKey) -> str | None:
    if key.keeps_norm:
        return "keeps" if key.reads is None else None
    return "adds" if key.reads is None else "given" if key.reads_apart else "reads"


def run(
    hidden: Float[Tensor, "pos d_model"],
    residual: Float[Tensor, "pos d_model"] | None,
    lanes: Sequence[Lane],
    n_gated_rows: int,
    batch: Batch,
    gates: Mapping[str, Tensor],
) -> None:
    """Steer the residual stream, `hidden` or the sum of both; what changes is written into `hidden`.

    Args:
      lanes: those that act here, for which `can_run` is true.
      n_gated_rows: rows of gates of which some may be read here.
      batch: its flags, ages and log are moved on where gates are read; its readings have z of lanes that read apart.
      gates: `here` and the `gate_...` buffers of a `Site`.
    """
    found = {_kind(lane.key): lane for lane in lanes}
    tables: dict[str, Tensor | int] = {}
    for kind, names in _KINDS.items():
        lane = found.get(kind)
        tables |= {f"{kind}_{name}": hidden if lane is None else _plain(lane.get_buffer(name)) for name in names}
        tables[f"{kind}_n"] = n = 0 if lane is None else lane.n_slots
        tables[f"{kind}_block"] = triton.next_power_of_2(max(FEWEST, n))
    given, d_model = found.get("given"), hidden.shape[1]
    tables["given_z"] = hidden if given is None else batch.readings[given.key].contiguous()
    with on_device(hidden):
        _steer[(len(hidden),)](
            hidden, hidden if residual is None else residual,
            batch.index, batch.position, batch.row, batch.first, batch.last, _plain(batch.flags),
            batch.ages, _plain(batch.log), n_gated_rows,
            **{name.removeprefix("gate_"): _plain(tensor) for name, tensor in gates.items()}, **tables,
            has_residual=residual is not None, d_model=d_model, block=triton.next_power_of_2(d_model),
            log_tokens=LOG_TOKENS, n_flags=MAX_FLAGS, n_clauses=MAX_CLAUSES, max_age=MAX_AGE, nobody=NOBODY,
            num_warps=4 if d_model <= 2048 else 8,
        )  # fmt: skip


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Where kernels of it run."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def compiled(*counts: str) -> Callable[[Callable[..., Any]], Any]:
    """A function of Triton, which is not compiled anew for other counts.

    Triton reads the source of a function, so it gets that and not what tests put around it to check its types.
    """
    return lambda function: triton.jit(unwrap(function), do_not_specialize=[*counts])


def _plain(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


_NOT, _HERE, _GIVEN_Z = (tl.constexpr(how) for how in range(3))
"""how a lane reads: not at all, or z is found here, or given"""


@compiled()
def acting(slot, now, low, high, n) -> Any:
    """Which slots of a lane are those of a token of this index, whatever their conditions."""
    starts = tl.load(low + slot, mask=slot < n, other=1)
    ends = tl.load(high + slot, mask=slot < n, other=0)
    return (starts <= now) & (now < ends)


@compiled()
def _sum(
    x, now, up, writes, constant, low, high, need, veto, n,
    gain, floor, ceiling, strength, reads, bias, threshold, given_z,
    reading: tl.constexpr, slots: tl.constexpr, d_model: tl.constexpr, block: tl.constexpr,
    n_flags: tl.constexpr, n_clauses: tl.constexpr,
) -> Any:  # fmt: skip
    """What the slots of one lane write on a token, and how many of them act."""
    at, slot = tl.arange(0, block), tl.arange(0, slots)
    inside = at < d_model
    hit = acting(slot, now, low, high, n)
    change = tl.zeros([block], dtype=tl.float32)
    n_acting = 0
    clause, flag = tl.arange(0, n_clauses)[:, None], tl.arange(0, n_flags)[None, :]
    for _ in range(tl.sum(hit.to(tl.int32), 0)):
        k = tl.min(tl.where(hit, slot, slots), 0)
        hit = hit & (slot != k)
        condition = (k * n_clauses + clause) * n_flags + flag
        needs, vetoes = tl.load(need + condition) != 0, tl.load(veto + condition) != 0
        fails = (needs & (up[None, :] == 0)) | (vetoes & (up[None, :] != 0))
        failing = tl.max(fails.to(tl.int32), 1)
        if tl.min(failing, 0) == 0:
            amount = tl.load(constant + k)
            if reading != _NOT:
                if reading == _HERE:
                    row = tl.load(reads + k * d_model + at, mask=inside, other=0.0)
                    s = tl.sum(row * x, 0) + tl.load(bias + k)
                    z = tl.where(s > tl.load(threshold + k), s, 0.0)
                else:
                    z = tl.load(given_z + k)
                wanted = tl.load(gain + k) * z
                wanted = tl.minimum(tl.maximum(wanted, tl.load(floor + k)), tl.load(ceiling + k))
                amount += tl.load(strength + k) * (wanted - z)
            change += amount * tl.load(writes + k * d_model + at, mask=inside, other=0.0)
            n_acting += 1
    return change, n_acting


@compiled()
def _moved(
    age, x, where, gate, is_here, weight, bias, floor, absolute, relative, on, off, min_tokens,
    d_model: tl.constexpr, block: tl.constexpr, max_age: tl.constexpr,
) -> Any:  # fmt: skip
    """For how many tokens each gate has been open, behind a token at position `where`; 0: it is shut."""
    at = tl.arange(0, block)
    inside = at < d_model
    rows = weight + gate[:, None] * d_model + at[None, :]
    w = tl.load(rows, mask=is_here[:, None] & inside[None, :], other=0.0)
    value = tl.sum(w * x[None, :], 1) + tl.load(bias + gate, mask=is_here, other=0.0)
    value = tl.where(value > tl.load(floor + gate, mask=is_here, other=0.0), value, 0.0)
    value = tl.where(tl.load(absolute + gate, mask=is_here, other=0) != 0, tl.abs(value), value)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-12)
    value = tl.where(tl.load(relative + gate, mask=is_here, other=0) != 0, value / length, value)
    opens = value > tl.load(on + gate, mask=is_here, other=0.0)
    shuts = value <= tl.load(off + gate, mask=is_here, other=0.0)
    shuts = shuts & (age >= tl.load(min_tokens + gate, mask=is_here, other=0))
    later = tl.where(shuts, 0, tl.minimum(age + 1, max_age))
    return tl.where(where == 0, 0, tl.where(age == 0, opens.to(tl.int64), later))


@compiled("n_gated_rows", "adds_n", "keeps_n", "reads_n", "given_n")
def _steer(
    hidden, residual, index, position, row, first, last, flags, ages, log, n_gated_rows,
    weight, bias, floor, absolute, relative, on, off, min_tokens, here,
    adds_writes, adds_constant, adds_low, adds_high, adds_need, adds_veto, adds_n,
    keeps_writes, keeps_constant, keeps_low, keeps_high, keeps_need, keeps_veto, keeps_n,
    reads_writes, reads_constant, reads_low, reads_high, reads_need, reads_veto,
    reads_gain, reads_floor, reads_ceiling, reads_strength, reads_reads, reads_bias, reads_threshold, reads_n,
    given_writes, given_constant, given_low, given_high, given_need, given_veto,
    given_gain, given_floor, given_ceiling, given_strength, given_z, given_n,
    adds_block: tl.constexpr, keeps_block: tl.constexpr, reads_block: tl.constexpr, given_block: tl.constexpr,
    has_residual: tl.constexpr, d_model: tl.constexpr, block: tl.constexpr, log_tokens: tl.constexpr,
    n_flags: tl.constexpr, n_clauses: tl.constexpr, max_age: tl.constexpr, nobody: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    if tl.load(index + token) < 0:
        return
    at, columns = tl.arange(0, block), tl.arange(0, n_flags)
    inside = at < d_model
    gate_row = tl.load(row + token)
    gate_row = tl.where(gate_row < n_gated_rows, gate_row, nobody)  # where no gate is
    is_here = tl.load(here + gate_row * n_flags + columns) != 0
    is_gated = tl.sum(is_here.to(tl.int32), 0) > 0
    if is_gated & (tl.load(first + token) == 0):
        return
    age = tl.load(ages + gate_row * n_flags + columns)
    goes_on = token >= 0
    while goes_on:
        place = hidden + token * d_model + at
        own = tl.load(place, mask=inside, other=0.0)
        x = own.to(tl.float32)
        if has_residual:
            x += tl.load(residual + token * d_model + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(flags + token * n_flags + columns) != 0
        if is_gated:
            where = tl.load(position + token)
            age = _moved(
                age, x, where, gate_row * n_flags + columns, is_here,
                weight, bias, floor, absolute, relative, on, off, min_tokens, d_model, block, max_age,
            )  # fmt: skip
            up = tl.where(is_here, age > 0, up)
            tl.store(flags + token * n_flags + columns, up.to(tl.uint8), mask=is_here)
            logged = log + (gate_row * (log_tokens + 1) + tl.minimum(where, log_tokens)) * n_flags + columns
            tl.store(logged, (age > 0).to(tl.uint8), mask=is_here)
        now = tl.load(index + token)
        change, n_acting = _sum(
            x, now, up, adds_writes, adds_constant, adds_low, adds_high, adds_need, adds_veto, adds_n,
            hidden, hidden, hidden, hidden, hidden, hidden, hidden, hidden,
            _NOT, adds_block, d_model, block, n_flags, n_clauses,
        )  # fmt: skip
        other, n_keeping = _sum(
            x, now, up, keeps_writes, keeps_constant, keeps_low, keeps_high, keeps_need, keeps_veto, keeps_n,
            hidden, hidden, hidden, hidden, hidden, hidden, hidden, hidden,
            _NOT, keeps_block, d_model, block, n_flags, n_clauses,
        )  # fmt: skip
        change += other
        other, n_reading = _sum(
            x, now, up, reads_writes, reads_constant, reads_low, reads_high, reads_need, reads_veto, reads_n,
            reads_gain, reads_floor, reads_ceiling, reads_strength, reads_reads, reads_bias, reads_threshold, hidden,
            _HERE, reads_block, d_model, block, n_flags, n_clauses,
        )  # fmt: skip
        change += other
        other, n_given = _sum(
            x, now, up, given_writes, given_constant, given_low, given_high, given_need, given_veto, given_n,
            given_gain, given_floor, given_ceiling, given_strength, hidden, hidden, hidden, given_z + token * given_n,
            _GIVEN_Z, given_block, d_model, block, n_flags, n_clauses,
        )  # fmt: skip
        change += other
        if n_acting + n_keeping + n_reading + n_given > 0:
            moved = x + change
            if n_keeping > 0:
                moved *= tl.sqrt(tl.sum(x * x, 0)) / tl.maximum(tl.sqrt(tl.sum(moved * moved, 0)), 1e-12)
            if not has_residual:
                moved = moved.to(own.dtype).to(tl.float32)
            # Not `moved - residual`: what does not change keeps its bits, and so do both parts of what does.
            new = tl.where(moved != x, own.to(tl.float32) + (moved - x), own.to(tl.float32))
            tl.store(place, new.to(own.dtype), mask=inside)
        goes_on = is_gated & (tl.load(last + token) == 0)
        token += 1
    if is_gated:
        tl.store(ages + gate_row * n_flags + columns, age, mask=is_here)
