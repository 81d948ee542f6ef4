"""A conversation with a model that may be steered."""

from typing import Any

import torch

from activations.errors import MissingArtefactError
from activations.models import LoadedModel, Status, chat_prompt, load_model
from steer.config import ChatConfig
from steer.gates import Gate, energy
from steer.generate import generate
from steer.library import find_vector, load_library
from steer.operations import Intervention
from steer.runtime import steering
from steer.scopes import Scope
from steer.vectors import SteeringVector


class Chat:
    """A conversation: each answer sees the turns before it."""

    def __init__(self, config: ChatConfig, loaded: LoadedModel | None = None, *, on_status: Status | None = None):
        """Load model and vector. Raises: as `steer.runtime.steering` does for a vector that does not fit the model."""
        vector = _vector(config)
        self._config = config
        self._turns: list[dict[str, str]] = []
        self._loaded = loaded or load_model(config.model, device=config.device, on_status=on_status)
        self._interventions: list[Intervention] = []
        self.steering: dict[str, Any] = {"vector": None, "coefficient": 0.0, "dose": 0.0}
        if vector is not None:
            coefficient = _coefficient(config, vector)
            scope = None if config.scope is None else Scope.parse(config.scope)
            intervention = Intervention.of(vector, coefficient, scope=scope, gate=_gate(config, vector))
            with steering(self._loaded, [intervention], prompt_lengths=[0], force=config.force):
                pass  # refuses what does not fit before anybody types a question
            self._interventions = [intervention]
            self.steering = {"vector": vector.name, "coefficient": coefficient, "dose": vector.dose(coefficient)}

    def answer(self, text: str) -> str:
        """The model's answer to `text`, or its continuation if the config says `plain`."""
        config = self._config
        self._turns.append({"role": "user", "content": text})
        prompt = text if config.plain else chat_prompt(self._loaded, self._turns, system=config.system)
        (answer,) = generate(
            self._loaded,
            [prompt],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            interventions=self._interventions,
            add_special_tokens=config.plain,
            force=config.force,
        )
        self._turns.append({"role": "assistant", "content": answer.strip()})
        return answer.strip()


def _vector(config: ChatConfig) -> SteeringVector | None:
    if config.library is None:
        return None
    name = config.vector or next(iter(load_library(config.library)), None)
    if name is None:
        raise MissingArtefactError(
            config.library,
            expected="a library with a vector",
            got="none in it",
            fix="Make one with: saekit vector make",
        )
    return find_vector(config.library, name)


def _coefficient(config: ChatConfig, vector: SteeringVector) -> float:
    if config.dose is not None:
        return vector.coefficient_of(config.dose)
    return config.coefficient if config.coefficient is not None else vector.coefficient


def _gate(config: ChatConfig, vector: SteeringVector) -> Gate | None:
    if config.gate is None:
        return None
    readout = energy(torch.from_numpy(vector.direction), vector.hook_point)
    return Gate(readout, config.gate, config.gate_off, config.gate_tokens, vector.name)
