"""What is typed in a chat: a command, or something to say.

    parse("/add joyful 0.4")    Add(name='joyful', dose=0.4)
    parse("How are you?")       Say(text='How are you?')

A line that starts with `/` is a command, one that starts with `//` says what is behind the first stroke. Names with
spaces are quoted as in a shell. `str` of a command is what to type for it. Left out: carrying them out
(`steer.chat.session`).
"""

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from activations.errors import ConfigError, UnknownNameError

WRONG = "Type /help for the commands."


class Command:
    """One line of a chat."""

    def __str__(self) -> str:
        """What to type for it."""
        words = [_word(value) for value in vars(self).values() if value is not None]
        return " ".join([f"/{_NAMES[type(self)]}", *words])


@dataclass(frozen=True)
class Say(Command):
    """Something for the model to answer."""

    text: str

    def __str__(self) -> str:
        """The text, which must not look like a command."""
        return f"/{self.text}" if self.text.startswith("/") else self.text


@dataclass(frozen=True)
class Help(Command):
    """List the commands."""


@dataclass(frozen=True)
class Vectors(Command):
    """List the vectors of the libraries."""


@dataclass(frozen=True)
class Add(Command):
    """Steer with one more vector."""

    name: str
    dose: float | None = None
    """none: its own"""


@dataclass(frozen=True)
class Dose(Command):
    """Give a vector another dose; negative steers the other way."""

    name: str
    dose: float


@dataclass(frozen=True)
class Op(Command):
    """Use a vector for something else."""

    name: str
    operation: str
    """a key of `steer.operations.VECTOR_OPERATIONS`"""


@dataclass(frozen=True)
class SetScope(Command):
    """Steer with a vector on some tokens only."""

    name: str
    words: str

    def __str__(self) -> str:
        """Its words are not quoted."""
        return f"/scope {_word(self.name)} {self.words}"


@dataclass(frozen=True)
class SetGate(Command):
    """Steer with a vector only while its energy is high."""

    name: str
    on: float | None
    """none: always"""
    off: float | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        """`off` stands for no gate."""
        rest = [_word(value) for value in (self.on, self.off, self.tokens) if value is not None]
        return " ".join([f"/gate {_word(self.name)}", *(rest or ["off"])])


@dataclass(frozen=True)
class Remove(Command):
    """Steer no longer with a vector."""

    name: str


@dataclass(frozen=True)
class Clear(Command):
    """Steer no longer at all."""


@dataclass(frozen=True)
class Show(Command):
    """Say what steers now."""


@dataclass(frozen=True)
class Compare(Command):
    """Answer once beside the unsteered model."""

    text: str | None = None
    """none: the last question again"""

    def __str__(self) -> str:
        """Text is not quoted."""
        return "/compare" if self.text is None else f"/compare {self.text}"


@dataclass(frozen=True)
class CompareAll(Command):
    """Answer beside the unsteered model from now on, or no longer."""

    is_on: bool

    def __str__(self) -> str:
        """On or off."""
        return f"/compare {'on' if self.is_on else 'off'}"


@dataclass(frozen=True)
class Retry(Command):
    """Answer the last question again."""


@dataclass(frozen=True)
class Undo(Command):
    """Forget the last question and answer."""


@dataclass(frozen=True)
class System(Command):
    """Another system message."""

    text: str | None = None
    """none: the chat template's own"""

    def __str__(self) -> str:
        """Text is not quoted, but for an empty one."""
        return "/system" if self.text is None else f"/system {self.text or EMPTY}"


@dataclass(frozen=True)
class Temperature(Command):
    """Sample at another temperature."""

    value: float


@dataclass(frozen=True)
class Seed(Command):
    """Sample with another seed."""

    value: int


@dataclass(frozen=True)
class Tokens(Command):
    """Let answers be longer or shorter."""

    value: int


@dataclass(frozen=True)
class Save(Command):
    """Write the conversation to a file."""

    path: str


@dataclass(frozen=True)
class Load(Command):
    """Take the vectors of another library too."""

    path: str


EMPTY = '""'
"""how an empty text is typed"""


def parse(line: str) -> Command:
    """The command on a line.

    Raises: UnknownNameError for a command that does not exist, ConfigError for one that lacks something.
    """
    line = line.strip()
    if not line.startswith("/"):
        return Say(line)
    if line.startswith("//"):
        return Say(line[1:])
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        raise UnknownNameError(
            f"/{name}", expected=f"one of {', '.join(f'/{each}' for each in COMMANDS)}", got=f"/{name}", fix=WRONG
        )
    return COMMANDS[name].read(rest.strip(), f"/{name} {COMMANDS[name].arguments}".strip())


# --- reading ---------------------------------------------------------------------------------------------------------


def _nothing(make: Callable[[], Command]) -> "Reader":
    return lambda rest, usage: make(*_words(rest, usage, 0, 0))


