"""A context as vectors: the model without a long context, steered, matches the model with it.

    v* = argmin KL(model with the context || model without it, h + v at each hook point)     (`steer.making.distil`)

Flow of `learn`:
1. the model with the context answers prompts, which are split into those to learn from, those to select on, and those
   held out;
2. vectors, one a hook point and zero at first, go down the loss; nothing else is trained. Behind each step each is
   brought back to `max_dose`;
3. baselines: the difference in means, a random direction of the same norm, a soft prompt of as many numbers;
4. a report on held-out prompts, and the vectors with it, into a library: NAME, or NAME@HOOK_POINT for each of several.

Vectors are added in training to exactly those tokens, and in the same way, as `steer.runtime` does with the scope that
they are kept with. The mean norm that doses are measured in is that of the answers' tokens without the context.

A run is not resumed: it takes minutes, the same seed gives the same vectors, and the library is written at the very
end, so what is stopped leaves it as it was.

Left out: contexts that differ from prompt to prompt; scopes of roles, phases and tool calls.
"""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.errors import ConfigError, NumericsError, TextError
from activations.generate import continuations
from activations.hook_points import HookPoint
from activations.hooks import capture, edit
from activations.models import LoadedModel, load_model
from activations.text import read_file
from activations.tokens import special_ids
from sae.metrics import bootstrap
from steer.making.config import LearnConfig
from steer.making.distil import (
    Batch,
    Descent,
    Lesson,
    Settings,
    Student,
    batch_of,
    descend,
    divergences,
    lessons,
    log_probs,
    plain,
)
from steer.making.make import add_to_library
from steer.making.soft_prompt import SoftPrompt, with_soft_prompt
from steer.operations import Intervention
from steer.runtime import steering
from steer.scopes import Scope
from steer.vectors import SteeringVector

FACTORS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
"""lengths at which the difference in means is tried, in its own"""
SHORT = 300
"""characters up to which a context is kept with its vectors"""
EXAMPLES = 3

Vectors = Float[Tensor, "vector d_model"]


class Site(NamedTuple):
    """Where one vector is added."""

    point: HookPoint
    mean_norm: float


class Lessons(NamedTuple):
    """What the teacher said, by what it is for."""

    fit: list[Lesson]
    select: list[Lesson]
    heldout: list[Lesson]


def learn(config: LearnConfig, loaded: LoadedModel | None = None) -> list[SteeringVector]:
    """Learn the vectors of `config`, measure them, and put them into the library at `config.out`.

    Raises: ConfigError for fewer prompts than are asked for, a scope that is not one of indices, a hook point that is
      named twice; HookPointError; TextError for a file that cannot be read.
    """
    scope, points = _checked(config)
    context, questions = read_context(config.context), _questions(config)
    loaded = loaded or load_model(config.model, device=config.device)
    for point in points:
        point.check(loaded.n_layers, loaded.family.sites(loaded.model.config))
    start = time.perf_counter()
    taught = _taught(config, loaded, context, questions)
    seconds = {"teacher": time.perf_counter() - start}
    norms, difference, seconds["difference_in_means"] = _difference(loaded, points, taught.fit, config.batch)
    sites = [Site(*pair) for pair in zip(points, norms, strict=True)]
    student = _Steered(loaded, sites, scope)
    descent = descend(
        "vectors", loaded, student, student.moved, taught.fit, taught.select, _settings(config, config.lr),
        bound=lambda moved: _shorten(moved, config.max_dose),
    )  # fmt: skip
    vectors = student.vectors.detach().cpu()
    if not bool((vectors.norm(dim=1) > 0).all()):
        fix = "Raise lr, or choose another hook point."
        raise NumericsError("vectors", expected="vectors that were moved", got="one of length 0", fix=fix)
    report = _Report(config, loaded, taught, sites, scope)
    report.add_vectors(vectors, descent)
    report.add_difference(difference)
    report.add_random(vectors)
    if config.soft_prompt:
        report.add_soft_prompt(context, len(sites))
    made = _named(config, loaded, sites, scope, vectors, _source(config, context))
    receipt = report.finished(seconds | report.seconds, _examples(config, loaded, made, taught.heldout))
    made = [replace(vector, receipts=[receipt]) for vector in made]
    add_to_library(config.out, *made, instead_of=_name(config))
    return made


def _settings(config: LearnConfig, lr: float) -> Settings:
    return Settings(config.steps, config.batch, lr, config.seed)


# --- what is asked, and about what -----------------------------------------------------------------------------------


