"""A conversation with a model that may be steered, and that is steered otherwise while it goes on.

Flow: 1. a line becomes a command (`steer.chat.commands`); 2. a command changes the state (`steer.chat.state`), which is
taken over if the model can be steered so; 3. something to say becomes an answer, in pieces, and a turn.

Every answer reads the whole conversation anew, under what steers at that moment: what the model remembers of earlier
turns is always as it is steered now, and nothing of another dose is left in a cache.

Left out: reading a transcript back; printing (`steer.chat.terminal`).
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from activations.chat import chat_prompt
from activations.errors import ConfigError, MissingArtefactError, UnknownNameError
from activations.models import LoadedModel, Status, load_model
from steer.chat import commands
from steer.chat.commands import Command
from steer.chat.state import (
    ChatState,
    GateLevels,
    Sampling,
    Steer,
    Turn,
    added,
    changed,
    for_retry,
    operated,
    removed,
    sampled,
    undone,
)
from steer.config import ChatConfig
from steer.generate import Stream, streaming
from steer.library import find_vectors, group_name, load_library
from steer.runtime import steering
from steer.vectors import SteeringVector


class Chat:
    """A conversation: each answer sees the turns before it."""

    def __init__(self, config: ChatConfig, loaded: LoadedModel | None = None, *, on_status: Status | None = None):
        """Load model and vectors. Raises: as `steer.runtime.steering` does for a vector that does not fit the model."""
        self._config = config
        self.libraries: list[Path] = [] if config.library is None else [config.library]
        start = ChatState(Sampling(config.system, config.temperature, config.seed, config.max_new_tokens))
        for name, dose in _chosen(config):
            start = added(start, self._configured(name, dose))
        self._loaded = loaded or load_model(
            config.model, device=config.device, quantization=config.quantization, on_status=on_status
        )
        self._check(start)
        self.state = start
        self._saved: set[Path] = set()

    # --- commands ----------------------------------------------------------------------------------------------------

    def apply(self, command: Command) -> None:
        """Carry out a command that changes what steers, how answers are drawn, or files.

        Raises: SaekitError, with nothing changed.
        """
        state = self._after(command)
        if state.steers != self.state.steers:
            self._check(state)
        self.state = state

    def _after(self, command: Command) -> ChatState:
        state = self.state
        match command:
            case commands.Add(name, dose):
                return added(state, Steer(name, self.find(name), dose))
            case commands.Dose(name, dose):
                return changed(state, name, dose=dose)
            case commands.Op(name, operation):
                return operated(state, name, operation)
            case commands.SetScope(name, words):
                return changed(state, name, scope=words)
            case commands.SetGate(name, on, off, tokens):
                gate = None if on is None else GateLevels(on, off, tokens or 1)
                return changed(state, name, gate=gate, may_have_own_gate=False)
            case commands.Remove(name):
                return removed(state, name)
            case commands.Clear():
                return replace(state, steers=())
            case commands.CompareAll(is_on):
                return replace(state, compares=is_on)
            case commands.Undo():
                return undone(state)
            case commands.System(text):
                return sampled(state, system=text)
            case commands.Temperature(value):
                return sampled(state, temperature=value)
            case commands.Seed(value):
                return sampled(state, seed=value)
            case commands.Tokens(value):
                return sampled(state, max_new_tokens=value)
            case commands.Save(path):
                self._save(Path(path).expanduser())
            case commands.Load(path):
                load_library(Path(path).expanduser())
                self.libraries.insert(0, Path(path).expanduser())
        return state

    def find(self, name: str) -> tuple[SteeringVector, ...]:
        """The vectors of a name, from the library that was loaded last of those that have it.

        Raises: UnknownNameError listing the names there are; MissingArtefactError if there is no library.
        """
        for library in self.libraries:
            try:
                return tuple(find_vectors(library, name))
            except UnknownNameError:
                continue
        names = [name for library in self.libraries for name in load_library(library)]
        expected = f"one of {', '.join(names)}" if names else "a library with vectors"
        got = f"'{name}'" if names else "none"
        raise UnknownNameError(
            f"vector '{name}'", expected=expected, got=got, fix="Correct the name, or /load another."
        )

    def _configured(self, name: str, dose: float | None) -> Steer:
        config = self._config
        gate = None if config.gate is None else GateLevels(config.gate, config.gate_off, config.gate_tokens)
        return Steer(name, self.find(name), dose, None, config.scope, gate)

    def _check(self, state: ChatState) -> None:
        """Refuse what the model cannot be steered with, before anybody waits for an answer."""
        config = self._config
        with steering(
            self._loaded, state.interventions(), prompt_lengths=[0], force=config.force, budget=config.budget
        ):
            pass

    def _save(self, path: Path) -> None:
        model = {"model": self._loaded.id, "fingerprint": self._loaded.fingerprint}
        lines = [json.dumps(turn.record() | model, ensure_ascii=False) + "\n" for turn in self.state.turns]
        if path.exists() and path.resolve() not in self._saved:
            raise ConfigError(path, expected="a file that is not there yet", got="one", fix="Choose another name.")
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text("".join(lines))
            partial.replace(path)
        except OSError as error:
            fix = "Choose another place."
            raise ConfigError(path, expected="a file to write", got=error.strerror, fix=fix) from error
        self._saved.add(path.resolve())

    # --- answers -----------------------------------------------------------------------------------------------------

    def answer(self, text: str) -> str:
        """The model's answer to `text`, or its continuation if the config says `plain`."""
        for _ in self.say(text):
            pass
        return self.state.turns[-1].answer

    def retry(self, compares: bool | None = None) -> Iterator[list[str]]:
        """As `say`, the last question again, as things are now; if nothing changed, with the next seed."""
        text = self.state.last().user
        back = undone(self.state) if compares else for_retry(self.state)
        return self._answered(back, text, compares)

    def say(self, text: str, compares: bool | None = None) -> Iterator[list[str]]:
        """The answer to `text` as it is written: pieces of one text, or of two, steered and not.

        The turn is part of the conversation once the iterator has ended, or was closed or interrupted after a token.

        Args:
          compares: whether the unsteered model answers too; none: as the state says.
        Raises: ConfigError if the conversation is too long for the model; nothing has changed then.
        """
        return self._answered(self.state, text, compares)

    def _answered(self, state: ChatState, text: str, compares: bool | None) -> Iterator[list[str]]:
        config, sampling = self._config, state.sampling
        n = 2 if (state.compares if compares is None else compares) else 1
        messages = [*state.messages(), {"role": "user", "content": text}]
        prompt = text if config.plain else chat_prompt(self._loaded, messages, system=sampling.system)
        with streaming(
            self._loaded,
            [prompt] * n,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=[sampling.seed] * n,
            rows=[state.interventions(), []][:n],
            add_special_tokens=config.plain,
            force=config.force,
            budget=config.budget,
        ) as stream:
            steps: list[list[str]] = []
            is_whole = False
            try:
                for pieces in stream.pieces:
                    steps.append(pieces)
                    yield pieces
                is_whole = True
            finally:
                if steps:
                    turn = _turn(text, state, stream, steps, is_whole)
                    self.state = replace(state, turns=(*state.turns, turn))


