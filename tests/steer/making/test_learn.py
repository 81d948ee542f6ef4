"""Learned vectors: what is compared, what is trained, what the runtime makes of it, and what is kept."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.errors import ConfigError, HookPointError, NumericsError, TextError
from activations.hook_points import HookPoint
from activations.hooks import capture
from activations.models import LoadedModel
from steer.library import load_library
from steer.making.config import LearnConfig
from steer.making.distil import (
    Lesson,
    Settings,
    batch_of,
    descend,
    divergence,
    divergences,
    lessons,
    log_probs,
    plain,
)
from steer.making.learn import Site, _difference, _Steered, acts_on, learn, read_context
from steer.making.make import add_to_library
from steer.making.soft_prompt import SoftPrompt, with_soft_prompt
from steer.operations import Intervention
from steer.runtime import steering
from steer.scopes import Scope
from steer.vectors import SteeringVector

CONTEXT = "The river ran past the mill, and a cat sat on the mat."
QUESTIONS = ["A dog?", "Numbers such as 12", "def add(a, b)", "The sea and the mill", "On", "Digits are written"]
SITES = [Site(HookPoint("resid_post", 1), 8.0), Site(HookPoint("mlp_out", 2), 4.0)]


def settings(tiny: LoadedModel, tmp: Path, **changes: Any) -> LearnConfig:
    values = {
        "context": CONTEXT, "name": "cat", "model": tiny.spec, "hook_points": ["resid_post.1"], "out": tmp / "library",
        "n_prompts": 6, "n_select": 2, "n_heldout": 3, "max_new_tokens": 5, "steps": 6, "batch": 3, "lr": 0.1,
        "n_random": 1, "temperature": 1.0,
    }  # fmt: skip
    return LearnConfig(**values | changes)


@pytest.fixture(scope="module")
def taught(tiny: LoadedModel) -> list[Lesson]:
    limits = {"max_new_tokens": 6, "temperature": 1.0, "seed": 0, "batch": 4}
    return lessons(tiny, QUESTIONS, CONTEXT, place="system", **limits)


def batch(tiny: LoadedModel, some: list[Lesson]) -> Any:
    return batch_of(tiny, [lesson.bare for lesson in some], [lesson.answer for lesson in some])


def test_the_teacher_diverges_from_itself_by_nothing_and_from_the_bare_model_by_something(
    tiny: LoadedModel, taught: list[Lesson]
) -> None:
    with torch.no_grad():
        with_context = divergence(tiny, plain(tiny), taught, with_context=True)
    assert float(with_context.abs().max()) < 1e-5
    assert float(divergences(tiny, plain(tiny), taught, 4).min()) > 1e-3


def test_divergence_is_that_of_single_rows_on_the_tokens_of_the_answer(tiny: LoadedModel, taught: list[Lesson]) -> None:
    """Padding, batches and the prompt's own tokens change nothing."""
    expected = []
    for lesson in taught:
        said = []
        for prompt in (lesson.taught, lesson.bare):
            with torch.no_grad():
                logits = tiny.model(torch.tensor([prompt + lesson.answer])).logits[0].double()
            said.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
        expected.append(float((said[0].exp() * (said[0] - said[1])).sum(-1).mean()))
    assert len({len(lesson.bare) for lesson in taught}) > 2
    for size in (1, 4):
        assert divergences(tiny, plain(tiny), taught, size) == pytest.approx(expected, abs=1e-5)


def test_prompts_honour_the_chat_template_and_where_the_context_stands(tiny: LoadedModel) -> None:
    limits = {"max_new_tokens": 2, "temperature": 1.0, "seed": 0, "batch": 4}
    for place, head in (("system", f"system\n{CONTEXT}<|im_end|>"), ("user", f"user\n{CONTEXT}\n\nOn<|im_end|>")):
        (lesson,) = lessons(tiny, ["On"], CONTEXT, place=place, **limits)
        assert head in tiny.tokenizer.decode(lesson.taught)
        assert tiny.tokenizer.decode(lesson.bare) == "<|im_start|>user\nOn<|im_end|>\n<|im_start|>assistant\n"