def read_context(spec: str) -> str:
    """The context, from its text or its file. Raises: TextError if there is no such file, or nothing in it."""
    text = read_file(Path(spec)).strip() if spec.endswith((".txt", ".md")) else spec.strip()
    if not text:
        raise TextError(f"context {spec}", expected="text", got="none", fix="Write some.")
    return text


def _questions(config: LearnConfig) -> list[str]:
    """As many prompts as are needed, in an order of the seed."""
    shipped = resources.files("steer") / "data" / "questions.txt"
    text = shipped.read_text() if config.prompts is None else read_file(config.prompts)
    every = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    needed = config.n_prompts + config.n_select + config.n_heldout
    if len(every) < needed:
        raise ConfigError(
            f"prompts {config.prompts or 'that are shipped'}",
            expected=f"{needed} different ones, for n_prompts, n_select and n_heldout together",
            got=len(every),
            fix="Write more, or lower these.",
        )
    order = np.random.default_rng(config.seed).permutation(len(every))[:needed]
    return [every[i] for i in order]


def _checked(config: LearnConfig) -> tuple[Scope, list[HookPoint]]:
    scope = Scope.parse(config.scope)
    if scope.role or scope.phase or scope.spares_tool_calls:
        expected = "a scope of all, prompt, generated, after:N, before:N"
        raise ConfigError("key 'scope'", expected=expected, got=f"'{config.scope}'", fix="Leave the other words out.")
    points = [HookPoint.parse(name) for name in config.hook_points]
    if len(set(points)) < len(points):
        got = ", ".join(config.hook_points)
        raise ConfigError("key 'hook_points'", expected="each one once", got=got, fix="Leave one out.")
    return scope, points


def _taught(config: LearnConfig, loaded: LoadedModel, context: str, questions: Sequence[str]) -> Lessons:
    found = lessons(
        loaded,
        questions,
        context,
        place=config.place,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        batch=config.batch,
    )
    a, b = config.n_prompts, config.n_prompts + config.n_select
    return Lessons(found[:a], found[a:b], found[b:])


# --- the vectors -----------------------------------------------------------------------------------------------------


class _Steered:
    """The student that is steered with vectors that may be trained."""

    def __init__(self, loaded: LoadedModel, sites: Sequence[Site], scope: Scope, vectors: Vectors | None = None):
        self._loaded, self._sites, self._scope = loaded, sites, scope
        self._units = torch.tensor([site.mean_norm for site in sites], device=loaded.device) / loaded.d_model**0.5
        start = torch.zeros(len(sites), loaded.d_model) if vectors is None else vectors
        self.moved = (start.float().to(loaded.device) / self._units[:, None]).requires_grad_()
        """what is trained: vectors in units in which those of dose 1 have the length sqrt(d_model), so that a step of
        Adam, which moves every number by about lr, moves each by a dose of about lr"""

    @property
    def vectors(self) -> Vectors:
        """What is added."""
        return self._units[:, None] * self.moved

    def __call__(self, batch: Batch) -> Float[Tensor, "row answer vocab"]:
        acts = acts_on(self._scope, batch)
        with ExitStack() as stack:
            for site, vector in zip(self._sites, self.vectors, strict=True):
                stack.enter_context(edit(self._loaded.model, self._loaded.family, site.point, _adding(vector, acts)))
            return log_probs(self._loaded, batch)


def acts_on(scope: Scope, batch: Batch) -> Bool[Tensor, "row pos"]:
    """The tokens that the runtime steers in a scope of indices, which are never padding or the first of a row."""
    low, high = torch.tensor([scope.bounds(n) for n in batch.prompt_lengths], device=batch.ids.device).T
    return (batch.places >= low[:, None]) & (batch.places < high[:, None])


def _adding(vector: Float[Tensor, " d_model"], acts: Bool[Tensor, "row pos"]) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.where(acts[..., None], (h + vector).to(h.dtype), h)  # as in `steer.tables.applied`


def _shorten(moved: Vectors, max_dose: float) -> None:
    longest = (1 - 1e-6) * max_dose * moved.shape[1] ** 0.5  # rounding must not make the runtime refuse it
    moved.mul_((longest / moved.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0))


