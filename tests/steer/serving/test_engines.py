"""Both engines write what the model writes by itself: alone or beside others, steered each by its own."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from activations.errors import ConfigError, EngineError, MismatchError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.gates import Gate, energy
from steer.library import find_vectors, load_library
from steer.operations import Ablate, Add, Clamp, Intervention, Rotate
from steer.runtime import Steering, steering
from steer.scopes import Scope
from steer.serving import continuous as engines
from steer.serving.catalogue import Catalogue
from steer.serving.continuous import Continuous
from steer.serving.engine import Engine, Job, Planned, Ticket, TooLongError
from steer.serving.items import Asked
from steer.serving.one_by_one import OneByOne
from steer.serving.sampling import Sampling, Step
from tests.steer.serving.conftest import at_rest, written

CHAT = "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n"
TEXTS = ["The river", "The river ran past the mill and on to the sea, " * 6, "a", "def add(a, b):\n"]
GATED = ("either", "elsewhere", "many", "patient")
CHATS = ("chat", "assistant", "chatty")
N = 12
Make = Callable[..., Engine]


def continuous(loaded: LoadedModel, **settings: int) -> Engine:
    return Continuous(loaded, **{"max_running": 16, "batch_tokens": 32, "cache_tokens": 4096} | settings)


ENGINES: dict[str, Any] = {"one_by_one": OneByOne, "continuous": continuous}


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest) -> Any:
    return ENGINES[request.param]


def steers(loaded: LoadedModel, library: Path) -> dict[str, list[Intervention]]:
    """All kinds of steering that a request may ask for; for the last two there is no room in common tables."""
    vectors = load_library(library)
    up, gated = vectors["up"], vectors["gated"]
    direction = torch.from_numpy(up.direction)
    point = Intervention.of(up).hook_point
    gates = [Gate(energy(direction, "resid_post.1"), 0.1 + 0.05 * i, min_tokens=2, name=f"g{i}") for i in range(6)]
    patient = replace(gates[1], min_tokens=20)
    catalogue = Catalogue.open([str(library)], loaded)
    return {
        "none": [],
        "chat": [],
        "add": [Intervention.of(up)],
        "away": [Intervention.of(up, -3.0)],
        "zero": [Intervention.of(up, 0.0)],
        "rotate": [Intervention(Rotate(direction, 3.0), point)],
        "ablate": [Intervention(Ablate(direction), point)],
        "clamp": [Intervention(Clamp(direction, 2.0, 2.0), point)],
        "gated": [Intervention.of(gated)],
        "prompt": [Intervention.of(up, 5.0, scope=Scope.parse("prompt"))],
        "generated": [Intervention.of(up, 5.0, scope=Scope.parse("generated"))],
        "window": [Intervention.of(up, 5.0, scope=Scope.parse("after:3 before:9"))],
        "assistant": [Intervention.of(up, 5.0, scope=Scope.parse("assistant"))],
        "chatty": [Intervention.of(up, 5.0, scope=Scope.parse("assistant"), gate=gates[0] & ~gates[3])],
        "either": [Intervention.of(up, 6.0, gate=(gates[4] | ~gates[1]))],
        "elsewhere": [Intervention(Add(direction, 6.0), HookPoint.parse("attn_out.2"), gate=gates[2])],
        "group": [Intervention.of(vector) for vector in find_vectors(library, "tone")],
        "kit": [Intervention.of(vector) for vector in find_vectors(library, "both")],
        "latents": catalogue.prepare(
            [Asked.model_validate({"steer": [{"latent": 3, "clamp": 4.0}, {"latent": 5, "scale": 0.0}]})]
        ).interventions,
        "many": [Intervention.of(up, 6.0, gate=gates[0] & gates[1] & gates[2] & ~gates[3] & ~gates[5])],
        "patient": [Intervention.of(up, 6.0, gate=patient)],
    }


def jobs_of(loaded: LoadedModel, library: Path, **sampling: Any) -> list[Job]:
    every = steers(loaded, library)
    how = Sampling(**{"max_tokens": N, "temperature": 0.0, "n_top": 3} | sampling)
    return [
        Job(f"{name}-{i}", loaded.tokenizer(head + text)["input_ids"], replace(how, seed=i), interventions)
        for name, interventions in every.items()
        for head in [CHAT if name in CHATS else ""]
        for i, text in enumerate(TEXTS)
    ]


def expected(loaded: LoadedModel, job: Job) -> list[Step]:
    """What a plain loop over the whole text, without a cache, makes of it."""
    ids, steps = list(job.ids), list[Step]()
    with steering(loaded, job.interventions, prompt_lengths=[len(job.ids)], budget=job.budget):
        while len(steps) < job.sampling.max_tokens:
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            logprobs = logits.log_softmax(-1)
            token = int(logits.argmax())
            top = logprobs.topk(3)
            steps.append(
                Step(token, float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
            )
            ids.append(token)
            if token == loaded.tokenizer.eos_token_id:
                break
    return steps


def assert_alike(found: list[Step], wanted: list[Step]) -> None:
    assert [step.token for step in found] == [step.token for step in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=2e-4)
        assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=2e-4)


def test_every_answer_is_the_one_of_a_plain_loop_whatever_is_beside_it(
    make: Make, served: LoadedModel, tiny: LoadedModel, library: Path
) -> None:
    jobs = jobs_of(served, library)
    found = written(make(served), jobs)
    wanted = [expected(tiny, job) for job in jobs]
    for job, one, other in zip(jobs, found, wanted, strict=True):
        assert one, job.id
        assert_alike(one, other)
    texts = {job.id: [step.token for step in one] for job, one in zip(jobs, found, strict=True)}
    for name in ("add", "away", "rotate", "ablate", "clamp", "gated", "generated", "kit", "latents", *GATED):
        assert any(texts[f"{name}-{i}"] != texts[f"none-{i}"] for i in range(len(TEXTS))), name
    for name in ("assistant", "chatty"):
        assert any(texts[f"{name}-{i}"] != texts[f"chat-{i}"] for i in range(len(TEXTS))), name
    assert all(texts[f"zero-{i}"] == texts[f"none-{i}"] for i in range(len(TEXTS)))


def test_drawn_answers_are_their_own_seeds_whatever_is_beside_them(served: LoadedModel, library: Path) -> None:
    jobs = jobs_of(served, library, temperature=0.8, top_p=0.9)
    together = written(continuous(served), jobs)
    alone = written(OneByOne(served), jobs)
    assert [[s.token for s in steps] for steps in together] == [[s.token for s in steps] for steps in alone]


def test_a_prompt_that_arrives_in_chunks_is_steered_as_one_that_does_not(served: LoadedModel, library: Path) -> None:
    jobs = jobs_of(served, library)
    small = written(continuous(served, max_running=4, batch_tokens=8), jobs)
    large = written(continuous(served, batch_tokens=512), jobs)
    assert [[s.token for s in steps] for steps in small] == [[s.token for s in steps] for steps in large]


def test_answers_that_must_give_way_to_others_come_out_the_same(served: LoadedModel, library: Path) -> None:
    jobs = jobs_of(served, library, max_tokens=40)
    tight = written(continuous(served, cache_tokens=512), jobs)
    roomy = written(continuous(served, cache_tokens=16384), jobs)
    assert [[s.token for s in steps] for steps in tight] == [[s.token for s in steps] for steps in roomy]


def test_where_gates_were_open_and_what_a_budget_left_is_told(make: Make, served: LoadedModel, library: Path) -> None:
    every = jobs_of(served, library, bias={served.tokenizer.eos_token_id: -100.0})
    jobs = [job for job in every if job.id in [f"{name}-1" for name in ("gated", "chatty", *GATED)]]
    jobs.append(Job("budget", jobs[0].ids, jobs[0].sampling, jobs[0].interventions, 0.5))

    async def told(engine: Engine, job: Job) -> tuple[list[int], dict[str, list[int]], dict[str, float]]:
        ticket = engine.submit(job)
        tokens = [step.token async for step in ticket]
        return tokens, *await ticket.account()

    async def all_of_them(engine: Engine) -> list[Any]:
        engine.start()
        try:
            found = await asyncio.gather(*(told(engine, job) for job in jobs))
            return [*found, await told(engine, replace(jobs[0], id="again"))]  # in the room that others gave back
        finally:
            await asyncio.to_thread(engine.close)

    *found, again = asyncio.run(all_of_them(make(served)))
    for job, (tokens, fired, scales) in zip(jobs, found, strict=True):
        with steering(served, job.interventions, prompt_lengths=[len(job.ids)], budget=job.budget) as steered:
            with torch.no_grad():
                served.model(input_ids=torch.tensor([[*job.ids, *tokens[:-1]]]), use_cache=False)
            (whole,) = steered.fired()
        assert fired == whole, job.id
        assert any(fired.values())
        assert scales == ({"resid_post.2": pytest.approx(0.5 / 0.75)} if job.id == "budget" else {})
    assert again == found[0]


def test_an_answer_that_has_ended_leaves_nothing_that_steers_it_alone(
    served: LoadedModel, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, original = list[Any](), Planned.steering

    def noted(planned: Planned, loaded: LoadedModel) -> Steering:
        found = original(planned, loaded)
        made.append(weakref.ref(found))
        return found

    async def run(engine: Engine, jobs: list[Job]) -> None:
        engine.start()
        try:
            for job in jobs:
                async for _ in engine.submit(job):
                    pass
            gc.collect()
            assert [each() for each in made] == [None, None]
        finally:
            await asyncio.to_thread(engine.close)

    monkeypatch.setattr(Planned, "steering", noted)
    every = {job.id: job for job in jobs_of(served, library, max_tokens=2)}
    asyncio.run(run(continuous(served), [every[name] for name in ("many-0", "patient-1", "none-0", "none-1")]))


@pytest.mark.parametrize(("is_whole", "wakes"), [(True, [1, 16, 16, 7]), (False, [1] * 40)])
def test_an_answer_that_is_read_as_a_whole_wakes_its_reader_seldom(is_whole: bool, wakes: list[int]) -> None:
    steps = [Step(i, None, []) for i in range(40)]

    async def run() -> list[list[Any]]:
        told = list[list[Any]]()

        class Told(Ticket):
            def heard(self, what: Any) -> None:
                told.append([*what])

        ticket = Told(Job("a", [5], Sampling(40), is_whole=is_whole), asyncio.get_running_loop(), frozenset(), None)
        for step in steps:
            engines.hand_over([(ticket, step)])
        await asyncio.sleep(0)
        return told

    told = asyncio.run(run())
    assert [each for what in told for each in what] == [*steps, None]
    assert [sum(each is not None for each in what) for what in told] == wakes


def test_where_gates_were_open_is_told_of_an_answer_that_is_given_back_meanwhile(
    served: LoadedModel, library: Path
) -> None:
    """Whoever asks may have to wait for a pass to begin, which gives back what has ended."""
    every = {job.id: job for job in jobs_of(served, library, bias={served.tokenizer.eos_token_id: -100.0})}

    async def told(engine: Engine, name: str) -> tuple[Any, Any]:
        ticket = engine.submit(every[name])
        await anext(ticket)
        asked = ticket.fired_on
        async for _ in ticket:
            pass
        for other in ("none-0", "none-2"):
            async for _ in engine.submit(replace(every[other], id=f"{other} after {name}")):
                pass
        assert ticket.fired_on is not asked, "it was given back"
        return asked(), (await ticket.account()).fired

    async def run(engine: Engine) -> list[tuple[Any, Any]]:
        engine.start()
        try:
            return [await told(engine, name) for name in ("many-1", "gated-1")]
        finally:
            await asyncio.to_thread(engine.close)

    for late, fired in asyncio.run(run(continuous(served))):
        assert late == fired
        assert any(fired.values())


def test_what_ends_in_the_pass_in_which_it_is_cancelled_is_not_kept(
    served: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled, ids = threading.Event(), served.tokenizer(TEXTS[0])["input_ids"]
    original = engines.hand_over

    def told(steps: Any) -> None:
        original(steps)
        assert all(ticket.n_written < 3 for ticket, _ in steps) or cancelled.wait(60)

    monkeypatch.setattr(engines, "hand_over", told)
    engine = Continuous(served, max_running=4, batch_tokens=32, cache_tokens=1024)

    async def run() -> None:
        engine.start()
        ticket = engine.submit(Job("x", ids, Sampling(3, bias={served.tokenizer.eos_token_id: -100.0})))
        assert len([step async for step in ticket]) == 3
        ticket.cancel()
        cancelled.set()
        await asyncio.to_thread(engine.close)

    asyncio.run(run())
    router = engine._manager.output_router
    assert router.output_queue.empty()
    assert not router.result_handlers


def test_a_cancelled_answer_that_waits_takes_no_room(served: LoadedModel) -> None:
    async def run() -> list[bool]:
        engine = OneByOne(served)
        first, second = (engine.submit(Job(name, [5, 6], Sampling(3))) for name in "ab")
        there = [weakref.ref(first), weakref.ref(second)]
        second.cancel()
        second.cancel()
        del second
        gc.collect()
        return [each() is not None for each in there]

    assert asyncio.run(run()) == [True, False]


def test_a_cancelled_answer_stops_and_the_others_go_on(make: Make, served: LoadedModel) -> None:
    ids = served.tokenizer(TEXTS[0])["input_ids"]
    never = {served.tokenizer.eos_token_id: -100.0}
    long, short = (
        Job(name, ids, Sampling(n, temperature=0.0, bias=never)) for name, n in (("long", 300), ("short", 5))
    )

    async def run(engine: Engine) -> tuple[int, list[Step]]:
        engine.start()
        with at_rest(served, behind=4):
            ticket = engine.submit(long)
            await anext(ticket)
            ticket.cancel()
        found = [step async for step in engine.submit(short)]
        n = ticket.n_written
        await asyncio.to_thread(engine.close)
        return n, found

    n, found = asyncio.run(run(make(served)))
    assert n < 10
    assert len(found) == 5


def test_what_cannot_be_done_is_refused_before_it_is_begun(make: Make, served: LoadedModel, library: Path) -> None:
    ids, up = served.tokenizer("The river")["input_ids"], load_library(library)["up"]
    other = replace(up, model=up.model.model_copy(update={"fingerprint": "0" * 64}))

    async def refused(job: Job, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            engine.submit(job)

    engine = make(served)
    engine.start()
    try:
        for job, error, match in [
            (Job("a", ids * 400, Sampling(4)), TooLongError, "at most 512 tokens"),
            (Job("b", ids, Sampling(4), [Intervention.of(up, 100.0)]), ConfigError, "dose of at most 2"),
            (Job("c", ids, Sampling(4), [Intervention.of(other)]), MismatchError, "other weights"),
        ]:
            asyncio.run(refused(job, error, match))
    finally:
        engine.close()


def test_an_engine_that_fails_says_so_and_that_it_is_no_longer_alive(served: LoadedModel) -> None:
    engine = continuous(served)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    async def run() -> None:
        engine.start()
        assert engine.is_alive
        handle = served.model.base_model.register_forward_pre_hook(broken)
        try:
            with pytest.raises(EngineError, match="out of memory"):
                async for _ in engine.submit(Job("x", [5, 6], Sampling(3))):
                    pass
        finally:
            handle.remove()
        async with asyncio.timeout(30):
            while engine.is_alive:  # whoever waits hears of it a little before the loop has ended
                await asyncio.sleep(0.01)

    asyncio.run(run())
    assert not engine.is_alive
    engine.close()