def test_an_answer_ends_with_the_token_that_ends_it(tiny: LoadedModel) -> None:
    """Else nothing would say when to stop, which is most of what a short answer is."""
    model = copy.deepcopy(tiny.model)
    end = tiny.tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[end] = model.lm_head.weight.sum(0) / 4
    sure = replace(tiny, model=model)
    found = lessons(sure, QUESTIONS * 4, CONTEXT, place="system", max_new_tokens=12, temperature=1.0, seed=0, batch=8)
    ended = [lesson.answer for lesson in found if end in lesson.answer]
    assert ended
    assert len(ended) < len(found)
    assert all(answer.index(end) == len(answer) - 1 for answer in ended)
    assert all(len(lesson.answer) == len(lesson.target) for lesson in found)


@pytest.mark.parametrize("scope", ["all", "generated", "prompt", "after:3 before:9"])
def test_training_steers_as_the_runtime_does(tiny: LoadedModel, taught: list[Lesson], scope: str) -> None:
    vectors = torch.randn(2, tiny.d_model, generator=torch.Generator().manual_seed(0))
    student, rows = _Steered(tiny, SITES, Scope.parse(scope), vectors), batch(tiny, taught)
    with torch.no_grad():
        mine = student(rows)
        kept = [
            SteeringVector(
                "v", (v / v.norm()).numpy(), str(site.point), tiny.ref, site.mean_norm, {}, float(v.norm()), scope=scope
            )
            for site, v in zip(SITES, vectors, strict=True)
        ]
        interventions = [Intervention.of(vector) for vector in kept]
        with steering(tiny, interventions, prompt_lengths=rows.prompt_lengths):
            theirs = log_probs(tiny, rows)
        unsteered = log_probs(tiny, rows)
    inside = rows.answered
    torch.testing.assert_close(mine[inside], theirs[inside], atol=1e-5, rtol=1e-5)
    assert float((mine - unsteered)[inside].abs().max()) > 0.01
    first = (rows.places == 0) | (rows.places < 0)
    assert not bool((acts_on(Scope.parse(scope), rows) & first).any()), "neither padding nor the first token"
    if scope == "generated":
        torch.testing.assert_close(mine[:, 0], unsteered[:, 0])


def n_hooks(loaded: LoadedModel) -> int:
    """Hooks of all modules; other tests may have left those by which transformers itself captures."""
    return sum(len(module._forward_hooks) for module in loaded.model.modules())


def test_only_the_vectors_get_gradients_and_move(tiny: LoadedModel, taught: list[Lesson]) -> None:
    before, hooks = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}, n_hooks(tiny)
    student = _Steered(tiny, SITES, Scope.parse("all"))
    start = float(divergences(tiny, student, taught[:4], 4).mean())
    descent = descend("vectors", tiny, student, student.moved, taught[:4], taught[4:], Settings(12, 2, 0.05, 0))
    assert len(descent.losses) == 12
    assert descent.checks[descent.kept] == min(descent.checks.values())
    assert float(divergences(tiny, student, taught[:4], 4).mean()) < 0.9 * start
    assert float(student.vectors.detach().norm(dim=1).min()) > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in tiny.model.parameters())
    after = tiny.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert n_hooks(tiny) == hooks


def test_gradients_are_those_of_finite_differences(tiny: LoadedModel, taught: list[Lesson]) -> None:
    student = _Steered(tiny, SITES, Scope.parse("all"), torch.ones(2, tiny.d_model) * 0.1)
    divergence(tiny, student, taught).mean().backward()
    grad, moved = student.moved.grad, student.moved
    assert grad is not None
    step = 1e-2 * grad / grad.norm()
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            moved += sign * step
            values.append(float(divergence(tiny, student, taught).mean()))
            moved -= sign * step
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(grad.norm()), rel=0.02)


def test_the_best_checkpoint_is_kept(tiny: LoadedModel, taught: list[Lesson]) -> None:
    """What ruins the last steps is not what is left."""
    student, steps = _Steered(tiny, SITES[:1], Scope.parse("all")), iter(range(1, 13))

    def ruin(moved: torch.Tensor) -> None:
        if next(steps) > 8:
            moved += 50.0

    descent = descend("vectors", tiny, student, student.moved, taught[:4], taught[4:], Settings(12, 2, 0.05, 0), ruin)
    assert descent.checks[descent.kept] < descent.checks[12]
    assert descent.kept <= 9
    assert float(divergences(tiny, student, taught[4:], 2).mean()) == pytest.approx(descent.checks[descent.kept])


