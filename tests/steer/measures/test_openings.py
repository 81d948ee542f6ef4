"""Prompts of saekit's own: enough of them, each once, the same in every run, and none that something was fitted to."""

import json
from importlib import resources

import pytest

from activations.errors import ConfigError
from steer.measures.openings import KINDS, prompts, read_prompts, swapped_prompts
from steer.pairs import contrast_names, load_pairs


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_enough_and_none_is_known(kind: str) -> None:
    every = KINDS[kind]()
    assert len(every) >= 512 + 16
    assert len(set(every)) == len(every)
    shipped = (resources.files("steer") / "data" / "prompts.jsonl").read_text()
    known = {json.loads(line)["text"] for line in shipped.splitlines()}
    known |= {pair.prompt for name in contrast_names() for pair in load_pairs(name)}
    assert not known & set(every)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_always_the_same_and_mixed(kind: str) -> None:
    assert prompts(kind, 20) == prompts(kind, 528)[:20]
    assert prompts(kind, 20) != KINDS[kind]()[:20]
    assert sorted(prompts(kind, len(KINDS[kind]()))) == sorted(KINDS[kind]())
    with pytest.raises(ConfigError, match="at least 9999"):
        prompts(kind, 9999)


def test_swapped_pairs_differ_in_a_name_alone() -> None:
    pairs = swapped_prompts(512)
    assert len(set(pairs)) == 512
    for man, woman in pairs:
        differing = [(a, b) for a, b in zip(man.split(), woman.split(), strict=True) if a != b]
        assert len(differing) == 1


def test_prompts_of_a_file(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"ask": f"Question {i}"}) for i in range(3)))
    assert read_prompts(f"{tmp_path / 'a.jsonl'}#ask", 2) == ["Question 0", "Question 1"]
    with pytest.raises(ConfigError, match="at least 4"):
        read_prompts(f"{tmp_path / 'a.jsonl'}#ask", 4)
