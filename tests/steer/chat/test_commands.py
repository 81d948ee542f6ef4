"""Lines of a chat: each is a command, something to say, or a mistake of one line; commands are typed as they print."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError, SaekitError, UnknownNameError
from steer.chat import commands
from steer.chat.commands import COMMANDS, Command, Say, help_text, parse

NAMES = st.text(min_size=1).filter(str.strip)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 10**18 - 1)
WORDS = st.from_regex(r"[a-z:0-9-]{1,9}( [a-z:0-9-]{1,9}){0,3}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=("Cc", "Zs", "Zl", "Zp", "Cs")), min_size=1)
GATES = st.one_of(
    st.builds(commands.SetGate, NAMES, st.none()),
    st.builds(commands.SetGate, NAMES, NUMBERS),
    st.builds(commands.SetGate, NAMES, NUMBERS, NUMBERS),
    st.builds(commands.SetGate, NAMES, NUMBERS, NUMBERS, COUNTS),
)
ANY = st.one_of(
    *(st.just(each()) for each in (
        commands.Help, commands.Vectors, commands.Clear, commands.Show, commands.Retry, commands.Undo,
    )),
    st.builds(Say, TEXTS),
    st.builds(commands.Add, NAMES, st.none() | NUMBERS),
    st.builds(commands.Dose, NAMES, NUMBERS),
    st.builds(commands.Op, NAMES, NAMES),
    st.builds(commands.SetScope, NAMES, WORDS),
    GATES,
    st.builds(commands.Remove, NAMES),
    st.builds(commands.Compare, st.none() | TEXTS.filter(lambda text: text not in ("on", "off"))),
    st.builds(commands.CompareAll, st.booleans()),
    st.builds(commands.System, st.none() | st.just("") | TEXTS.filter(lambda text: text != '""')),
    st.builds(commands.Temperature, NUMBERS),
    st.builds(commands.Seed, COUNTS),
    st.builds(commands.Tokens, COUNTS),
    st.builds(commands.Save, NAMES),
    st.builds(commands.Load, NAMES),
)  # fmt: skip


@given(ANY)
def test_a_command_is_read_from_what_it_prints(command: Command) -> None:
    assert parse(str(command)) == command


@given(st.text() | st.builds(lambda name, rest: f"/{name} {rest}", st.sampled_from(list(COMMANDS)), st.text()))
def test_no_line_is_more_than_a_mistake(line: str) -> None:
    try:
        assert isinstance(parse(line), Command)
    except SaekitError as error:
        if not line.strip().startswith("/") or "/help" not in str(error):
            pytest.fail(str(error))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  How are you?  ", Say("How are you?")),
        ("//etc is a folder", Say("/etc is a folder")),
        ("/add joyful", commands.Add("joyful")),
        ("/add 'two words' -0.5", commands.Add("two words", -0.5)),
        ("/gate joyful 0.1 0.05 4", commands.SetGate("joyful", 0.1, 0.05, 4)),
        ("/gate joyful off", commands.SetGate("joyful", None)),
        ("/scope joyful assistant  after:5", commands.SetScope("joyful", "assistant after:5")),
        ("/compare", commands.Compare()),
        ("/compare on the road?", commands.Compare("on the road?")),
        ("/compare on", commands.CompareAll(True)),
        ('/system Don\'t be "short"', commands.System('Don\'t be "short"')),
        ("/system", commands.System()),
    ],
)
def test_lines_and_what_they_are(line: str, expected: Command) -> None:
    assert parse(line) == expected


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("/dosis joyful 1", UnknownNameError, "/dose"),
        ("/dose joyful", ConfigError, "expected /dose NAME DOSE, got joyful"),
        ("/dose joyful much", ConfigError, "expected a number, got 'much'"),
        ("/dose joyful nan", ConfigError, "expected a number"),
        ("/seed -1", ConfigError, "expected a whole number"),
        ("/add 'joyful", ConfigError, "a quotation mark without its partner"),
        ("/clear all", ConfigError, "expected /clear, got all"),
        ("/gate joyful", ConfigError, r"NAME ON [OFF] [TOKENS] | off"),
    ],
)
def test_mistakes_say_what_was_meant(line: str, error: type[SaekitError], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        parse(line)


def test_help_lists_every_command() -> None:
    assert all(f"/{name} {form.arguments}".strip() in help_text() for name, form in COMMANDS.items())