def test_a_gradient_that_is_not_finite_stops_before_anything_moves(tiny: LoadedModel, taught: list[Lesson]) -> None:
    """It was NaN where the loss was not: cuDNN's attention, at padding, which is therefore not used either."""
    student = _Steered(tiny, SITES, Scope.parse("all"))

    def steep(batch: Any) -> torch.Tensor:
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        return student(batch) + (student.moved.sum() * 0).abs().sqrt()

    with pytest.raises(NumericsError, match=r"step 1: expected a finite loss and gradient, got [0-9.]+ and nan"):
        descend("vectors", tiny, steep, student.moved, taught[:4], taught[4:], Settings(4, 2, 0.05, 0))
    assert not student.moved.any()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_soft_prompt_stands_in_front_behind_the_padding(tiny: LoadedModel, taught: list[Lesson]) -> None:
    """One that is made of words reads as those words."""
    words = tiny.tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    soft = SoftPrompt.of(tiny, CONTEXT, len(words))
    rows = batch(tiny, taught)
    plainly = batch_of(tiny, [words + lesson.bare for lesson in taught], [lesson.answer for lesson in taught])
    with torch.no_grad():
        mine, theirs = with_soft_prompt(tiny, soft)(rows), log_probs(tiny, plainly)
    torch.testing.assert_close(mine[rows.answered], theirs[rows.answered], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_a_soft_prompt_has_as_many_numbers_as_vectors_have_and_learns(
    tiny: LoadedModel, taught: list[Lesson], n: int
) -> None:
    soft = SoftPrompt.of(tiny, CONTEXT, n)
    assert soft.moved.numel() == n * tiny.d_model
    student = with_soft_prompt(tiny, soft)
    before = soft.embeddings.detach().clone()
    descent = descend("soft prompt", tiny, student, soft.moved, taught[:4], taught[4:], Settings(16, 4, 0.1, 0))
    assert min(descent.losses[8:]) < descent.losses[0]
    assert not torch.equal(before, soft.embeddings.detach())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_learning_leaves_one_vector_with_its_report(tiny: LoadedModel, tmp_path: Path) -> None:
    config = settings(tiny, tmp_path)
    (made,) = learn(config, tiny)
    kept = load_library(config.out)
    assert list(kept) == ["cat"]
    assert np.linalg.norm(kept["cat"].direction) == pytest.approx(1, abs=1e-5)
    assert (kept["cat"].scope, kept["cat"].hook_point) == ("all", "resid_post.1")
    assert 0 < kept["cat"].dose(kept["cat"].coefficient) <= config.max_dose + 1e-6
    assert kept["cat"].source["kind"] == "learned"
    assert kept["cat"].source["context"] == CONTEXT
    receipt = json.loads(json.dumps(made.receipts[-1]))
    conditions = receipt["conditions"]
    assert list(conditions) == ["nothing", "vectors", "difference_in_means", "random", "soft_prompt"]
    for row in conditions.values():
        low, high = row["kl_recovered_ci95"]
        assert low <= row["kl_recovered"] <= high
        assert row["kl_recovered"] == pytest.approx(1 - row["kl"] / conditions["nothing"]["kl"])
    assert conditions["nothing"]["kl_recovered"] == 0
    assert receipt["trainable"] == tiny.d_model
    assert receipt["tokens_saved"] == conditions["soft_prompt"]["tokens_saved"] + 1 > 5
    assert set(receipt["seconds"]) >= {"teacher", "vectors", "soft_prompt", "difference_in_means"}
    assert len(receipt["training"]["vectors"]["losses"]) == config.steps
    assert len(receipt["examples"]) == 3
    again = learn(config, tiny)
    np.testing.assert_array_equal(again[0].direction, made.direction)
    other = learn(settings(tiny, tmp_path, seed=1), tiny)
    assert not np.array_equal(other[0].direction, made.direction)


def test_several_layers_have_a_vector_each_and_replace_what_had_the_name(tiny: LoadedModel, tmp_path: Path) -> None:
    config = settings(tiny, tmp_path, soft_prompt=False, steps=2)
    learn(config, tiny)
    points = ["resid_post.0", "resid_post.2"]
    made = learn(config.model_copy(update={"hook_points": tuple(points), "scope": "generated"}), tiny)
    assert [vector.name for vector in made] == ["cat@resid_post.0", "cat@resid_post.2"]
    kept = load_library(config.out)
    assert list(kept) == [vector.name for vector in made]
    assert {vector.scope for vector in kept.values()} == {"generated"}
    assert made[0].receipts[-1]["trainable"] == 2 * tiny.d_model
    learn(config, tiny)
    assert list(load_library(config.out)) == ["cat"]


@pytest.mark.parametrize("most", [0.25, 2.0])
def test_the_norm_is_capped_at_what_the_runtime_accepts(tiny: LoadedModel, tmp_path: Path, most: float) -> None:
    (made,) = learn(settings(tiny, tmp_path, soft_prompt=False, lr=2 * most, max_dose=most), tiny)
    assert made.dose(made.coefficient) == pytest.approx(most, rel=1e-4)
    with steering(tiny, [Intervention.of(made)]):
        pass
    assert max(made.receipts[-1]["training"]["difference_in_means"]["doses"]) <= most + 1e-6


def test_the_difference_in_means_is_that_of_single_rows(tiny: LoadedModel, taught: list[Lesson]) -> None:
    point = HookPoint("resid_post", 1)
    expected, norms = [], []
    for lesson in taught:
        x = []
        for prompt in (lesson.taught, lesson.bare):
            with capture(tiny.model, tiny.family, [point]) as captured, torch.no_grad():
                tiny.model(torch.tensor([prompt + lesson.answer]))
            x.append(captured[point][0])
        n = len(lesson.answer)
        expected.append((x[0][-n - 1 : -1] - x[1][-n - 1 : -1]).mean(0))
        is_text = torch.tensor([token > 2 for token in lesson.answer])
        norms.append(x[1][-n:].norm(dim=1)[is_text])
    (norm,), difference, _ = _difference(tiny, [point], taught, 4)
    torch.testing.assert_close(difference[0], torch.stack(expected).mean(0), atol=1e-5, rtol=1e-4)
    assert norm == pytest.approx(float(torch.cat(norms).mean()), rel=1e-5)


def test_other_names_stay_in_the_library(tiny: LoadedModel, vector: SteeringVector, tmp_path: Path) -> None:
    add_to_library(
        tmp_path,
        *[replace(vector, name="a"), replace(vector, name="ab"), replace(vector, name="a@resid_post.1")],
        instead_of="a",
    )
    add_to_library(tmp_path, replace(vector, name="a@resid_post.2"), instead_of="a")
    assert list(load_library(tmp_path)) == ["a@resid_post.2", "ab"]


def test_what_is_stopped_leaves_the_library_as_it_was(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, hooks = settings(tiny, tmp_path, soft_prompt=False, steps=2), n_hooks(tiny)
    learn(config, tiny)
    before = {path.name: path.read_bytes() for path in config.out.iterdir()}

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        learn(config.model_copy(update={"seed": 5}), tiny)
    assert {path.name: path.read_bytes() for path in config.out.iterdir()} == before
    assert n_hooks(tiny) == hooks


def test_a_context_and_prompts_are_read_from_files(tiny: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(CONTEXT * 8)
    (tmp_path / "asked.txt").write_text("\n".join(f"Question {i}?" for i in range(11)) + "\n\n")
    assert read_context(str(tmp_path / "page.md")) == CONTEXT * 8
    files = {"context": str(tmp_path / "page.md"), "prompts": tmp_path / "asked.txt", "name": None}
    (made,) = learn(settings(tiny, tmp_path, soft_prompt=False, steps=2, **files), tiny)
    assert made.name == "page"
    assert "context" not in made.source
    assert made.receipts[-1]["examples"][0]["prompt"].startswith("Question")


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no such file": ({"context": "nowhere.txt"}, TextError, "nowhere.txt"),
    "no such prompts": ({"prompts": "nowhere.txt"}, TextError, "nowhere.txt"),
    "a blank context": ({"context": "  "}, TextError, "expected text"),
    "more prompts than there are": ({"n_prompts": 5000}, ConfigError, "5005 different ones"),
    "a layer that is not there": ({"hook_points": ["resid_post.9"]}, HookPointError, "0 to 3"),
    "a hook point twice": ({"hook_points": ["resid_post.1"] * 2}, ConfigError, "each one once"),
    "a scope of roles": ({"scope": "assistant"}, ConfigError, "'assistant'"),
    "a context that does not fit": ({"context": "la " * 600}, ConfigError, "Shorten"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_before_anything_is_learned(tiny: LoadedModel, tmp_path: Path, mistake: str) -> None:
    changes, error, said = MISTAKES[mistake]
    with pytest.raises(error, match=said):
        learn(settings(tiny, tmp_path, **changes), tiny)
    assert not (tmp_path / "library").exists()
