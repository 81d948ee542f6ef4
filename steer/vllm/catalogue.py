"""The libraries that an engine steers with, and what a request makes of them.

Flow: 1. libraries are opened once, when the engine starts, and refused if their vectors are of other weights; 2. their
hook points are where the model gets tables; 3. a request becomes interventions, which `steer.plan` checks and turns
into slots, just as it does for the transformers runtime.

vLLM's model is not the one of transformers, so a `LoadedModel` is stood in for by what its config tells. Left out:
roles, phases and tool calls in scopes, SAEs whose threshold depends on the token (TopK), hook points other than
`resid_post`, and gates that need more room than MAX_GATES, MAX_CLAUSES and MAX_AGE: each is refused with the reason.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from activations.errors import ConfigError, MismatchError, MissingArtefactError, UnknownNameError
from activations.families import family_of_config
from activations.fingerprints import cache_dir
from activations.hook_points import HookPoint
from activations.models import LoadedModel, fingerprint_folder, read_config
from activations.store_schema import ModelRef
from sae.artefact import SaeArtefact
from steer.chat.state import Steer
from steer.gates import Condition, Gate, gates_of, joined, parts_of
from steer.library import Library, group_name
from steer.manifest import SAE, read_manifest
from steer.operations import Clamp, ClampLatents, Intervention, ScaleLatents
from steer.packs.installed import resolve
from steer.plan import Contents, Plan
from steer.scopes import EVERYWHERE, Scope
from steer.vectors import SteeringVector, from_latent
from steer.vllm.request import Item, Request

MAX_GATES = 4
"""gates of one request"""
MAX_CLAUSES = 4
"""alternatives of one condition"""
MAX_AGE = 16
"""most tokens that a gate may be asked to stay open for at least"""
SITE = "resid_post"


class Prepared(NamedTuple):
    """What a request comes to, for a prompt of so many tokens."""

    contents: Contents
    """lane -> its slots, as the only row"""
    gates: list[Gate]
    """in the order of the flags that slots ask for"""
    bounds: list[tuple[int, int]]
    """lowest index, and the index behind the highest one, of every scope"""


@dataclass(frozen=True)
class Shelf:
    """One library."""

    name: str
    path: Path
    library: Library
    content_sha256: str

    @cached_property
    def sae(self) -> SaeArtefact:
        """Raises: MissingArtefactError if the library has none."""
        if self.library.sae is None or self.library.sae.dtype is None:
            fix = "Steer with its vectors, or add the SAE with saekit library add."
            raise MissingArtefactError(self.name, expected="an SAE in the library", got="none", fix=fix)
        return SaeArtefact.load(self.path / SAE)


class Catalogue:
    """Libraries, for one model."""

    def __init__(self, model: LoadedModel, libraries: Sequence[str], n_slots: int):
        """Open them.

        Args:
          n_slots: room that a request has in each lane.
        Raises: ConfigError for two of one name, MismatchError for one of another model; as `Library.open` does.
        """
        self.model, self.n_slots = model, n_slots
        self._shelves: dict[str, Shelf] = {}
        for each in libraries:
            shelf = _open(each)
            if shelf.name in self._shelves:
                fix = "Leave one out, or give it another name."
                raise ConfigError(f"library '{shelf.name}'", expected="one of this name", got="two", fix=fix)
            self._check_model(shelf)
            self._shelves[shelf.name] = shelf

    @property
    def hashes(self) -> dict[str, str]:
        """Name -> content hash."""
        return {name: shelf.content_sha256 for name, shelf in self._shelves.items()}

    @property
    def points(self) -> list[HookPoint]:
        """Where anything may be read or act, in the order of a pass; those that cannot be steered here left out."""
        names = {v.hook_point for shelf in self._shelves.values() for v in shelf.library.vectors.values()}
        for shelf in self._shelves.values():
            names |= {str(g.readout.hook_point) for v in shelf.library.vectors.values() for g in gates_of(v.gate)}
            names |= {shelf.library.sae.hook_point} if shelf.library.sae is not None else set()
        points = [HookPoint.parse(name) for name in names if re.fullmatch(rf"{SITE}\.\d+", name)]
        return sorted((p for p in points if p.layer < self.model.n_layers), key=lambda point: point.depth)

    def key(self, request: Request) -> str:
        """What makes two requests steer in the same way."""
        return request.key(self._shelf(request).content_sha256)

    def prepare(self, request: Request, n_prompt: int) -> Prepared:
        """Raises: as `steer.plan.Plan` does, and for what this backend cannot do."""
        interventions = self.interventions(request)
        for each in interventions:
            _check_supported(each)
        plan = Plan(self.model, (), [interventions], [n_prompt], (), False, request.budget)
        contents = plan.contents((), [interventions], [n_prompt])
        if len(plan.gates) > MAX_GATES:
            fix = "Leave some out."
            raise ConfigError("gates", expected=f"at most {MAX_GATES} a request", got=len(plan.gates), fix=fix)
        for lane, (slots,) in contents.items():
            if len(slots) > self.n_slots:
                expected = f"at most {self.n_slots} operations of one kind there, as the engine was started"
                fix = "Steer with fewer, or start it with a larger SAEKIT_VLLM_SLOTS."
                raise ConfigError(f"steering at {lane.acts}", expected=expected, got=len(slots), fix=fix)
        for row in (row for rows in contents.values() for row in rows[0]):
            if len(row.where.clauses) > MAX_CLAUSES:
                got, fix = len(row.where.clauses), "Simplify the condition."
                raise ConfigError("gate", expected=f"at most {MAX_CLAUSES} alternatives", got=got, fix=fix)
        bounds = dict.fromkeys(each.scope.bounds(n_prompt) for each in interventions)
        return Prepared(contents, plan.gates, list(bounds))

    def interventions(self, request: Request) -> list[Intervention]:
        """What a request asks for. Raises: UnknownNameError for a library, vector or latent that there is not."""
        shelf = self._shelf(request)
        return [each for number, item in enumerate(request.steer, 1) for each in _interventions(shelf, number, item)]

    def record(self, request: Request) -> dict[str, Any]:
        """What a request is steered by, to be kept with its answer: hashes, operations and coefficients."""
        shelf = self._shelf(request)
        return {
            "key": self.key(request),
            "library": {"name": shelf.name, "content_sha256": shelf.content_sha256},
            "steer": [entry for item in request.steer for entry in _record(shelf, item)],
            "budget": request.budget,
        }

    def _shelf(self, request: Request) -> Shelf:
        if request.library not in self._shelves:
            expected = f"one of {', '.join(self._shelves) or 'none: the engine was started without libraries'}"
            fix = "Correct the name, or start the engine with that library."
            raise UnknownNameError("library", expected=expected, got=repr(request.library), fix=fix)
        return self._shelves[request.library]

    def _check_model(self, shelf: Shelf) -> None:
        for vector in shelf.library.vectors.values():
            if vector.model.fingerprint != self.model.fingerprint:
                raise MismatchError(
                    f"library '{shelf.name}': vector '{vector.name}'",
                    expected=f"one of the weights that vLLM serves, {self.model.fingerprint[:12]}",
                    got=f"one of {vector.model.id}, {vector.model.fingerprint[:12]}",
                    fix="Serve the model that it was made from, from the folder that saekit read it from.",
                )


def model_of(folder: Path, config: Any) -> LoadedModel:
    """The stand-in for a model that vLLM serves.

    A folder that saekit made of a GGUF file has the fingerprint of that file, which is its name.

    Args:
      config: of Hugging Face.
    Raises: UnknownNameError for a family that saekit does not know; ConfigError for one with several streams.
    """
    family = family_of_config(config, where=str(folder))
    place = family.sites(config)[SITE]
    if place.streams or place.path:
        fix = "Serve it with the transformers backend."
        raise ConfigError(str(folder), expected="blocks that return one residual stream", got=family.name, fix=fix)
    is_converted = folder.parent == (cache_dir() / "models").resolve()
    fingerprint = folder.name if is_converted else fingerprint_folder(folder, read_config(folder))
    return stand_in(family, config, str(folder), fingerprint)


def stand_in(family: Any, config: Any, name: str, fingerprint: str) -> LoadedModel:
    """A model of which no more is known than this; its tokenizer has no chat template."""
    return LoadedModel(
        model=SimpleNamespace(config=config),  # type: ignore[arg-type]
        tokenizer=SimpleNamespace(chat_template=None),  # type: ignore[arg-type]
        family=family,
        spec=name,
        id=name,
        fingerprint=fingerprint,
        tokenizer_fingerprint="",
        d_model=family.d_model(config),
        n_layers=family.n_layers(config),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def _open(library: str) -> Shelf:
    path = resolve(library)
    opened = Library.open(path)
    return Shelf(opened.about.name or path.name, path, opened, str(read_manifest(path)["content_sha256"]))


# --- items ----------------------------------------------------------------------------------------------------------


def _interventions(shelf: Shelf, number: int, item: Item) -> list[Intervention]:
    if (item.vector is None) == (item.latent is None):
        raise ConfigError(
            f"steer item {number}", expected="a vector or a latent", got="both or neither", fix="Give one."
        )
    if item.latent is not None and item.operation in ("clamp", "scale"):
        return [_of_latent(shelf, number, item, item.latent)]
    if item.operation == "scale" or item.value is not None:
        fix = "Use dose, or name a latent with clamp or scale."
        raise ConfigError(f"steer item {number}", expected="a value for a latent alone", got="another", fix=fix)
    vectors = _vectors(shelf, item)
    known: dict[Gate, Gate] = {}
    gates = {
        v.name: _numbered(v.gate if item.gate is None else v.energy_gate(*_levels(item)), number, known)
        for v in vectors
    }
    if item.operation == "clamp":
        return [_clamped(vector, item, gates[vector.name]) for vector in vectors]
    used = [
        replace(v, gate=gates[v.name], window=v.window if item.operation in (None, v.operation) else None)
        for v in vectors
    ]
    return Steer(f"{number} {_name(vectors)}", tuple(used), item.dose, item.operation, item.scope).interventions()


def _levels(item: Item) -> tuple[float, float | None, int]:
    assert item.gate is not None
    return item.gate.on, item.gate.off, item.gate.tokens


def _name(vectors: Sequence[SteeringVector]) -> str:
    return vectors[0].name if len(vectors) == 1 else group_name(vectors[0].name)


def _vectors(shelf: Shelf, item: Item) -> list[SteeringVector]:
    if item.latent is None:
        return shelf.library.find(shelf.name, item.vector)
    return [from_latent(shelf.sae, item.latent, _model_of_sae(shelf), _mean_norm(shelf))]


def _clamped(vector: SteeringVector, item: Item, gate: Condition | None) -> Intervention:
    if item.dose is None:
        fix = "Give the dose that the projection is to have."
        raise ConfigError(f"clamp of '{vector.name}'", expected="a dose", got="none", fix=fix)
    target = item.dose * vector.mean_norm
    return Intervention(
        Clamp(torch.from_numpy(vector.direction), target, target),
        HookPoint.parse(vector.hook_point),
        Scope.parse(item.scope or vector.scope),
        gate,
        vector.model.fingerprint,
        vector.mean_norm,
        name=f"vector '{vector.name}'",
    )


def _of_latent(shelf: Shelf, number: int, item: Item, latent: int) -> Intervention:
    if item.value is None or item.dose is not None:
        fix = "Say value: an activation for clamp, a factor for scale."
        raise ConfigError(f"steer item {number}", expected="a value and no dose", got="another", fix=fix)
    sae = shelf.sae
    operation = (
        ClampLatents(sae, {latent: item.value}) if item.operation == "clamp" else ScaleLatents(sae, {latent: item.value})
    )
    gate = None
    if item.gate is not None:
        vector = from_latent(sae, latent, _model_of_sae(shelf), _mean_norm(shelf))
        gate = _numbered(vector.energy_gate(*_levels(item)), number, {})
    scope = EVERYWHERE if item.scope is None else Scope.parse(item.scope)
    model, norm = _model_of_sae(shelf), _mean_norm(shelf)
    return Intervention(operation, None, scope, gate, model.fingerprint, norm, name=f"latent {latent}")


def _model_of_sae(shelf: Shelf) -> ModelRef:
    found = next(iter(shelf.library.vectors.values()), None)
    if found is None:
        fix = "Add a vector of the same hook point."
        raise MissingArtefactError(shelf.name, expected="a vector, which names the model", got="none", fix=fix)
    return found.model


def _mean_norm(shelf: Shelf) -> float:
    for vector in shelf.library.vectors.values():
        if shelf.library.sae is not None and vector.hook_point == shelf.library.sae.hook_point:
            return vector.mean_norm
    fix = "Add a vector of that hook point."
    raise MissingArtefactError(shelf.name, expected="the mean norm where its SAE writes", got="none", fix=fix)


def _numbered(condition: Condition | None, number: int, known: dict[Gate, Gate]) -> Condition | None:
    """The same with the item's number in front of the names of its gates, which have to differ within a request."""
    if condition is None:
        return None
    if isinstance(condition, Gate):
        return known.setdefault(condition, replace(condition, name=f"{number} {condition.name}"))
    how, parts = parts_of(condition)
    return joined(how, [each for part in parts if (each := _numbered(part, number, known)) is not None])