@torch.no_grad()
def _difference(
    loaded: LoadedModel, points: Sequence[HookPoint], some: Sequence[Lesson], size: int
) -> tuple[list[float], Vectors, float]:
    """Mean norm of answers' tokens without the context, and mean difference that the context makes, by hook point.

    The difference is taken on the tokens that say something about the answer, from the last one of the prompt on.
    """
    start, norms, differences = time.perf_counter(), [[] for _ in points], [[] for _ in points]
    special = torch.tensor(sorted(special_ids(loaded.tokenizer)), dtype=torch.long)
    for first in range(0, len(some), size):
        group = some[first : first + size]
        answers = [lesson.answer for lesson in group]
        states = []
        for prompts in ([lesson.taught for lesson in group], [lesson.bare for lesson in group]):
            batch = batch_of(loaded, prompts, answers)
            with capture(loaded.model, loaded.family, points) as captured:
                log_probs(loaded, batch)
            states.append([captured[point].float().cpu() for point in points])
        answered, width = batch.answered.cpu(), batch.answered.shape[1]
        says = slice(-width - 1, -1)
        is_text = answered & ~torch.isin(batch.ids[:, -width:].cpu(), special)
        for i, (taught, bare) in enumerate(zip(*states, strict=True)):
            weights = answered[..., None] / answered.sum(1)[:, None, None]
            differences[i].append(((taught[:, says] - bare[:, says]) * weights).sum(1))
            norms[i].append(bare[:, -width:].norm(dim=-1)[is_text])
    found = torch.stack([torch.cat(rows).mean(0) for rows in differences])
    means = [float(torch.cat(rows).mean()) for rows in norms]
    if not np.isfinite(means).all():
        fix = "Raise max_new_tokens."
        raise TextError("answers", expected="tokens of text", got="none but special tokens", fix=fix)
    return means, found, time.perf_counter() - start


# --- what they are worth ---------------------------------------------------------------------------------------------


class _Report:
    """KL on held-out prompts of the vectors and of what they are compared with."""

    def __init__(self, config: LearnConfig, loaded: LoadedModel, taught: Lessons, sites: Sequence[Site], scope: Scope):
        self._config, self._loaded, self._taught, self._sites, self._scope = config, loaded, taught, sites, scope
        self._bare = self._kl(plain(loaded), taught.heldout)
        self._bare_fit = self._kl(plain(loaded), taught.fit)
        self.rows: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    def _kl(self, student: Student, some: Sequence[Lesson]) -> Float[np.ndarray, " prompt"]:
        return divergences(self._loaded, student, some, self._config.batch)

    def _steered(self, vectors: Vectors) -> Student:
        return _Steered(self._loaded, self._sites, self._scope, vectors)

    def _add(self, name: str, kl: Float[np.ndarray, " prompt"], saved: float) -> None:
        sums = np.column_stack([self._bare, kl, np.ones(len(kl))])
        intervals = bootstrap(sums, {"kl": _mean, "kl_recovered": _recovered}, self._config.seed)
        recovered = float(1 - kl.mean() / self._bare.mean())
        row = {"kl": float(kl.mean()), "kl_recovered": recovered, "tokens_saved": saved}
        self.rows[name] = row | {f"{key}_ci95": list(both) for key, both in intervals.items()}

    @property
    def tokens_saved(self) -> float:
        """Tokens of a request that the context takes, on average."""
        return float(np.mean([len(lesson.taught) - len(lesson.bare) for lesson in self._taught.heldout]))

    def add_vectors(self, vectors: Vectors, descent: Descent) -> None:
        """The learned ones."""
        student = self._steered(vectors)
        self._add("nothing", self._bare, self.tokens_saved)
        self._add("vectors", self._kl(student, self._taught.heldout), self.tokens_saved)
        self._add_training("vectors", student, descent)

    def _add_training(self, name: str, student: Student, descent: Descent) -> None:
        kl = float(self._kl(student, self._taught.fit).mean())
        self.facts[name] = {
            "kl_fit": kl,
            "kl_recovered_fit": 1 - kl / float(self._bare_fit.mean()),
            "kept_step": descent.kept,
            "checks": {str(step): value for step, value in descent.checks.items()},
            "losses": descent.losses,
        }
        self.seconds[name] = descent.seconds

    def add_difference(self, difference: Vectors) -> None:
        """The difference in means, at the factor that is best on the prompts for that."""
        start, norms = time.perf_counter(), torch.tensor([site.mean_norm for site in self._sites])
        doses = difference.norm(dim=1) / norms
        factors = [factor for factor in FACTORS if float(doses.max()) * factor <= self._config.max_dose] or [
            self._config.max_dose / float(doses.max())
        ]
        costs = [float(self._kl(self._steered(difference * f), self._taught.select).mean()) for f in factors]
        best = factors[int(np.argmin(costs))]
        self._add(
            "difference_in_means", self._kl(self._steered(difference * best), self._taught.heldout), self.tokens_saved
        )
        self.facts["difference_in_means"] = {"factor": best, "doses": (doses * best).tolist()}
        self.seconds["choosing_its_dose"] = time.perf_counter() - start

    def add_random(self, vectors: Vectors) -> None:
        """Random directions as long as the vectors, the mean over several."""
        generator = torch.Generator().manual_seed(self._config.seed)
        kls = []
        for _ in range(self._config.n_random):
            noise = torch.randn(vectors.shape, generator=generator)
            noise *= vectors.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
            kls.append(self._kl(self._steered(noise), self._taught.heldout))
        self._add("random", np.mean(kls, axis=0), self.tokens_saved)

    def add_soft_prompt(self, context: str, n: int) -> None:
        """A soft prompt of n embeddings."""
        config, loaded, soft = self._config, self._loaded, SoftPrompt.of(self._loaded, context, n)
        student = with_soft_prompt(loaded, soft)
        fit, select = self._taught.fit, self._taught.select
        descent = descend("soft prompt", loaded, student, soft.moved, fit, select, _settings(config, config.soft_lr))
        self._add("soft_prompt", self._kl(student, self._taught.heldout), self.tokens_saved - n)
        self._add_training("soft_prompt", student, descent)

    def finished(self, seconds: dict[str, float], examples: list[dict[str, str]]) -> dict[str, Any]:
        """The receipt, ready for JSON."""
        fit, select, heldout = self._taught
        return {
            "n_prompts": len(heldout),
            "n_fit": len(fit),
            "n_select": len(select),
            "answer_tokens": float(np.mean([len(lesson.answer) for lesson in heldout])),
            "tokens_saved": self.tokens_saved,
            "trainable": len(self._sites) * self._loaded.d_model,
            "kl_fit_nothing": float(self._bare_fit.mean()),
            "conditions": self.rows,
            "training": self.facts,
            "seconds": seconds,
            "examples": examples,
        }


