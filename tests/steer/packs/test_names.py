"""Names: what may be written to a disk, and how versions are ordered."""

import string
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError
from steer.packs.names import (
    PackName,
    clash,
    file_name_problem,
    is_pack_name,
    is_version,
    named_version,
    newest,
    parse_pack_name,
    printable,
    version_order,
)

ORDERED = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11",
           "1.0.0-rc.1", "1.0.0", "1.0.1", "1.2.0", "1.10.0", "2.0.0-1", "2.0.0-1.0", "2.0.0-x-1"]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/a", "a/", "a//b", "../a", "a/../b", "a/..", "./a", "a\\b", "c:a", "c:/a", "a\0b", "a\nb",
     ".git/x", "-rf", "a/-x", "~/a", "a b", "é", "a*", "[a]", "$HOME", "con", "NUL.txt",
     "a/aux", "com1.svg", "a.", "x" * 101],
)  # fmt: skip
def test_names_that_may_not_be_written(name: str) -> None:
    assert file_name_problem(name) is not None


@pytest.mark.parametrize("name", ["vectors.safetensors", "plots/up@resid_post.1.svg", "sae/cfg.json", "a-b/c+d=e,f/_g"])
def test_names_that_may(name: str) -> None:
    assert file_name_problem(name) is None


@given(st.text(string.ascii_letters + string.digits + "./\\:-_@ \0~é", min_size=1, max_size=40))
def test_a_name_without_a_problem_stays_in_its_folder(name: str) -> None:
    if file_name_problem(name) is None:
        for path in (PurePosixPath("/pack") / name, PureWindowsPath("C:/pack") / name):
            assert path.is_relative_to(path.parents[name.count("/")])
            assert ".." not in path.parts
            assert path.as_posix().endswith(f"/pack/{name}")


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["a", "A"], "A"), (["p/a", "P/b"], "P/b"), (["a", "a"], "a"), (["a/b", "a"], "a"), (["a", "b", "p/a"], None)],
)
def test_names_that_clash(names: list[str], expected: str | None) -> None:
    assert clash(names) == expected


@given(st.permutations(ORDERED))
def test_versions_are_ordered_as_semver_says(shuffled: list[str]) -> None:
    assert sorted(shuffled, key=version_order) == ORDERED
    assert newest(shuffled) == "1.10.0"
    assert newest(ORDERED[:3]) == "1.0.0-alpha.beta"


@pytest.mark.parametrize(
    "version", ["", "1", "1.0", "01.0.0", "1.0.0+build", "1.0.0-", "1.0.0-01", "v1.0.0", "1.0.0\n", None, 1]
)
def test_what_is_no_version(version: object) -> None:
    assert not is_version(version)


def test_names_of_packs() -> None:
    assert parse_pack_name("smollm2-demo@1.2.0") == PackName("smollm2-demo", "1.2.0")
    assert parse_pack_name("a.b_c") == PackName("a.b_c", None)
    for text in ("A", "a@", "a@1", "@1.0.0", "a/b", "runs/library", "..", "a--b", "", "a" * 51, "joy@resid_post.12"):
        assert parse_pack_name(text) is None
    assert not is_pack_name(None)
    assert str(PackName("a", "1.0.0")) == "a@1.0.0"
    with pytest.raises(ConfigError, match=r"name 'demo' and version None\. .*init"):
        named_version("there", {"name": "demo", "version": None})


def test_nothing_that_is_shown_moves_the_cursor() -> None:
    assert printable("a\x1b[2Jb\r\nc\u202e") == "a\ufffd[2Jb\ufffd\ufffdc\ufffd"