def _turn(text: str, state: ChatState, stream: Stream, steps: list[list[str]], is_whole: bool) -> Turn:
    """What is kept of an answer."""
    said = ["".join(row).strip() for row in zip(*steps, strict=True)]
    log = stream.steered.fired()
    return Turn(
        user=text,
        answer=said[0],
        unsteered=said[1] if len(said) > 1 else None,
        is_whole=is_whole,
        sampling=state.sampling,
        steering=state.steering(),
        fired=log[0] if log else {},
        n_prompt=stream.prompt_lengths[0],
        pieces=tuple(step[0] for step in steps),
    )


def _chosen(config: ChatConfig) -> list[tuple[str, float | None]]:
    """Names and doses to start with."""
    if config.library is None:
        if config.vectors:
            fix = "Write --set library=FOLDER."
            raise ConfigError("vectors", expected="a library that they are in", got="none", fix=fix)
        return []
    if config.vectors is None:
        first = next(iter(load_library(config.library)), None)
        if first is None:
            fix = "Make one with: saekit vector make"
            raise MissingArtefactError(config.library, expected="a library with a vector", got="none in it", fix=fix)
        return [(group_name(first), None)]
    added = [commands.parse(f"/add {words}") for words in config.vectors]
    return [(each.name, each.dose) for each in added if isinstance(each, commands.Add)]


def summary(state: ChatState) -> list[dict[str, Any]]:
    """What steers, one row a vector."""
    return [vector | {"gate": steer["gate"]} for steer in state.steering() for vector in steer["vectors"]]