def _named(make: Callable[..., Command], *kinds: Callable[[str, str], Any], least: int) -> "Reader":
    """A command of a word and values, of which the first `least` have to be there."""

    def read(rest: str, usage: str) -> Command:
        words = _words(rest, usage, least, len(kinds))
        return make(*(kind(word, usage) for kind, word in zip(kinds, words, strict=False)))

    return read


def _text(make: Callable[[str | None], Command]) -> "Reader":
    return lambda rest, usage: make("" if rest == EMPTY else rest or None)


def _scope(rest: str, usage: str) -> Command:
    name, *words = _words(rest, usage, 2, None)
    return SetScope(name, " ".join(words))


def _gate(rest: str, usage: str) -> Command:
    name, *values = _words(rest, usage, 2, 4)
    if values == ["off"]:
        return SetGate(name, None)
    on, *more = values
    off = _number(more[0], usage) if more else None
    return SetGate(name, _number(on, usage), off, _count(more[1], usage) if more[1:] else None)


def _compare(rest: str, usage: str) -> Command:
    return CompareAll(rest == "on") if rest in ("on", "off") else Compare(rest or None)


def _words(rest: str, usage: str, least: int, most: int | None) -> list[str]:
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise ConfigError(rest, expected=usage, got="a quotation mark without its partner", fix=WRONG) from error
    if len(words) < least or (most is not None and len(words) > most):
        raise ConfigError(usage.split()[0], expected=usage, got=rest or "nothing", fix=WRONG)
    return words


def _as_is(word: str, usage: str) -> str:
    return word


def _number(word: str, usage: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(usage, expected="a number", got=f"'{word}'", fix=WRONG)
    return value


def _count(word: str, usage: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 19):
        raise ConfigError(usage, expected="a whole number", got=f"'{word}'", fix=WRONG)
    return int(word)


def _word(value: Any) -> str:
    return shlex.quote(value) if isinstance(value, str) else repr(value)


Reader = Callable[[str, str], Command]


class Form(NamedTuple):
    """How a command is typed."""

    arguments: str
    read: Reader
    help: str


COMMANDS: dict[str, Form] = {
    "help": Form("", _nothing(Help), "this list"),
    "vectors": Form("", _nothing(Vectors), "the vectors of the libraries"),
    "add": Form("NAME [DOSE]", _named(Add, _as_is, _number, least=1), "steer with a vector, at its own dose or this"),
    "dose": Form("NAME DOSE", _named(Dose, _as_is, _number, least=2), "another dose; negative steers the other way"),
    "op": Form("NAME add|rotate|ablate", _named(Op, _as_is, _as_is, least=2), "what is done with it; ablate takes out"),
    "scope": Form("NAME WORDS", _scope, "on which tokens: all, prompt, generated, assistant, after:N, ..."),
    "gate": Form("NAME ON [OFF] [TOKENS] | off", _gate, "only while the energy |cos(vector, h)| is above ON"),
    "remove": Form("NAME", _named(Remove, _as_is, least=1), "steer without it"),
    "clear": Form("", _nothing(Clear), "steer with nothing"),
    "show": Form("", _nothing(Show), "what steers now, and where gates were open in the last answer"),
    "compare": Form("[TEXT | on | off]", _compare, "beside the unsteered model: this text, the last again, or always"),
    "retry": Form("", _nothing(Retry), "answer again as things are now; with the next seed if nothing changed"),
    "undo": Form("", _nothing(Undo), "forget the last question and answer"),
    "system": Form("[TEXT]", _text(System), "the system message; without one, the chat template's own"),
    "temperature": Form("VALUE", _named(Temperature, _number, least=1), "0 is greedy"),
    "seed": Form("NUMBER", _named(Seed, _count, least=1), "seed of every answer from now on"),
    "tokens": Form("NUMBER", _named(Tokens, _count, least=1), "tokens that an answer may have"),
    "save": Form("FILE", _named(Save, _as_is, least=1), "write the conversation, with what steered it, as JSON lines"),
    "load": Form("LIBRARY", _named(Load, _as_is, least=1), "take the vectors of another library too"),
}
"""word -> how it is typed"""

_NAMES: dict[type, str] = {
    Help: "help", Vectors: "vectors", Add: "add", Dose: "dose", Op: "op", Remove: "remove", Clear: "clear",
    Show: "show", Retry: "retry", Undo: "undo", Temperature: "temperature", Seed: "seed", Tokens: "tokens",
    Save: "save", Load: "load",
}  # fmt: skip


def help_text() -> str:
    """All commands, a line each."""
    rows = [(f"/{name} {form.arguments}".rstrip(), form.help) for name, form in COMMANDS.items()]
    width = max(len(usage) for usage, _ in rows)
    ends = ("Ctrl-C stops an answer, Ctrl-D ends the chat. A dose is in mean lengths of the residual stream;",
            "of what is ablated it is the share that is taken out. Each answer reads the conversation anew,",
            "as it is steered now. A line that starts with // says what is behind the first stroke.")  # fmt: skip
    return "\n".join([*(f"{usage:{width}}  {what}" for usage, what in rows), "", *ends])
