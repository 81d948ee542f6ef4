"""Steering a PyTorch model while it runs.

    with steering(loaded, [Intervention.of(vector, 4.0)]) as steered:
        loaded.model.generate(...)
        steered.set([Intervention.of(vector, 8.0)])         between two tokens, if you like

Flow of one forward pass, all of it in tensors on the device:
1. in front of the model, every token gets its index in its sequence, and the latches of scopes go over the token ids;
2. at each hook point that is read, readings are taken and gates move on, from the states that the pass before left;
3. at each hook point that is acted on, the tables are applied (`steer.tables`).

- Zero guarantee: a token on which nothing acts keeps its activation, bit for bit, and an operation with coefficient or
  strength 0 acts on nothing.
- The first token of a sequence is never steered, because it is an attention sink whose norm is tens of times the
  others'; an SAE never sees it either. Indices count from the first attended token, so left padding changes nothing,
  and with a KV cache, in chunks of any length, each token is steered exactly once, when it is computed.
- What was computed stays in the KV cache as it was: a change acts on the tokens that come after it.
- Compiled models: tables, states and log are buffers that are written in place, so a change neither compiles again nor
  is lost in a CUDA graph. Entering forgets what was compiled before (`torch.compiler.reset`), since `torch.compile`
  does not look for hooks; so a compiled model compiles again at its first token inside.

Rounding: readings, sums and lengths are float32 whatever the model runs in; the result is rounded once, to the dtype of
the residual stream. Several residual streams are read as their mean and each gets what the mean is changed by; where
nothing acts that is 0, which leaves every number but may turn -0 into 0.

Beam search and assisted decoding are refused where they would be steered wrongly (`steer.decoding`). Left out: caches
that were filled under other steering; text from prompts (`steer.generate`).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from activations.errors import ConfigError, ShapeError
from activations.hook_points import HookPoint
from activations.hooks import edit
from activations.models import LoadedModel
from steer.decoding import refusing
from steer.gates import Gate, GateTable, gate_table, read, run_gates
from steer.plan import RESERVE, Budget, Contents, Interventions, Plan
from steer.scopes import NONE, LatchTable, latch_table, run_latches
from steer.tables import Lane, applied

MAX_BATCH = 64
LOG_TOKENS = 4096


@contextmanager
def steering(
    loaded: LoadedModel,
    interventions: Interventions = (),
    *,
    rows: Sequence[Interventions] | None = None,
    prompt_lengths: Sequence[int] | None = None,
    reserve: Interventions = (),
    force: bool = False,
    budget: Budget = None,
    max_batch: int = MAX_BATCH,
) -> Iterator["Steering"]:
    """Steer every forward pass of `loaded.model` inside the context.

    Args:
      interventions: for every sequence of the batch.
      rows: besides, one list for each sequence; every pass then has to have as many.
      prompt_lengths: tokens of each sequence's prompt, padding left out; for scopes that say `prompt` or `generated`.
      reserve: what `Steering.set` may be given later: there is room for all of these at once beside each row's own.
      force: allow doses above MAX_DOSE, and coefficients beyond a vector's window; a budget holds none the less.
      budget: joint dose that a sequence may have at a hook point, one for all or one a row; what adds up to more is
        scaled down to it, all of it by one factor (`steer.plan`), and `Steering.scales` says by how much.
      max_batch: sequences of a batch, if there are gates, or scopes of roles, phases or tool calls.
    Raises: MismatchError for a vector or gate of another model; ShapeError for one of another width; HookPointError for
      a layer or site that the model does not have, or a gate that is read behind where it acts; NumericsError for NaN;
      ConfigError for a dose above MAX_DOSE, a coefficient beyond a vector's window, clamps that leave nothing of a
      budget, or a scope whose markers the model's chat template does not have; and, from `loaded.model.generate`, for
      beam search or assisted decoding that cannot be followed.
    """
    with torch.inference_mode(False):
        plan = Plan(loaded, interventions, rows, prompt_lengths, reserve, force, budget)
        steered = Steering(loaded, plan, max_batch).to(loaded.device)
        steered.set(interventions, rows=rows, prompt_lengths=prompt_lengths)
    with running(steered):
        yield steered


@contextmanager
def running(steered: "Steering") -> Iterator[None]:
    """Steer every forward pass of its model inside the context."""
    with ExitStack() as stack:
        stack.enter_context(_seen_by_the_compiler(steered))
        stack.enter_context(steered.attached())
        stack.callback(steered.set)  # what was compiled inside may be run outside
        yield


@contextmanager
def _seen_by_the_compiler(steered: "Steering") -> Iterator[None]:
    """Let torch.compile look for hooks, and forget what it compiled while it did not.

    It takes modules of one class for equal otherwise, and runs what was compiled for one without hooks, or for one with
    as many other hooks. Tensors with static addresses are read where they are by CUDA graphs, instead of being copied.
    """
    import torch._dynamo

    torch.compiler.reset()
    for tensor in (*steered.buffers(), *steered.parameters()):
        torch._dynamo.mark_static_address(tensor)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        yield


class Steering(nn.Module):
    """What steers a model at this moment."""

    open: Bool[Tensor, "sequence latch"]
    last: Int[Tensor, "sequence back"]
    seen: Int[Tensor, " sequence"]

    def __init__(self, loaded: LoadedModel, plan: Plan, max_batch: int):
        """Make room for what `plan` found, and steer nothing yet."""
        super().__init__()
        self._loaded, self._plan, self._run = loaded, plan, _Run()
        self._has_flags, self._n_rows = plan.has_flags, plan.n_rows if plan.is_by_row else None
        self._inputs = list(inspect.signature(loaded.model.base_model.forward).parameters)
        self._lanes = plan.lanes()
        self.add_module("tables", nn.ModuleList(self._lanes))
        self.events = _Tables(latch_table(plan.latches)) if plan.latches else None
        self._sites = [_Site(point, self._run, self._lanes, plan.gates, max_batch) for point in plan.points]
        self.add_module("sites", nn.ModuleList(self._sites))
        # [sequence, ...]: what one pass leaves for the next.
        self.register_buffer("open", torch.zeros(max_batch, len(plan.latches), dtype=torch.bool), persistent=False)
        n_back = self.events.tensors()[0].shape[1] if self.events is not None else 0
        self.register_buffer("last", torch.full((max_batch, n_back), NONE), persistent=False)
        self.register_buffer("seen", torch.zeros(max_batch, dtype=torch.long), persistent=False)

    def set(
        self,
        interventions: Interventions = (),
        *,
        rows: Sequence[Interventions] | None = None,
        prompt_lengths: Sequence[int] | None = None,
    ) -> None:
        """Steer with these from the next token on, in place of those before; nothing given: not at all.

        Raises: as `steering`, and ConfigError for more than there was room made for at the start.
        """
        self.fill(self._plan.contents(interventions, rows, prompt_lengths))

    def fill(self, contents: Contents) -> None:
        """Steer with what `Plan.contents` made, from the next token on. Raises: ConfigError if there is no room."""
        room = {lane.key: lane.n_slots for lane in self._lanes}
        for key, slots in contents.items():
            n = max(map(len, slots))
            if n > room.get(key, 0):
                expected = f"at most {room.get(key, 0)} operations of its kind, for which there is room since the start"
                raise ConfigError(f"steering at {key.acts}", expected=expected, got=n, fix=RESERVE)
        for lane in self._lanes:
            lane.fill(contents.get(lane.key, []))

    def scales(self) -> list[dict[HookPoint, float]]:
        """For each row, by hook point, at how much of what was asked for the budget lets it steer, where that is less
        than all of it; one row for all sequences if they have none of their own."""
        return self._plan.scales

    def fired(self) -> list[dict[str, list[int]]]:
        """For each sequence of the batch, by name of gate: on which tokens of the latest text it was open.

        Tokens are told by their index among the attended ones of their sequence; those from LOG_TOKENS on are not kept.
        """
        lengths = self.seen[self.seen > 0].tolist()
        return [
            {name: found for site in self._sites for name, found in site.fired(i, n).items()}
            for i, n in enumerate(lengths)
        ]

    def latest(self) -> list[dict[str, tuple[float, bool]]]:
        """For each sequence of the batch, by name of gate: its readout of the latest token, and whether it was open.

        Empty without gates. Of sequences that are padded behind, the readout is that of the padding.
        """
        n = int((self.seen > 0).sum()) if self._plan.gates else 0
        return [{name: found for site in self._sites for name, found in site.latest(i).items()} for i in range(n)]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks, for as long as the context lasts."""
        model, family = self._loaded.model, self._loaded.family
        base = model.base_model  # hooks of the outermost module would be compiled apart from it
        with ExitStack() as stack:
            stack.enter_context(refusing(model, has_flags=self._has_flags, is_by_row=self._n_rows is not None))
            stack.callback(base.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            for site in self._sites:
                stack.enter_context(edit(model, family, site.point, site.forward))
            stack.callback(base.register_forward_hook(self._end).remove)
            yield

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.rests:
            return
        inputs = dict(zip(self._inputs, args, strict=False)) | kwargs
        self.begin(token_index(inputs), inputs.get("input_ids"))

    @property
    def rests(self) -> bool:
        """Whether the next pass may be left alone."""
        return _may_rest() and not self._has_flags and all(lane.is_empty for lane in self._lanes)

    def begin(self, index: Int[Tensor, "batch pos"], ids: Int[Tensor, "batch pos"] | None) -> None:
        """In front of a pass over tokens of these indices in their sequences, -1 for padding, and of these ids.

        For whoever runs passes that `attached` cannot follow, such as several requests behind each other: `begin`, then
        `at` each of `points` in their order, then `end`.

        Raises: ShapeError for another number of sequences than steering was made for, ConfigError for ids that are not
          there and that a scope looks at.
        """
        run = self._run
        batch = len(index)
        self._check_batch(batch)
        run.index, run.readings = index, [None] * len(self._lanes)
        run.flags = torch.zeros((*index.shape, 0), dtype=torch.bool, device=index.device)
        if self._has_flags:
            before = torch.where((index == 0).any(1), 0, self.seen[:batch])
            self.seen[:batch] = torch.maximum(before, index.amax(1) + 1)
            self.seen[batch:].zero_()
        if self.events is not None:
            run.flags = self._latches(ids, index)

    @property
    def points(self) -> list[HookPoint]:
        """Where it reads or acts, in the order of a pass."""
        return [site.point for site in self._sites]

    def at(self, point: HookPoint, value: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The value at one of `points`, steered; the same tensor where nothing acts."""
        return next(site for site in self._sites if site.point == point).forward(value)

    def end(self) -> None:
        """Behind a pass."""
        self._run.clear()

    def _latches(self, ids: Tensor | None, index: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos latch"]:
        if ids is None:
            fix = "Use scopes without roles, phases and tool calls."
            raise ConfigError("steering", expected="input_ids, for a scope", got="inputs_embeds", fix=fix)
        assert self.events is not None
        batch = len(index)
        found = run_latches(LatchTable(*self.events.tensors()), ids, index, self.open[:batch], self.last[:batch])
        self.open[:batch] = found.states
        self.last[:batch] = found.last
        return found.inside

    def _check_batch(self, batch: int) -> None:
        if self._n_rows not in (None, batch):
            fix = "Give as many rows as the batch has sequences."
            raise ShapeError("steering", expected=f"a batch of {self._n_rows}, one a row", got=batch, fix=fix)
        if self._has_flags and batch > len(self.last):
            fix = "Give a larger max_batch when steering starts."
            raise ShapeError("steering", expected=f"a batch of at most {len(self.last)}", got=batch, fix=fix)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.end()


class _Run:
    """What one forward pass carries from hook to hook."""

    index: Any = None
    """[batch, pos]: index of each token in its sequence, -1 for padding"""
    flags: Any = None
    """[batch, pos, flag]: those that are known so far"""
    readings: Any = ()
    """by lane: what its slots read"""

    def clear(self) -> None:
        self.index, self.flags, self.readings = None, None, ()


class _Tables(nn.Module):
    """A named tuple of tensors as buffers."""

    def __init__(self, table: Any):
        super().__init__()
        self._names = table._fields
        for name, tensor in table._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def tensors(self) -> list[Any]:
        """In their order."""
        return [getattr(self, name) for name in self._names]


class _Site(nn.Module):
    """One hook point: what is read at it, and what acts on it."""

    ages: Int[Tensor, "sequence gate"]
    readouts: Float[Tensor, "sequence gate"]
    log: Bool[Tensor, "sequence index gate"]

    def __init__(self, point: HookPoint, run: _Run, lanes: Sequence[Lane], gates: Sequence[Gate], max_batch: int):
        super().__init__()
        own = [gate for gate in gates if gate.readout.hook_point == point]
        self.point, self._run = point, run
        self._names = [gate.name for gate in own]
        self._max_age = max((gate.min_tokens for gate in own), default=1)
        self.gates = _Tables(gate_table(own)) if own else None
        self._reading = [i for i, lane in enumerate(lanes) if lane.key.reads == point]
        self._acting = [i for i, lane in enumerate(lanes) if lane.key.acts == point]
        self._lanes = list(lanes)
        self.register_buffer("ages", torch.zeros(max_batch, len(own), dtype=torch.long), persistent=False)
        self.register_buffer("readouts", torch.zeros(max_batch, len(own)), persistent=False)
        n_logged = LOG_TOKENS + 1 if own else 0
        self.register_buffer("log", torch.zeros(max_batch, n_logged, len(own), dtype=torch.bool), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """The value at the hook point, steered."""
        lanes, run, reading, acting = self._lanes, self._run, self._reading, self._acting
        if _may_rest():
            reading, acting = ([i for i in which if not lanes[i].is_empty] for which in (reading, acting))
        if self.gates is not None or reading:
            x = value.float()
            if self.gates is not None:
                run.flags = torch.cat([run.flags, self._opened(x, run.index)], dim=-1)
            for i in reading:
                run.readings[i] = lanes[i].read(x)
        if not acting:
            return value
        readings = [run.readings[i] for i in acting]
        return applied(value, [lanes[i] for i in acting], readings, run.index, run.flags)

    def _opened(self, x: Tensor, index: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos gate"]:
        """Which gates are open on which tokens; moves them on, and writes the log."""
        assert self.gates is not None
        table, batch = GateTable(*self.gates.tensors()), len(index)
        values = read(table, x)
        ages = run_gates(table, values, index, self.ages[:batch], self._max_age)
        self.ages[:batch], self.readouts[:batch] = ages[:, -1], values[:, -1]
        is_open = (ages > 0) & (index >= 0)[..., None]
        rows = torch.arange(batch, device=index.device)[:, None]
        self.log[rows, torch.where((index >= 0) & (index < LOG_TOKENS), index, LOG_TOKENS)] = is_open
        return is_open

    def latest(self, row: int) -> dict[str, tuple[float, bool]]:
        """By gate: its readout of the latest token, and whether it is open."""
        pairs = zip(self._names, self.readouts[row].tolist(), (self.ages[row] > 0).tolist(), strict=True)
        return {name: (value, is_open) for name, value, is_open in pairs}

    def fired(self, row: int, length: int) -> dict[str, list[int]]:
        """By gate: the tokens on which it was open, of the first `length`."""
        log = self.log[row, : min(length, LOG_TOKENS)]
        return {name: log[:, g].nonzero()[:, 0].tolist() for g, name in enumerate(self._names)}


def _may_rest() -> bool:
    """Whether what is empty may be passed over; a compiled pass may not, since it would be compiled again."""
    return not torch.compiler.is_compiling()


def token_index(inputs: Mapping[str, Any]) -> Int[Tensor, "batch pos"]:
    """The index of each token of a forward pass among the attended tokens of its sequence, -1 for padding.

    From the attention mask if it says which tokens are attended; else from the position ids, where what generation
    puts in front of a sequence has position 0 just as its first token has; else from the length of the cache.
    """
    ids = inputs.get("input_ids")
    new: Tensor = ids if ids is not None else inputs["inputs_embeds"]
    mask, positions, cache = (inputs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
    batch, length = new.shape[:2]
    steps = torch.arange(length, device=new.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        past = mask.shape[1] - length if cache is None else cache.get_seq_length()
        return torch.where(mask.bool(), mask.long().cumsum(1) - 1, -1)[:, steps + past]
    if isinstance(positions, Tensor) and positions.ndim == 2:
        following = functional.pad(positions, (0, 1), value=1)[:, 1:]
        return torch.where((positions == 0) & (following == 0), -1, positions).expand(batch, -1)
    past = 0 if cache is None else cache.get_seq_length()
    return (steps + past).expand(batch, -1)