def _mean(sums: Float[np.ndarray, "draw 3"]) -> Float[np.ndarray, " draw"]:
    return sums[:, 1] / sums[:, 2]


def _recovered(sums: Float[np.ndarray, "draw 3"]) -> Float[np.ndarray, " draw"]:
    return 1 - sums[:, 1] / sums[:, 0]


def _examples(
    config: LearnConfig, loaded: LoadedModel, made: Sequence[SteeringVector], heldout: Sequence[Lesson]
) -> list[dict[str, str]]:
    """Answers with the context, and greedy ones without it, steered and not."""
    some = heldout[:EXAMPLES]
    prompts = [lesson.bare for lesson in some] * 2
    rows = [[] for _ in some] + [[Intervention.of(vector) for vector in made] for _ in some]
    with steering(loaded, rows=rows, prompt_lengths=list(map(len, prompts))):
        texts = continuations(loaded, prompts, max_new_tokens=config.max_new_tokens, temperature=0.0, seed=config.seed)
    taught = loaded.tokenizer.batch_decode([lesson.answer for lesson in some], skip_special_tokens=True)
    columns = ([lesson.question for lesson in some], taught, texts[: len(some)], texts[len(some) :])
    return [
        dict(zip(("prompt", "with_context", "without", "steered"), row, strict=True))
        for row in zip(*columns, strict=True)
    ]


# --- what is kept ----------------------------------------------------------------------------------------------------


def _name(config: LearnConfig) -> str:
    if config.name is not None:
        return config.name
    is_file = config.context.endswith((".txt", ".md"))
    words = re.findall(r"[a-z0-9]+", (Path(config.context).stem if is_file else config.context).lower())
    return "-".join(words)[:40].strip("-") or "learned"


def _source(config: LearnConfig, context: str) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"context", "name", "model", "device", "out"})
    source = {"kind": "learned", "context_sha256": hashlib.sha256(context.encode()).hexdigest(), **settings}
    return source | ({"context": context} if len(context) <= SHORT else {})


def _named(
    config: LearnConfig,
    loaded: LoadedModel,
    sites: Sequence[Site],
    scope: Scope,
    vectors: Vectors,
    source: dict[str, Any],
) -> list[SteeringVector]:
    made, name = [], _name(config)
    for site, vector in zip(sites, vectors.numpy(), strict=True):
        length = float(np.linalg.norm(vector))
        full = name if len(sites) == 1 else f"{name}@{site.point}"
        made.append(
            SteeringVector(
                full, vector / length, str(site.point), loaded.ref, site.mean_norm, source, length, scope=str(scope)
            )
        )
    return made
