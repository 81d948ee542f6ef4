"""Names: what can be beside each other on a disk, and how versions are ordered."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError, CorruptArtefactError
from steer.packs.names import (
    PackName,
    about_of,
    clash,
    is_device,
    is_version,
    name_of,
    newest,
    parse_pack_name,
    printable,
    version_order,
)

ORDERED = ["0.0.1", "0.1.0", "0.9.9", "0.10.0", "1.0.0", "1.0.1", "1.2.0", "1.10.0", "2.0.0", "10.0.0"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["a", "A"], "A"), (["p/a", "P/b"], "P/b"), (["a", "a"], "a"), (["a/b", "a"], "a"), (["a", "b", "p/a"], None)],
)
def test_names_that_clash(names: list[str], expected: str | None) -> None:
    assert clash(names) == expected


def test_names_of_devices() -> None:
    for name in ("con", "NUL.txt", "a/aux", "com1.svg", "lpt9/x.y"):
        assert is_device(name)
    for name in ("conch", "a/auxiliary.svg", "com.svg", "xcon"):
        assert not is_device(name)


@given(st.permutations(ORDERED))
def test_versions_are_ordered_by_their_numbers(shuffled: list[str]) -> None:
    assert sorted(shuffled, key=version_order) == ORDERED
    assert newest(shuffled) == "10.0.0"


@pytest.mark.parametrize(
    "version", ["", "1", "1.0", "01.0.0", "1.0.0+build", "1.0.0-rc.1", "v1.0.0", "1.0.0\n", "1.0.-1"]
)
def test_what_is_no_version(version: str) -> None:
    assert not is_version(version)


def test_names_of_packs() -> None:
    assert parse_pack_name("smollm2-demo@1.2.0") == PackName("smollm2-demo", "1.2.0")
    assert parse_pack_name("a.b_c") == PackName("a.b_c", None)
    others = ("A", "a@", "a@1", "@1.0.0", "a/b", "runs/library", "..", ".a", "", "a" * 65, "joy@resid_post.12", "a\n")
    for text in others:
        assert parse_pack_name(text) is None
    assert str(PackName("a", "1.0.0")) == "a@1.0.0"


def test_what_a_manifest_says_of_a_pack() -> None:
    assert name_of("there", {"about": {"name": "demo", "version": "1.0.0"}}) == ("demo", "1.0.0")
    for about in ({}, {"name": "demo"}, {"version": "1.0.0"}):
        with pytest.raises(ConfigError, match=r"^there: expected a name and a version .*init"):
            name_of("there", {"about": about})
    odd: list[Any] = [None, [], "x", {"name": "../x"}, {"name": "a", "version": "1"}, {"summary": 1}, {"\x1b[2J": 1}]
    for about in odd:
        with pytest.raises(CorruptArtefactError, match=r"^there: expected a library that says what it is") as caught:
            about_of("there", {"about": about})
        assert "\x1b" not in str(caught.value)


def test_nothing_that_is_shown_moves_the_cursor() -> None:
    assert printable("a\x1b[2Jb\r\nc\u202e") == "a\ufffd[2Jb\ufffd\ufffdc\ufffd"
