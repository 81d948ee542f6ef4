"""Generation: text is the model's own, at once or streamed; seeds decide, padding and caching change nothing."""

import pytest
import torch

from activations.errors import ConfigError
from activations.generate import continuations, pieces, tokens_of
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.gates import Gate, cosine
from steer.generate import generate, generate_conditions, streaming
from steer.operations import Ablate, Add, Intervention
from steer.runtime import steering
from steer.scopes import Scope
from steer.vectors import SteeringVector

PROMPTS = ["The river ran past the mill", "A cat", "Numbers such as 12, 345 and 6789 are written"]
N = 12


def ids(loaded: LoadedModel, prompt: str) -> torch.Tensor:
    return torch.tensor([loaded.tokenizer(prompt)["input_ids"]])


def stepwise(loaded: LoadedModel, prompt: str, interventions: list[Intervention], n: int = N) -> str:
    """Greedy text by a full forward pass a token, without a cache."""
    x = ids(loaded, prompt)
    start = x.shape[1]
    for _ in range(n):
        with torch.no_grad(), steering(loaded, interventions):
            token = loaded.model(x, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        if int(token) == loaded.tokenizer.eos_token_id:
            break
        x = torch.cat([x, token], dim=1)
    return loaded.tokenizer.decode(x[0, start:].tolist(), skip_special_tokens=True)


def test_greedy_text_is_that_of_hugging_face(tiny: LoadedModel) -> None:
    x = ids(tiny, PROMPTS[0])
    mask = torch.ones_like(x)
    out = tiny.model.generate(x, attention_mask=mask, max_new_tokens=N, do_sample=False, pad_token_id=0)
    expected = tiny.tokenizer.decode(out[0, x.shape[1] :].tolist(), skip_special_tokens=True)
    assert generate(tiny, [PROMPTS[0]], max_new_tokens=N, temperature=0.0) == [expected]
    assert expected


def test_sampled_text_is_that_of_hugging_face(tiny: LoadedModel) -> None:
    encoded = tiny.tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        out = tiny.model.generate(
            **encoded, max_new_tokens=N, do_sample=True, temperature=0.8, top_p=0.95, pad_token_id=0
        )
    new = out[:, encoded.input_ids.shape[1] :]
    expected = tiny.tokenizer.batch_decode(new, skip_special_tokens=True)
    assert generate(tiny, PROMPTS, max_new_tokens=N, temperature=0.8, seed=3) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_text_in_pieces(tiny: LoadedModel, vector: SteeringVector, temperature: float) -> None:
    how = {"max_new_tokens": N, "temperature": temperature, "seed": 4}
    rows = [[], [Intervention.of(vector, 6.0)], [Intervention.of(vector, -6.0)]]
    with streaming(tiny, PROMPTS, rows=rows, **how) as stream:
        steps = list(stream.pieces)
    assert ["".join(row) for row in zip(*steps, strict=True)] == generate(tiny, PROMPTS, rows=rows, **how)
    assert N // 2 < len(steps) <= N + 1
    token_rows = tokens_of(tiny, PROMPTS, True)
    assert continuations(tiny, token_rows, **how) == generate(tiny, PROMPTS, **how)


def test_a_stream_stops_where_nobody_asks_on_and_takes_other_doses_on_its_way(
    tiny: LoadedModel, vector: SteeringVector
) -> None:
    passes: list[int] = []
    handle = tiny.model.model.register_forward_hook(lambda *_: passes.append(1))
    strong = [Intervention.of(vector, 500.0)]
    how = {"max_new_tokens": N, "temperature": 0.0, "force": True}
    plain, steered = (generate(tiny, PROMPTS[:1], **how, interventions=each)[0] for each in ([], strong))
    passes.clear()
    changed = ""
    with streaming(tiny, PROMPTS[:1], reserve=strong, **how) as stream:
        for i, (piece,) in enumerate(stream.pieces):
            changed += piece
            if i == 3:
                assert plain.startswith(changed)
                stream.steered.set(strong)
            if i == 8:
                break
    handle.remove()
    assert len(passes) == 9
    assert not plain.startswith(changed)
    assert not steered.startswith(changed)
    assert generate(tiny, PROMPTS[:1], **how)[0] == plain
    assert not torch.is_inference_mode_enabled()


def test_no_piece_ends_within_a_character(tiny: LoadedModel) -> None:
    texts = ["naïve 🎉🎉 日本", "plain"]
    rows = [tiny.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    padded = [row + [tiny.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
    steps = list(pieces(tiny, iter([list(step) for step in zip(*padded, strict=True)])))
    assert ["".join(row) for row in zip(*steps, strict=True)] == texts
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for step in steps for piece in step)
    cut = rows[0][: rows[0].index(tiny.tokenizer("🎉")["input_ids"][0]) + 2]
    steps = list(pieces(tiny, iter([[token] for token in cut])))
    assert "".join(row for (row,) in steps) == tiny.tokenizer.decode(cut) != texts[0]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for (piece,) in steps[:-1])


def test_the_seed_decides_the_text(tiny: LoadedModel) -> None:
    first, again, other = (generate(tiny, PROMPTS, max_new_tokens=N, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_callers_random_numbers_are_left_alone(tiny: LoadedModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(tiny, PROMPTS[:1], max_new_tokens=2, seed=9)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("coefficient", [0.0, 4.0])
def test_left_padding_of_unequal_prompts_changes_nothing(
    tiny: LoadedModel, vector: SteeringVector, coefficient: float
) -> None:
    assert len({ids(tiny, prompt).shape[1] for prompt in PROMPTS}) == 3
    limits = {"max_new_tokens": N, "temperature": 0.0, "interventions": [Intervention.of(vector, coefficient)]}
    together = generate(tiny, PROMPTS, **limits)
    assert together == [generate(tiny, [prompt], **limits)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("coefficient", [-6.0, 0.0, 6.0])
def test_generating_with_a_cache_is_recomputing_every_step(
    tiny: LoadedModel, vector: SteeringVector, coefficient: float
) -> None:
    steers = [Intervention.of(vector, coefficient)]
    for prompt in PROMPTS:
        (text,) = generate(tiny, [prompt], max_new_tokens=N, temperature=0.0, interventions=steers)
        assert text == stepwise(tiny, prompt, steers)


def test_steering_changes_the_text(tiny: LoadedModel, vector: SteeringVector) -> None:
    plain = generate(tiny, PROMPTS, max_new_tokens=N, temperature=0.0)
    assert (
        generate(
            tiny, PROMPTS, max_new_tokens=N, temperature=0.0, interventions=[Intervention.of(vector, 20.0)], force=True
        )
        != plain
    )
    assert generate(tiny, PROMPTS, max_new_tokens=N, temperature=0.0) == plain


def test_special_tokens_are_left_out(tiny: LoadedModel) -> None:
    end = torch.zeros(tiny.d_model)
    head = tiny.model.lm_head.weight
    end[:] = head[tiny.tokenizer.eos_token_id] - head.mean(0)
    (text,) = generate(
        tiny,
        [PROMPTS[0]],
        max_new_tokens=N,
        temperature=0.0,
        interventions=[Intervention(Add(end, 500.0), HookPoint("resid_post", 3))],
    )
    assert text == ""


def test_a_prompt_that_does_not_fit_is_an_error(tiny: LoadedModel) -> None:
    limit = tiny.model.config.max_position_embeddings
    long = "la " * limit
    with pytest.raises(ConfigError, match=rf"at most {limit - 5} tokens.*Shorten the prompt"):
        generate(tiny, [PROMPTS[0], long], max_new_tokens=5)
    tokens = ids(tiny, long)[0, : limit - 2].tolist()
    just = tiny.tokenizer.decode(tokens)
    assert ids(tiny, just).shape[1] <= limit - 2
    assert len(generate(tiny, [just], max_new_tokens=2, temperature=0.0)) == 1


def test_an_empty_prompt_is_an_error_of_ours(tiny: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        generate(tiny, [""], max_new_tokens=2, temperature=0.0)


def test_conditions_are_those_of_single_runs_in_order(tiny: LoadedModel, vector: SteeringVector) -> None:
    point, v = HookPoint.parse(vector.hook_point), torch.from_numpy(vector.direction)
    conditions = [[], *([Intervention(Add(v, c), point)] for c in (6.0, -6.0))]
    texts = generate_conditions(tiny, conditions, PROMPTS, max_new_tokens=N, seed=0, temperature=0.0)
    for condition, row in zip(conditions, texts, strict=True):
        assert row == generate(tiny, PROMPTS, max_new_tokens=N, temperature=0.0, interventions=condition)
    assert texts[0] != texts[1]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_scopes_and_gates_in_generation_are_those_of_the_whole_text(
    tiny: LoadedModel, vector: SteeringVector, cache: str
) -> None:
    """With left padding, whatever the model is told about it: a static cache gets positions and no mask to count."""
    v = torch.from_numpy(vector.direction)
    gate = Gate(cosine(v.flip(0), "resid_post.0"), 0.0, -0.1, 2)
    steers = [
        Intervention(Add(v, 5.0), HookPoint("resid_post", 1), Scope.parse("generated")),
        Intervention(Ablate(v), HookPoint("resid_post", 2), Scope.parse("prompt"), gate),
    ]
    encoded = tiny.tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    lengths = encoded["attention_mask"].sum(1).tolist()
    width = max(lengths)
    with torch.inference_mode(), steering(tiny, steers, prompt_lengths=lengths) as steered:
        out = tiny.model.generate(
            **encoded, max_new_tokens=6, do_sample=False, cache_implementation=cache, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        fired = steered.fired()
    for row, length in enumerate(lengths):
        text = out.sequences[row : row + 1, width - length : -1]
        with torch.no_grad(), steering(tiny, steers, prompt_lengths=[length]) as steered:
            expected = tiny.model(text, use_cache=False).logits[0, length - 1 :]
        n = min(len(expected), 5)
        found = torch.stack([logits[row] for logits in out.logits[:n]])
        torch.testing.assert_close(found, expected[:n], atol=2e-5, rtol=1e-5)
        assert fired[row] == steered.fired()[0]
    assert any(log["gate"] for log in fired)
