"""The libraries that an engine steers with, and what a request makes of them.

Flow: 1. libraries are opened once, when the engine starts, and refused if they are of other weights; 2. their hook
points are where the model gets tables; 3. a request becomes interventions, both by `steer.serving.catalogue`, as for
`saekit serve`; 4. what vLLM cannot do is refused; 5. `steer.plan` turns the rest into slots, as it does for the
transformers runtime.

vLLM's model is not the one of transformers, so a `LoadedModel` is stood in for by what its config tells. Left out:
hook points other than `resid_post`, and gates and scopes that need more room than `steer.packed.prepared` has: each is
refused with the reason.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from activations.errors import ConfigError
from activations.families import family_of_config
from activations.hook_points import HookPoint
from activations.models import LoadedModel, Source, load_tokenizer
from sae.artefact import SaeArtefact
from sae.wiring import Wiring
from steer.gates import gates_of
from steer.latents import Places, places_of
from steer.operations import Intervention
from steer.packed.prepared import Prepared, check_room, prepared
from steer.serving import catalogue as serving
from steer.serving.items import Asked
from steer.tables import LaneKey
from steer.vllm.request import key_of

SITE = "resid_post"
_PREPARED = 256
"""requests whose slots are kept, as the same ones often come again"""


class Catalogue:
    """Libraries, for one model."""

    def __init__(self, model: LoadedModel, libraries: Sequence[str], n_slots: int):
        """Open them.

        Args:
          n_slots: room that a request has in each lane.
        Raises: as `steer.serving.catalogue.Catalogue.open` does.
        """
        self.model, self.n_slots = model, n_slots
        self._shared = serving.Catalogue.open(libraries, model, advice="Ask for what the engine was started with.")
        self._prepared = lru_cache(_PREPARED)(self._prepare)

    @property
    def hashes(self) -> dict[str, str]:
        """Name -> content hash."""
        return {shelf.name: shelf.content_sha256 for shelf in self._shared.shelves}

    @property
    def points(self) -> list[HookPoint]:
        """Where anything may be read or act, in the order of a pass; those that cannot be steered here left out."""
        libraries = [shelf.library for shelf in self._shared.shelves]
        vectors = [vector for library in libraries for vector in library.vectors.values()]
        names = {vector.hook_point for vector in vectors}
        names |= {str(gate.readout.hook_point) for vector in vectors for gate in gates_of(vector.gate)}
        names |= {str(point) for _, places in self._saes for point in places}
        points = [HookPoint.parse(name) for name in names if re.fullmatch(rf"{SITE}\.\d+", name)]
        return sorted((p for p in points if p.layer < self.model.n_layers), key=lambda point: point.depth)

    @property
    def lanes(self) -> list[LaneKey]:
        """Those of the libraries' SAEs, as far as they read and act at one of the hook points."""
        keys = [LaneKey.of(places.writes, places.reads, sae) for sae, places in self._saes]
        points = {*self.points}
        return [key for key in keys if key.acts in points and key.reads in points]

    @cached_property
    def _saes(self) -> list[tuple[SaeArtefact, Places]]:
        """Those that are in the libraries, and have latents that can be clamped."""
        shelves = [each for each in self._shared.shelves if each.library.sae is not None and each.library.sae.dtype]
        found = [(shelf.sae(), Wiring.parse(shelf.sae().hook_point)) for shelf in shelves]
        return [(sae, places_of(sae)) for sae, wiring in found if len(wiring.reads) == len(wiring.writes) == 1]

    def key(self, request: Asked) -> str:
        """What makes two requests steer in the same way."""
        return key_of(request, self.hashes)

    def prepare(self, request: Asked, n_prompt: int) -> Prepared:
        """What it comes to, which is not to be changed, as the same request gets the same again.

        Raises: as `steer.plan.Plan` does, and for what this backend cannot do.
        """
        return self._prepared(request.model_dump_json(), n_prompt)

    def _prepare(self, asked: str, n_prompt: int) -> Prepared:
        request = Asked.model_validate_json(asked)
        interventions = self.interventions(request)
        for each in interventions:
            check_supported(each)
        _, found = prepared(self.model, interventions, n_prompt, request.budget)
        check_room(found)
        for lane, (slots,) in found.contents.items():
            if len(slots) > self.n_slots:
                expected = f"at most {self.n_slots} operations of one kind there, as the engine was started"
                fix = "Steer with fewer, or start it with a larger SAEKIT_VLLM_SLOTS."
                raise ConfigError(f"steering at {lane.acts}", expected=expected, got=len(slots), fix=fix)
        return found

    def interventions(self, request: Asked) -> list[Intervention]:
        """What a request asks for. Raises: as `steer.serving.catalogue.Catalogue.prepare` does."""
        return self._shared.prepare([request]).interventions

    def record(self, request: Asked) -> dict[str, Any]:
        """What a request is steered by, to be kept with its answer: its key, the server's account, and its budget."""
        found = self._shared.prepare([request])
        return {"key": self.key(request), "steering": found.account, "budget": found.budget}


class Markers:
    """What `steer.scopes` asks a tokenizer for, which is read when the first scope does, as most engines need none."""

    def __init__(self, folder: Callable[[], Path]):
        self._folder = folder

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._folder())

    @property
    def chat_template(self) -> Any:
        """What marks turns. Raises: ModelError if there is no tokenizer that transformers reads."""
        return self._tokenizer.chat_template

    def apply_chat_template(self, turns: list[dict[str, Any]], **how: Any) -> Any:
        """What the chat template writes."""
        return self._tokenizer.apply_chat_template(turns, **how)

    def encode(self, text: str, **how: Any) -> list[int]:
        """The ids of a text."""
        return self._tokenizer.encode(text, **how)


def model_of(source: Source, config: Any) -> LoadedModel:
    """The stand-in for a model that vLLM serves.

    Args:
      config: of Hugging Face.
    Raises: UnknownNameError for a family that saekit does not know; ConfigError for one with several streams.
    """
    folder = source.folder.resolve()
    family = family_of_config(config, where=str(folder))
    place = family.sites(config)[SITE]
    if place.streams or place.path:
        fix = "Serve it with the transformers backend."
        raise ConfigError(str(folder), expected="blocks that return one residual stream", got=family.name, fix=fix)
    return stand_in(family, config, str(folder), source.fingerprint(), Markers(lambda: folder))


def stand_in(family: Any, config: Any, name: str, fingerprint: str, tokenizer: Any) -> LoadedModel:
    """A model of which no more is known than this."""
    return LoadedModel(
        model=SimpleNamespace(config=config),  # type: ignore[arg-type]
        tokenizer=tokenizer,
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


def check_supported(each: Intervention) -> None:
    """Raise ConfigError, with the reason, for what the transformers backend can do and this one cannot."""
    for point in (each.acts_at, each.reads_at, *(gate.readout.hook_point for gate in gates_of(each.gate))):
        if point is not None and point.site != SITE:
            fix = "Use the transformers backend."
            raise ConfigError(str(each), expected=f"{SITE}, under vLLM", got=point, fix=fix)