def _check_supported(each: Intervention) -> None:
    scope, sae = each.scope, each.operation.sae
    if scope.role is not None or scope.phase is not None or scope.spares_tool_calls:
        fix = "Use prompt, generated, after:N and before:N here, or the transformers backend."
        got = "a scope of roles, phases or tool calls"
        raise ConfigError(f"scope '{scope}'", expected="one of positions, under vLLM", got=got, fix=fix)
    if sae is not None and sae.architecture == "topk":
        fix = "Add, rotate or ablate the latent, or use the transformers backend."
        got = "a TopK SAE, all of whose pre-activations would be needed"
        raise ConfigError(str(each), expected="an SAE with a threshold of its own, under vLLM", got=got, fix=fix)
    if each.reads_at not in (None, each.acts_at):
        got, fix = f"one that reads {each.reads_at}", "Use the transformers backend."
        raise ConfigError(str(each), expected=f"what reads where it acts, {each.acts_at}, under vLLM", got=got, fix=fix)
    for point in (each.acts_at, *(gate.readout.hook_point for gate in gates_of(each.gate))):
        if point is not None and point.site != SITE:
            fix = "Use the transformers backend."
            raise ConfigError(str(each), expected=f"{SITE}, under vLLM", got=point, fix=fix)
    for gate in gates_of(each.gate):
        if gate.min_tokens > MAX_AGE:
            got, fix = gate.min_tokens, "Ask for fewer."
            raise ConfigError(f"gate '{gate.name}'", expected=f"at most {MAX_AGE} tokens", got=got, fix=fix)


def _record(shelf: Shelf, item: Item) -> list[dict[str, Any]]:
    if item.latent is not None and item.operation in ("clamp", "scale"):
        sha256, point = shelf.sae.sha256, shelf.sae.hook_point
        about = {"latent": item.latent, "sae_sha256": sha256, "hook_point": point, "value": item.value}
        return [about | _shared(item, item.operation, EVERYWHERE)]
    vectors = _vectors(shelf, item)
    if item.operation == "clamp":
        coefficients = [(item.dose or 0.0) * vector.mean_norm for vector in vectors]
    else:
        coefficients = Steer("", tuple(vectors), item.dose, item.operation, item.scope).coefficients
    return [
        {"vector": v.name, "sha256": v.sha256, "hook_point": v.hook_point, "coefficient": c}
        | _shared(item, item.operation or v.operation, v.scope)
        for v, c in zip(vectors, coefficients, strict=True)
    ]


def _shared(item: Item, operation: str, scope: Scope | str) -> dict[str, Any]:
    gate = None if item.gate is None else item.gate.model_dump(mode="json")
    return {"operation": operation, "scope": item.scope or str(scope), "gate": gate}
