"""Prompts that begin alike are computed once where nothing steers them, and in full where something does."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from activations.models import LoadedModel
from steer.library import load_library
from steer.operations import Intervention
from steer.serving.continuous import PAGE, Continuous
from steer.serving.engine import Job
from steer.serving.one_by_one import OneByOne
from steer.serving.sampling import Sampling
from tests.steer.serving.conftest import written

TEXT = "The river ran past the mill and on to the sea, " * 12


@pytest.mark.parametrize("starts_plain", [True, False])
def test_what_was_steered_never_serves_what_was_not_nor_the_other_way(
    served: LoadedModel, library: Path, starts_plain: bool
) -> None:
    ids, how = served.tokenizer(TEXT)["input_ids"], Sampling(8, temperature=0.0, n_top=1)
    vectors = load_library(library)
    steers: dict[str, list[Intervention]] = {
        "plain": [], "up": [Intervention.of(vectors["up"])], "gated": [Intervention.of(vectors["gated"])]
    }  # fmt: skip
    order = [*steers] if starts_plain else [*reversed(steers)]
    jobs = [Job(f"{name}-{turn}", ids, how, steers[name]) for turn in range(2) for name in order]
    by_itself = written(OneByOne(served), [Job(name, ids, how, each) for name, each in steers.items()])
    alone = dict(zip(steers, by_itself, strict=True))
    engine, computed = Continuous(served, max_running=4, batch_tokens=1024, cache_tokens=16384), list[int]()

    def counted(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        computed.append(kwargs["input_ids"].shape[1])

    async def one_after_the_other() -> dict[str, tuple[int, list[Any]]]:
        engine.start()
        found = {}
        try:
            for job in jobs:
                computed.clear()
                steps = [step async for step in engine.submit(job)]
                found[job.id] = max(computed), steps
        finally:
            await asyncio.to_thread(engine.close)
        return found

    handle = served.model.base_model.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        found = asyncio.run(one_after_the_other())
    finally:
        handle.remove()
    n_shared = (len(ids) - 1) // PAGE * PAGE
    assert n_shared > 0
    for id_, (n, steps) in found.items():
        assert n == (len(ids) - n_shared if id_ == "plain-1" else len(ids)), id_
        wanted = alone[id_.partition("-")[0]]
        assert [step.token for step in steps] == [step.token for step in wanted], id_
        assert [step.logprob for step in steps] == pytest.approx([step.logprob for step in wanted], abs=2e-4)
