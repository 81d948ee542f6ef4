"""The command: every verb answers, prints one JSON object, and turns each mistake into one line and exit code 1."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from activations.errors import SaekitError
from activations.models import load_model
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from steer import cli, vector_cli
from steer.gates import Gate
from steer.library import load_library, save_library
from steer.making.config import VectorConfig
from steer.making.make import KINDS
from steer.operations import VECTOR_OPERATIONS
from steer.show import show

ROOT = Path(__file__).resolve().parents[2]
HOOK, OTHER = "resid_post.1", "mlp_out.2"
VERBS = (
    "harvest", "train", "evaluate", "index", "label", "vector make", "vector find", "vector combine", "vector layers",
    "vector gate", "vector calibrate", "vector score", "vector learn", "vector interference", "vector compare",
    "vector features", "vector kit", "browse", "chat", "serve", "convert", "inspect", "demo",
)  # fmt: skip
WITHOUT_SEED = (
    "browse", "vector make", "vector find", "vector combine", "vector gate", "vector features", "vector kit",
)  # fmt: skip
MEASURE = [
    f"measure.{key}={value}"
    for key, value in {
        "doses": "[0.5]", "select_prompts": 2, "heldout_prompts": 2, "max_new_tokens": 4, "n_random": 1,
    }.items()
]  # fmt: skip


class Ran(NamedTuple):
    """What one call of the command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Saekit = Callable[..., Ran]


@pytest.fixture
def saekit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Saekit:
    """Run `saekit ARGUMENTS` in this process."""
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


def call(capsys: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Ran:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["saekit", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return Ran(code, *capsys.readouterr())


def sets(*pairs: str, **values: object) -> list[str]:
    """--set arguments."""
    pairs = (*pairs, *(f"{key}={value}" for key, value in values.items()))
    return [part for pair in pairs for part in ("--set", pair)]


class Made(NamedTuple):
    """Artefacts of a whole tiny run, and things that do not belong to it."""

    model: Path
    text: Path
    folder: Path
    store: Path
    sae: Path
    index: Path
    library: Path
    other_model: Path
    wide_sae: Path
    results: dict[str, Any]


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The verbs one after the other; they meet on disk only."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [{"text": f"Text {i} has {'la ' * (5 * i % 37)}and a cat sat on {i * 37}."} for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store, run, index, library = (folder / name for name in ("store", "run", "index", "library"))
    common = {"store": store, "sae": run / "sae", "model": tiny_llama}
    harvest = {"ctx": 32, "commit_sequences": 16, "max_tokens": 2000, "hook_points": f"[{HOOK}, {OTHER}]"}
    train = {"hook_points": f"[{HOOK}]", "train_tokens": 2048, "batch_size": 128, "eval_every": 8, "log_every": 4}
    stages = {
        "harvest": sets(model=tiny_llama, text=folder / "text.jsonl", out=store, **harvest),
        "train": sets("sae.d_sae=48", "sae.k=4", store=store, out=run, **train),
        "evaluate": sets(**common, ce_sequences=4),
        "index": sets(**common, out=index, n_logits=5),
        "label": label(index, run / "sae", tiny_llama),
        "vector make": sets(*MEASURE, **common, latent=5, out=library),
        "vector learn": learn(tiny_llama, folder / "learned"),
        "vector compare": sets(
            model=tiny_llama,
            out=folder / "compare",
            conditions="[vector, instruction]",
            prompts=4,
            select_prompts=2,
            doses="[0.3]",
            max_new_tokens=4,
            kl_texts=2,
            latency_rounds=1,
        ),
        "chat": ["Hello there", *sets(model=tiny_llama, library=library, max_new_tokens=4)],
    }
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        capture = _Capture(patch)
        for verb, arguments in stages.items():
            ran = call(capture, patch, *verb.split(), *arguments, "--json")
            results[verb] = ran.json
    other = load_model(str(tiny_llama), dtype="float32")
    with torch.no_grad():
        other.model.lm_head.weight.mul_(1.5)
    other.model.save_pretrained(folder / "other-model")
    other.tokenizer.save_pretrained(folder / "other-model")
    sae = SaeArtefact.load(run / "sae")
    wide = np.zeros((8, sae.d_sae), np.float32)
    replace(
        sae, W_enc=np.vstack([sae.W_enc, wide]), W_dec=np.hstack([sae.W_dec, wide.T]), b_dec=np.zeros(40, np.float32)
    ).save(folder / "wide-sae")
    return Made(
        tiny_llama, folder / "text.jsonl", folder, store, run / "sae", index, library, folder / "other-model",
        folder / "wide-sae", results,
    )  # fmt: skip


def label(index: Path, sae: Path, model: Path, *pairs: str, **changes: object) -> list[str]:
    explainer = (f"explainer.model=local:{model}", "explainer.max_answer_tokens=4", "scoring.pool=8")
    return sets(*explainer, *pairs, **{"index": index, "sae": sae, "model": model, "latents": "[5]"} | changes)


def learn(model: Path, out: Path, **changes: object) -> list[str]:
    limits = {"n_prompts": 4, "n_select": 2, "n_heldout": 2, "max_new_tokens": 4, "steps": 2, "batch": 2}
    return sets(**{"model": model, "out": out, "hook_points": f"[{HOOK}]"} | limits | changes)


class _Capture:
    """What capsys does, for a fixture that outlives a test."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def readouterr(self) -> tuple[str, str]:
        texts = [stream.getvalue() if isinstance(stream, StringIO) else "" for stream in (sys.stdout, sys.stderr)]
        for name in ("stdout", "stderr"):
            self._patch.setattr(sys, name, StringIO())
        return texts[0], texts[1]


def test_help_lists_every_verb(saekit: Saekit) -> None:
    ran = saekit("--help")
    assert ran.code == 0
    assert all(verb.split()[0] in ran.out for verb in VERBS)
    verbs = {command.callback.__name__ for command in cli.app.registered_commands}
    verbs |= {f"vector {command.callback.__name__}" for command in vector_cli.app.registered_commands}
    assert verbs == set(VERBS)
    for verb in VERBS:
        assert saekit(*verb.split(), "--help").code == 0


def test_every_kind_and_operation_can_be_asked_for() -> None:
    fields = VectorConfig.model_fields
    assert set(get_args(fields["kind"].annotation)) == set(KINDS)
    assert set(get_args(fields["operation"].annotation)) == set(VECTOR_OPERATIONS)


def test_help_loads_no_framework() -> None:
    code = "import steer.cli, sys; sys.argv = ['saekit', '--help']; steer.cli.main()"
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in modules
    assert not modules & {"torch", "jax", "transformers", "flax", "zarr", "matplotlib", "sqlalchemy", "numpy"}


@pytest.mark.parametrize(
    "verb",
    ["evaluate", "index", *(verb for verb in VERBS if verb.startswith("vector ")), "browse", "chat", "demo"],
)
def test_a_dry_run_prints_the_resolved_config_and_does_nothing(
    saekit: Saekit, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: from-the-file\n")
    file = ["--config", "c.yaml"] if verb in ("browse", "chat", "vector find") else ["c.yaml"]
    config = saekit(
        *verb.split(),
        *file,
        *sets(seed=3) if verb not in WITHOUT_SEED else (),
        "--dry-run",
        "--json",
    ).json["config"]
    assert (config["model"], config.get("seed", 3)) == ("from-the-file", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_labelled_features_become_a_library_with_measured_vectors(saekit: Saekit, made: Made, tmp_path: Path) -> None:
    library, labels = tmp_path / "library", tmp_path / "labels.jsonl"
    rows = [{"latent": i, "text": f"thing {i}", "authors": ["ada"], "decided": "2026-01-01T00:00:00+00:00"}
            for i in (1, 5, 7)]  # fmt: skip
    rows.append({"latent": 9, "text": "", "authors": ["ada"], "decided": None})  # annotators did not agree
    labels.write_text("\n".join(map(json.dumps, rows)))
    added = saekit("library", "add", *sets(library=library, sae=made.sae, features=labels, index=made.index), "--json")
    assert added.json["features"] == 3
    common = sets(*MEASURE, library=library, sae=library / "sae", store=made.store, model=made.model)
    made_now = saekit("vector", "features", *common, *sets(out=library, parts=2, part=1), "--json").json
    assert list(made_now["vectors"]) == ["thing-5-5"]
    again = saekit("vector", "features", *common, *sets(out=library), "--json").json
    assert list(again["vectors"]) == ["thing-1-1", "thing-7-7"], "what is there is not made again"
    shown = saekit("library", "show", library, "5", "--json").json
    assert (shown["label"], shown["vector"], shown["author"]) == ("thing 5", "thing-5-5", "ada")
    assert "thing 5" in [each["text"] for each in shown["history"]]
    row = saekit("inspect", made.index, "--latent", 5, "--json").json
    assert shown["density"] == row["density"]
    assert saekit("library", "add", *sets(library=library, kit="two", of="{thing-1-1: 1.0, thing-7-7: 0.5}")).code == 0
    kit = saekit("vector", "kit", *sets(*MEASURE, library=library, kit="two", model=made.model), "--json").json
    low, high = kit["effect_ci95"]
    assert low <= kit["effect"] <= high
    alone = [each["effect"] for each in kit["vectors"].values()]
    assert kit["effect"] == pytest.approx(sum(alone) / 2)
    assert len(saekit("library", "show", library, "two", "--json").json["receipts"]) == 1
    other = saekit("vector", "features", *sets(*MEASURE, library=library, sae=made.wide_sae, store=made.store,
                                               model=made.model))  # fmt: skip
    assert (other.code, "the SAE of the library's features" in other.err) == (1, True)
    unknown = saekit("vector", "kit", *sets(library=library, kit="three", model=made.model))
    assert (unknown.code, "one of two" in unknown.err) == (1, True)


def test_a_dry_training_also_checks_the_store_and_says_what_it_takes(
    saekit: Saekit, made: Made, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("lr: 0.125\nsae: {d_sae: 48, k: 4}\n")
    limits = {"store": made.store, "out": tmp_path / "o", "train_tokens": 1000, "batch_size": 128, "seed": 3}
    shown = saekit(
        "train", tmp_path / "c.yaml", *sets(**limits, hook_points=f"[{HOOK}, {OTHER}]"), "--dry-run", "--json"
    ).json
    assert (shown["config"]["lr"], shown["config"]["seed"]) == (0.125, 3)
    assert (shown["n_steps"], shown["tokens"]) == (7, 896)
    assert list(shown["saes"]) == [HOOK, OTHER]
    assert shown["saes"][HOOK]["lr"] == 0.125
    assert not (tmp_path / "o").exists()
    refused = saekit("train", *sets("sae.d_sae=4", "sae.k=4", **limits, hook_points=f"[{HOOK}]"), "--dry-run")
    assert (refused.code, "sae.k" in refused.err) == (1, True)


def test_a_dry_harvest_also_says_what_room_it_needs(saekit: Saekit, made: Made, tmp_path: Path) -> None:
    arguments = sets(model=made.model, text=made.text, out=tmp_path / "s", hook_points=f"[{HOOK}]", max_tokens=1000)
    shown = saekit("harvest", *arguments, "--dry-run", "--json").json
    assert shown["config"]["max_tokens"] == 1000
    assert 2 * 32 * 1000 < shown["bytes_needed"] < shown["bytes_free"]
    assert shown["seconds"] == pytest.approx(shown["tokens"] / shown["tok_s"])
    assert shown["batch_tokens"] == 2048
    assert not (tmp_path / "s").exists()


def test_a_dry_labelling_also_says_what_it_would_ask_and_the_result_is_a_table(saekit: Saekit, made: Made) -> None:
    arguments = label(made.index, made.sae, made.model, latents="[5, 7]")
    shown = saekit("label", *arguments, "--dry-run", "--json").json
    assert shown["config"]["latents"] == [5, 7]
    assert (shown["latents"], shown["cost"], shown["requests"] > 0, shown["tokens_in"] > 100) == (2, 0, True, True)
    ran = saekit("label", *arguments)
    assert "requests to make" in ran.err
    lines = [line.split()[:1] for line in ran.out.splitlines()]
    assert lines[-3:] == [["latent"], ["5"], ["7"]]


def test_keep_tokens_makes_a_ring(saekit: Saekit, made: Made, tmp_path: Path) -> None:
    """Without a trainer it fills up and waits; here it is large enough for the whole text."""
    assert saekit(*harvest(made, tmp_path), "--keep-tokens", 10**7, "--json").code == 0
    ring = saekit("inspect", tmp_path / "out", "--json").json["ring"]
    assert (ring["keep_tokens"], ring["released_sequences"]) == (10**7, 0)
    assert "or more" in saekit(*harvest(made, tmp_path), "--keep-tokens", 100).err


def test_inspect_tells_how_a_store_is(saekit: Saekit, made: Made, tmp_path: Path) -> None:
    health = saekit("inspect", made.store, "--json").json["health"]
    assert health == {"checksums": "not read; --verify does", "missing_shards": 0}
    assert saekit("inspect", made.store, "--verify", "--json").json["health"]["checksums"] == "all match"
    store = corrupt_store(made, tmp_path)
    ran = saekit("inspect", store, "--verify")
    assert (ran.code, ran.out) == (1, "")
    assert f"'{HOOK}' in sequences 0 to" in ran.err
    assert ran.err.count("\n") == 1 + ran.err.count("verify:"), "one line, and that of the progress"
    next((store / HOOK).glob("c.*")).unlink()
    health = saekit("inspect", store, "--json").json["health"]
    assert (health["missing_shards"], health["first_missing"][: len(HOOK)]) == (1, HOOK)


def test_the_pipeline_runs_through_the_verbs(made: Made, saekit: Saekit) -> None:
    results = made.results
    store = ActivationStore.open(made.store)
    assert results["harvest"]["n_tokens"] == store.state.tokens > 1000
    assert results["harvest"]["tok_s"] > 0
    trained = results["train"]
    assert (trained["steps"], trained["resumed_from"], list(trained["saes"])) == (16, 0, [HOOK])
    assert Path(trained["saes"][HOOK]["path"]) == made.sae
    assert 0 < trained["saes"][HOOK]["fvu"] < 2
    assert len(json.dumps(trained)) < 2000, "figures, not weights"
    assert 0 < results["evaluate"]["fvu"] < 2
    assert results["index"]["path"] == str(made.index)
    assert (results["label"]["latents"], len(results["label"]["labels"])) == (1, 1)
    labels = saekit("inspect", made.index, "--latent", 5, "--json").json["labels"]
    assert [label["kind"] for label in labels[:2]] == ["tokens", "logits"]
    assert results["vector make"]["name"] == "latent-5"
    assert len(results["vector make"]["effect_ci95"]) == 2
    assert list(results["vector learn"]["vectors"]) == ["answer-in-one-short-sentence"]
    assert results["vector learn"]["conditions"]["nothing"]["kl"] > 0
    assert len(json.dumps(results["vector learn"])) < 3000, "figures, not losses"
    assert list(results["vector compare"]["formality"]["conditions"]) == ["unsteered", "vector", "instruction"]
    assert [vector["name"] for vector in results["chat"]["vectors"]] == ["latent-5"]
    assert isinstance(results["chat"]["answer"], str)
    kinds = {"store": "activation store", "sae": "SAE", "index": "feature index", "library": "library"}
    for name, kind in kinds.items():
        assert saekit("inspect", getattr(made, name), "--json").json["artefact"] == kind
        assert saekit("inspect", getattr(made, name)).code == 0
    latent = saekit("inspect", made.index, "--latent", 5, "--json").json
    assert latent["latent"] == 5
    assert all(isinstance(latent[kind], int) for kind in ("contexts", "sampled", "near_misses"))


def test_latents_that_a_text_makes_active_become_a_vector(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    where = sets(model=made.model, sae=made.sae, index=made.index, n=3, max_density=1)
    found = saekit("vector", "find", "the", "cat sat on the mat", *where, "--json").json
    assert found["text"] == "the cat sat on the mat"
    assert len(found["latents"]) == 3
    assert all(row["density"] > 0 and row["label"] for row in found["latents"].values())
    assert "vector make --set kind=latents" in saekit("vector", "find", "the cat sat on the mat", *where).out
    make = sets(**found["make"], operation="rotate", scope="generated", gate=0.5, gate_off=0.25, gate_tokens=2)
    arguments = [*belongs(made, tmp_path, "vector make"), *sets(*MEASURE), *make]
    assert saekit(*arguments, "--json").json["source"]["kind"] == "latents"
    (vector,) = load_library(tmp_path / "out").values()
    assert (vector.operation, vector.scope) == ("rotate", "generated")
    assert isinstance(vector.gate, Gate)
    assert (vector.gate.on, vector.gate.off, vector.gate.min_tokens) == (0.5, 0.25, 2)
    assert sorted(vector.source["latents"]) == sorted(found["latents"])


def test_vectors_are_combined_and_gated(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    library = tmp_path / "out"
    for latent in (5, 7):
        saekit(*belongs(made, tmp_path, "vector make", latent=latent, coefficient=1), *sets(*MEASURE))
    where = {"model": made.model, "library": library}
    combine = sets("vectors={latent-5: 1.0, latent-7: 1.0}", *MEASURE, **where, out=library, sae=made.sae, name="both")
    rows = saekit("vector", "combine", *combine, "--json").json["vectors"]
    assert rows["both"]["measured as"] == "latent-5"
    plain = saekit("vector", "combine", *combine, *sets(how="without", sae="null"))
    assert "not measured" in plain.out
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"the cat {i} sat" for i in range(12)))
    gate = {"vector": "both", "fires": texts, "quiet": texts, "rate": 0.5}
    assert saekit("vector", "gate", *sets(**where, **gate), "--json").json["hits"]["n"] == 12
    assert load_library(library)["both"].gate is not None


def test_layers_are_swept_into_a_table_and_a_picture(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    limits = sets(model=made.model, layers="[1, 2]", prompts=2, max_new_tokens=2, out=tmp_path / "layers")
    ran = saekit("vector", "layers", *limits)
    assert ran.code == 0, ran.err
    assert [line.split()[0] for line in ran.out.splitlines()][-3:] == ["layers", "resid_post.1", "resid_post.2"]
    assert {path.name for path in (tmp_path / "layers").iterdir()} == {"config.yaml", "layers.json", "layers.svg"}


def test_an_instruction_becomes_a_vector(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    (tmp_path / "ask.jsonl").write_text("\n".join(json.dumps({"text": f"What is {i}?"}) for i in range(8)))
    arguments = belongs(made, tmp_path, "vector make", kind="modifier", requests=tmp_path / "ask.jsonl")
    assert "Answer tersely" in saekit(*arguments).err
    shown = saekit(*arguments, *sets("modifier=Be kind.", *MEASURE), "--json").json
    assert (shown["name"], shown["source"]["kind"], shown["instruction"]) == ("be-kind", "modifier", "Be kind.")
    library = {"model": made.model, "library": shown["library"], "sae": tmp_path / "no sae"}
    scored = saekit("vector", "score", *sets(**library, **SCORE, parts="[concept]"), "--json").json
    assert (scored["instruction"], scored["n_prompts"]) == ("Be kind.", 2)
    ablated = [*belongs(made, tmp_path, "vector make", latent=5, operation="ablate"), *sets(*MEASURE)]
    shown = saekit(*ablated, "--json").json
    assert (shown["coefficient"], shown["instruction"][:12]) == (1.0, "Do not write")


def steered(made: Made, tmp_path: Path, *pairs: str, **changes: object) -> list[str]:
    """Settings for a copy of the library whose latent steers by a dose of 0.5."""
    shutil.copytree(made.library, tmp_path / "own", dirs_exist_ok=True)
    return sets(*pairs, **{"model": made.model, "library": tmp_path / "own", "sae": made.sae} | changes)


SCORE = {
    "n_prompts": 2, "max_new_tokens": 3, "n_choices": 2, "n_refusal": 2, "refusal_tokens": 2, "latency_tokens": 2,
    "latency_repeats": 2, "n_random": 1,
}  # fmt: skip


def test_a_vector_is_scored_and_the_score_is_kept(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    ran = saekit("vector", "score", *steered(made, tmp_path, **SCORE), "--json")
    assert set(ran.json["concept"]) == {"unsteered", "steered", "prompt", "random"}
    receipts = saekit("inspect", tmp_path / "own", "--json").json["vectors"]["latent-5"]["receipts"]
    assert [each.get("kind") for each in receipts] == [None, "score"]
    table = saekit("vector", "score", *steered(made, tmp_path, **SCORE)).out
    assert [line.split()[0] for line in table.splitlines() if line.startswith("steered ")] == ["steered"] * 5


def test_a_vector_is_calibrated_or_nothing_changes(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    """On the tiny model no latent has an effect that its few prompts could show."""
    limits = {"doses": "[0.01]", "n_prompts": 2, "max_new_tokens": 2}
    arguments = steered(made, tmp_path, **limits)
    before = (tmp_path / "own" / "manifest.json").read_bytes()
    ran = saekit("vector", "calibrate", *arguments)
    assert (ran.code, ran.out) == (1, "")
    assert "Nothing was changed" in ran.err
    assert (tmp_path / "own" / "manifest.json").read_bytes() == before


def test_beyond_its_window_a_vector_does_not_chat(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    (vector,) = load_library(made.library).values()
    save_library(tmp_path, [replace(vector, window=(0.05 * vector.mean_norm, 0.1 * vector.mean_norm))])
    chat = ["chat", "Hi", *sets(model=made.model, library=tmp_path, max_new_tokens=2)]
    beyond, inside = (sets(vectors=f"{vector.name} {dose}") for dose in (0.15, 0.09))
    ran = saekit(*chat, *beyond)
    assert (ran.code, "window" in ran.err, ran.err.count("\n")) == (1, True, 1)
    assert saekit(*chat, *inside).code == 0
    assert saekit(*chat, *beyond, *sets(force="true")).code == 0


def test_inspect_compares_two_saes(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    arguments = ["inspect", made.index, made.sae.parent, *sets(store=made.store, min_active=1, n_examples=2)]
    result = saekit(*arguments, "--json", "--out", tmp_path / "pairs.parquet").json
    assert result["latents"]["matched"]["one"] == result["latents"]["compared"]["other"] > 10
    assert result["tokens"] > 1000
    assert len(pq.read_table(tmp_path / "pairs.parquet")) >= result["latents"]["matched"]["one"]
    shown = saekit(*arguments)
    rows = [line.split() for line in shown.out.splitlines()]
    assert ["latents", "one", "one_share", "one_by_chance", "other", "other_share", "other_by_chance"] in rows
    assert ["matched", "one", "other", "decoder", "cosine", "correlation"] in rows
    words = result["examples"]["matched"][0]["one"][0]["words"]
    assert repr(words[0]) in shown.out
    assert "None" not in shown.out


def test_inspect_writes_an_index_as_a_table(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    result = saekit("inspect", made.index, "--out", tmp_path / "index.parquet", "--json").json
    assert (result["rows"], result["out"]) == (48, str(tmp_path / "index.parquet"))
    assert pq.read_table(tmp_path / "index.parquet").column("latent").to_pylist() == list(range(48))


def train(made: Made, out: Path, *pairs: str, **changes: object) -> list[Any]:
    limits = {"train_tokens": 1024, "batch_size": 128, "store": made.store, "out": out}
    return ["train", *sets("sae.d_sae=48", "sae.k=4", *pairs, **limits | changes)]


def test_several_hook_points_are_trained_in_one_run(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    trained = saekit(*train(made, tmp_path / "run", hook_points=f"[{HOOK}, {OTHER}]"), "--json").json
    assert list(trained["saes"]) == [HOOK, OTHER]
    for name, sae in trained["saes"].items():
        assert Path(sae["path"]) == tmp_path / "run" / "sae" / name
        assert saekit("inspect", sae["path"], "--json").json["hook_point"] == name
        scores = saekit(*belongs(made, tmp_path, "evaluate", sae=sae["path"], ce_sequences=2), "--json").json
        assert scores["fvu"] == pytest.approx(sae["fvu"], rel=1e-3)


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "crosscoder"])
def test_what_has_two_hook_points_runs_through_the_verbs(
    made: Made, saekit: Saekit, tmp_path: Path, architecture: str
) -> None:
    is_crosscoder, run = architecture == "crosscoder", tmp_path / "run"
    hook_point = f"{HOOK}{'+' if is_crosscoder else '->'}{OTHER}"
    arguments = train(made, run, f"sae.architecture={architecture}", hook_points=f"[{hook_point}]")
    trained = saekit(*arguments, "--json").json
    assert list(trained["saes"]) == [hook_point]
    scores = saekit(*belongs(made, tmp_path, "evaluate", sae=run / "sae", ce_sequences=2), "--json").json
    assert 0 < scores["fvu"] < 2
    assert scores["fvu"] == pytest.approx(trained["saes"][hook_point]["fvu"], rel=1e-3)
    index = saekit(*belongs(made, tmp_path / "i", "index", sae=run / "sae"), "--json").json["path"]
    assert saekit("inspect", index, "--json").json["hook_point"] == hook_point
    steered = saekit(*belongs(made, tmp_path, "vector make", sae=run / "sae", latent=3), *sets(*MEASURE), "--json")
    if is_crosscoder:
        assert (steered.code, steered.out) == (1, "")
        assert f"SAE of {hook_point}: expected one hook point" in steered.err
    else:
        vectors = saekit("inspect", tmp_path / "out", "--json").json["vectors"]
        assert vectors["latent-3"]["hook_point"] == OTHER


def test_finetune_goes_on_from_an_sae_of_another_format(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    assert saekit("convert", made.sae, tmp_path / "gemma", "--to", "gemma_scope_2").code == 0
    arguments = train(made, tmp_path / "run", hook_points=f"[{HOOK}]", lr=1e-9, train_tokens=256)
    trained = saekit(*arguments, "--finetune", tmp_path / "gemma", "--json").json["saes"][HOOK]
    before, after = SaeArtefact.load(made.sae), SaeArtefact.load(trained["path"])
    np.testing.assert_allclose(after.W_dec, before.W_dec, atol=1e-5)
    assert after.metadata["config"]["finetune"] == str(tmp_path / "gemma")
    wrong = saekit(*train(made, tmp_path / "o", "sae.d_sae=24", hook_points=f"[{HOOK}]"), "--finetune", made.sae)
    assert (wrong.code, "(32, 24, 32)" in wrong.err) == (1, True)


def test_plain_output_is_for_people(made: Made, saekit: Saekit) -> None:
    limits = sets(model=made.model, library=made.library, max_new_tokens=4, temperature=0)
    as_json = saekit("chat", "Hello", "there", *limits, "--json").json
    assert as_json["prompt"] == "Hello there"
    assert saekit("chat", "Hello", "there", *limits).out == as_json["answer"] + "\n"
    shown = saekit("inspect", made.index, "--latent", 5).out
    assert "top_logits" in shown


def test_numbers_are_rounded_where_they_are_shown_and_nowhere_else(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"effect": 0.123456789, "effect_ci95": [0.123456789, (0.5, {"low": 1 / 3}), "x", 12345, None]}
    show(result, as_json=False)
    shown = capsys.readouterr().out.split("\n")
    assert shown[0].split() == ["effect", "0.1235"]
    assert shown[1].split(None, 1)[1].strip() == '[0.1235, [0.5, {"low": 0.3333}], "x", 12345, null]'
    show(result, as_json=True)
    assert json.loads(capsys.readouterr().out)["effect_ci95"][:1] == [0.123456789]


def test_what_several_saes_share_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    path = "a/long/way/" * 12
    saes = {f"k={k}": {"path": path, "l0": k + 0.5} for k in (8, 16)}
    show({"steps": 1200, "config": {"sae": {"k": None}}, "saes": saes}, as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["steps", "1,200"], ["config.sae.k", "None"],
        ["saes", "path", "l0"], ["k=8", path, "8.5"], ["k=16", path, "16.5"],
    ]  # fmt: skip
    show({"saes": {"only": saes["k=8"]}}, as_json=False)
    assert capsys.readouterr().out.split() == ["saes.only.path", path, "saes.only.l0", "8.5"]


def test_a_conversation_goes_on_until_the_end_of_input(
    made: Made, saekit: Saekit, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Hello", "", "And then?"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    ran = saekit("chat", *sets(model=made.model, max_new_tokens=3, temperature=0))
    assert (ran.code, ran.out.count("\n\n") >= 2) == (0, True)


Mistake = Callable[[Made, Path], list[Any]]
WIDTHS = "reads and writes widths (32, 32), got (40, 40)"


def belongs(made: Made, tmp: Path, verb: str, **changes: object) -> list[Any]:
    values = {"store": made.store, "sae": made.sae, "model": made.model}
    return [*verb.split(), *sets(**values | changes, **{} if verb == "evaluate" else {"out": tmp / "out"})]


def file(tmp: Path, content: str) -> Path:
    (tmp / "file.yaml").write_text(content)
    return tmp / "file.yaml"


def corrupt_store(made: Made, tmp: Path) -> Path:
    shutil.copytree(made.store, tmp / "store")
    for shard in (tmp / "store" / HOOK).glob("c.*"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 0xFF
        shard.write_bytes(content)
    return tmp / "store"


def harvest(made: Made, tmp: Path, **changes: object) -> list[Any]:
    values = {"model": made.model, "text": made.text, "out": tmp / "out", "hook_points": f"[{HOOK}]"}
    return ["harvest", *sets(**values | changes)]


def text(tmp: Path, content: str) -> Path:
    (tmp / "text.jsonl").write_text(content)
    return tmp / "text.jsonl"


def damaged(path: Path, tmp: Path, name: str, content: str) -> Path:
    shutil.copytree(path, tmp / "damaged")
    (tmp / "damaged" / name).write_text(content)
    return tmp / "damaged"


def resigned(made: Made, tmp: Path) -> Path:
    """A library whose manifest was changed by someone who also made its hash right."""
    from steer.manifest import content_hash

    shutil.copytree(made.library, tmp / "library")
    path = tmp / "library" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["vectors"][0]["model"] = {"id": 1}
    manifest["content_sha256"] = content_hash(manifest)
    path.write_text(json.dumps(manifest))
    return tmp / "library"


def no_vectors(tmp: Path) -> Path:
    from steer.library import save_library

    save_library(tmp / "library", [])
    return tmp / "library"


MISTAKES: dict[str, tuple[Mistake, str]] = {
    "model that is a bare name": (lambda m, t: harvest(m, t, model="gpt9"), "wheel:gpt9"),
    "model folder that is not there": (lambda m, t: harvest(m, t, model=t / "no"), "nothing there"),
    "model that is not installed": (lambda m, t: ["chat", "Hi", *sets(model="wheel:nothing-like-it")], "pip install"),
    "model of another device": (lambda m, t: harvest(m, t, device="quantum"), "device"),
    "no store to train on": (lambda m, t: ["train", *sets(store=t / "no", out=t / "out")], "saekit harvest"),
    "no store to evaluate on": (lambda m, t: belongs(m, t, "evaluate", store=t / "no"), "saekit harvest"),
    "no store to index": (lambda m, t: belongs(m, t, "index", store=t / "no"), "saekit harvest"),
    "no SAE to evaluate": (lambda m, t: belongs(m, t, "evaluate", sae=t / "no"), "saekit train"),
    "no SAE to index": (lambda m, t: belongs(m, t, "index", sae=t / "no"), "saekit train"),
    "no SAE for a vector": (lambda m, t: belongs(m, t, "vector make", sae=t / "no", latent=1), "saekit train"),
    "no library": (lambda m, t: ["chat", "Hi", *sets(model=m.model, library=t / "no")], "saekit vector make"),
    "library without vectors": (lambda m, t: ["chat", "Hi", *sets(model=m.model, library=no_vectors(t))], "library"),
    "no index to label": (lambda m, t: ["label", *label(t / "no", m.sae, m.model)], "saekit index"),
    "no SAE to label": (lambda m, t: ["label", *label(m.index, t / "no", m.model)], "saekit train"),
    "no endpoint to label": (
        lambda m, t: ["label", *label(m.index, m.sae, m.model, "explainer.model=gpt")], "base_url",
    ),
    "no key to label": (
        lambda m, t: ["label", *label(m.index, m.sae, m.model, "explainer.model=gpt",
                                      "explainer.base_url=http://127.0.0.1:9/v1", "explainer.key_env=SAEKIT_NO_KEY")],
        "SAEKIT_NO_KEY",
    ),
    "SAE of another width to label": (lambda m, t: ["label", *label(m.index, m.wide_sae, m.model)], WIDTHS),
    "another model to label": (lambda m, t: ["label", *label(m.index, m.sae, m.other_model)], "one trained on"),
    "nothing to inspect": (lambda m, t: ["inspect", t / "no"], "none of them"),
    "no index to inspect": (lambda m, t: ["inspect", t, "--latent", 1], "feature index"),
    "unknown key": (lambda m, t: ["train", *sets(stor="x")], "unknown key 'stor'"),
    "unknown key inside": (lambda m, t: ["train", *sets("sae.kk=1")], "unknown key 'sae.kk'"),
    "unknown key in a file": (lambda m, t: ["index", file(t, "nope: 1")], "file.yaml: unknown key 'nope'"),
    "wrong type": (lambda m, t: ["harvest", *sets(ctx="many")], "key 'ctx'"),
    "wrong type in a list": (lambda m, t: ["vector", "make", *sets("measure.doses=[a]")], "measure.doses"),
    "value out of range": (lambda m, t: ["train", *sets(batch_size=0)], "greater than 0"),
    "not an assignment": (lambda m, t: ["train", "--set", "seed"], "key.path=value"),
    "a value that is no YAML": (lambda m, t: ["train", *sets(seed="[1")], "YAML"),
    "a value that is no date": (lambda m, t: ["train", *sets(seed="2024-13-45")], "seed"),
    "a key over two lines": (lambda m, t: ["train", "--set", "a\nb=1"], "unknown key"),
    "no config file": (lambda m, t: ["train", t / "no.yaml"], "No such file"),
    "config that is a folder": (lambda m, t: ["train", t], "readable YAML"),
    "malformed config": (lambda m, t: ["train", file(t, "a: [1\nb: }")], "line"),
    "config that is no text": (lambda m, t: ["train", file(t, "\0")], "YAML"),
    "config that is a list": (lambda m, t: ["train", file(t, "- 1")], "key: value"),
    "config with a bad date": (lambda m, t: ["train", file(t, "seed: 2024-13-45")], "file.yaml"),
    "hook point out of range": (lambda m, t: harvest(m, t, hook_points="[resid_post.4]"), "0 to 3"),
    "hook point of no kind": (lambda m, t: harvest(m, t, hook_points="[mlp.1]"), "SITE.LAYER"),
    "hook point not harvested": (
        lambda m, t: ["train", *sets(store=m.store, out=t / "o", hook_points="[resid_post.2]")], HOOK,
    ),
    "arrow to nowhere": (lambda m, t: train(m, t / "o", hook_points="[resid_post.1->]"), "SITE.LAYER"),
    "two arrows": (lambda m, t: train(m, t / "o", hook_points="[a->b->c]"), "at most one arrow"),
    "crosscoder of one hook point": (
        lambda m, t: train(m, t / "o", "sae.architecture=crosscoder", hook_points=f"[{HOOK}]"), "several hook points",
    ),
    "autoencoder of two hook points": (
        lambda m, t: train(m, t / "o", hook_points=f"[{HOOK}+{OTHER}]"), "one hook point",
    ),
    "one hook point twice": (lambda m, t: train(m, t / "o", hook_points=f"[{HOOK}, {HOOK}]"), "each one once"),
    "no SAE to start from": (
        lambda m, t: train(m, t / "o", hook_points=f"[{HOOK}]", finetune=t / "no"), "nothing",
    ),
    "no SAE to convert": (lambda m, t: ["convert", t / "no", t / "new"], "nothing"),
    "unknown format": (lambda m, t: ["convert", m.sae, t / "new", "--to", "pickle"], "sparsify"),
    "evaluation on another model": (lambda m, t: belongs(m, t, "evaluate", model=m.other_model), "a store of"),
    "index of another model": (lambda m, t: belongs(m, t, "index", model=m.other_model), "a store of"),
    "vector of another model": (lambda m, t: belongs(m, t, "vector make", model=m.other_model, latent=1), "a store of"),
    "contrast on the store of another model": (
        lambda m, t: [*belongs(m, t, "vector make", model=m.other_model, kind="contrast"), *sets(*MEASURE)],
        "a store of",
    ),
    "calibration on another model": (
        lambda m, t: ["vector", "calibrate", *steered(m, t, model=m.other_model, n_prompts=2)], "one of other-model",
    ),
    "score on another model": (
        lambda m, t: ["vector", "score", *steered(m, t, model=m.other_model, **SCORE)], "one of other-model",
    ),
    "calibration of no vector": (lambda m, t: ["vector", "calibrate", *steered(m, t, vector="up")], "latent-5"),
    "score of no vector": (lambda m, t: ["vector", "score", *steered(m, t, vector="up")], "latent-5"),
    "calibration with another SAE": (
        lambda m, t: ["vector", "calibrate", *steered(m, t, sae=m.wide_sae)], "came from",
    ),
    "calibration without a library": (lambda m, t: ["vector", "calibrate", *sets(library=t / "no")], "a library"),
    "a dose of nothing": (lambda m, t: ["vector", "calibrate", *sets(doses="[0.0]")], "greater than 0"),
    "no such part of a score": (lambda m, t: ["vector", "score", *sets(parts="[charm]")], "capability"),
    "questions that are none": (
        lambda m, t: ["vector", "score", *steered(m, t, choices=text(t, '{"question": "a"}'))], "line 1",
    ),
    "prompts of one kind": (
        lambda m, t: ["vector", "score", *steered(m, t, refusal=text(t, '{"text": "a", "label": "harmful"}'))], "label",
    ),
    "a judge without an address": (
        lambda m, t: ["vector", "score", *steered(m, t, "judge.model=gpt", **SCORE)], "base_url",
    ),
    "a transfer to nowhere": (
        lambda m, t: ["vector", "score", *steered(m, t, transfer="jolly")], "joyful_vs_gloomy",
    ),
    "chat with a vector of another model": (
        lambda m, t: ["chat", "Hi", *sets(model=m.other_model, library=m.library)], "one of other-model",
    ),
    "store of other settings": (
        lambda m, t: harvest(m, t, out=m.store, ctx=16, commit_sequences=16, hook_points=f"[{HOOK}, {OTHER}]"),
        "ctx of the store",
    ),
    "SAE of another width to evaluate": (lambda m, t: belongs(m, t, "evaluate", sae=m.wide_sae), WIDTHS),
    "SAE of another width to index": (lambda m, t: belongs(m, t, "index", sae=m.wide_sae), WIDTHS),
    "SAE of another width for a vector": (lambda m, t: belongs(m, t, "vector make", sae=m.wide_sae, latent=1), WIDTHS),
    "more latents a token than latents": (
        lambda m, t: train(m, t / "o", "sae.d_sae=8", "sae.k=8", hook_points=f"[{HOOK}]"), "sae.k",
    ),
    "unknown architecture": (
        lambda m, t: train(m, t / "o", "sae.architecture=relu", hook_points=f"[{HOOK}]"), "topk",
    ),
    "too little disk": (
        lambda m, t: harvest(m, t, max_tokens=10**14, text=text(t, '{"text": "' + "on and on " * 40_000 + '"}')),
        "GB free",
    ),
    "empty text": (lambda m, t: harvest(m, t, text=text(t, '{"text": ""}')), "at least one document"),
    "no text": (lambda m, t: harvest(m, t, text=t / "no.jsonl"), "Check the path"),
    "text of no kind": (lambda m, t: harvest(m, t, text="novel.pdf"), ".jsonl"),
    "text that is no JSON": (lambda m, t: harvest(m, t, text=text(t, '{"text": "fine"}\nnot fine')), "line 2"),
    "nothing to say": (lambda m, t: ["chat", "", *sets(model=m.model, plain=True, max_new_tokens=2)], "prompt"),
    "too much to say": (lambda m, t: ["chat", "la " * 600, *sets(model=m.model)], "Shorten the prompt"),
    "corrupt shard": (
        lambda m, t: ["train", *sets(store=corrupt_store(m, t), hook_points=f"[{HOOK}]", out=t / "o")], "intact shards",
    ),
    "corrupt shard to index": (lambda m, t: belongs(m, t, "index", store=corrupt_store(m, t)), "intact shards"),
    "store that is none": (
        lambda m, t: ["train", *sets(store=damaged(m.store, t, "zarr.json", "{"), out=t / "o")], "store",
    ),
    "corrupt SAE": (
        lambda m, t: belongs(m, t, "evaluate", sae=damaged(m.sae, t, "sae_weights.safetensors", "x")), "safetensors",
    ),
    "SAEs of two widths": (lambda m, t: ["inspect", m.sae, m.wide_sae], "widths 32 and 32, got widths 40 and 40"),
    "nothing to compare with": (lambda m, t: ["inspect", m.sae, m.store], "an SAE, its index, or a run of one"),
    "no such kind of table": (lambda m, t: ["inspect", m.index, "--out", t / "index.db"], ".parquet, .jsonl, .csv"),
    "no index to write": (lambda m, t: ["inspect", m.sae, "--out", t / "a.csv"], "a feature index"),
    "corrupt index": (lambda m, t: ["inspect", damaged(m.index, t, "index.sqlite", "x" * 999)], "a feature index"),
    "corrupt library": (lambda m, t: ["inspect", damaged(m.library, t, "manifest.json", "{")], "an intact library"),
    "library changed by hand": (lambda m, t: ["inspect", resigned(m, t)], "an intact library"),
    "unknown vector": (lambda m, t: ["chat", "Hi", *sets(model=m.model, library=m.library, vectors="up")], "latent-5"),
    "unknown axis": (lambda m, t: ["vector", "compare", *sets(model=m.model, axes="[charm]", out=t)], "formality"),
    "unknown condition": (lambda m, t: ["vector", "compare", *sets(conditions="[magic]")], "few_shot"),
    "too few prompts": (
        lambda m, t: ["vector", "compare", *sets(model=m.model, out=t, prompts=9999)], "at least 10015",
    ),
    "unknown latent of the index": (lambda m, t: ["inspect", m.index, "--latent", 48], "0 to 47"),
    "unknown latent of the SAE": (lambda m, t: belongs(m, t, "vector make", latent=48), "0 to 47"),
    "one vector to stack": (
        lambda m, t: ["vector", "interference", *sets(model=m.model, library=m.library)], "two vectors or more",
    ),
    "no such vector to stack": (
        lambda m, t: ["vector", "interference", *sets("vectors=[up]", model=m.model, library=m.library)], "latent-5",
    ),
    "no latent": (lambda m, t: belongs(m, t, "vector make"), "latent=123"),
    "latents without one to add": (
        lambda m, t: belongs(m, t, "vector make", kind="latents", latents="{1: -1.0}"), "vector find",
    ),
    "unknown scope": (lambda m, t: belongs(m, t, "vector make", latent=1, scope="nowhere"), "nowhere"),
    "vector to combine that is not there": (
        lambda m, t: ["vector", "combine", *sets("vectors={a: 1.0}", library=m.library)], "latent-5",
    ),
    "nothing to find": (lambda m, t: ["vector", "find", *sets(model=m.model)], "something to run"),
    "no texts for a gate": (
        lambda m, t: ["vector", "gate", *sets(library=m.library, fires=t / "no", quiet=t / "no")], "readable",
    ),
    "layer that is not there": (lambda m, t: ["vector", "layers", *sets(model=m.model, layers="[9]")], "0 to 3"),
    "unknown contrast": (
        lambda m, t: belongs(m, t, "vector make", kind="contrast", contrast="jolly"), "joyful_vs_gloomy",
    ),
    "context that is not there": (
        lambda m, t: ["vector", "learn", *learn(m.model, t / "o", context=t / "no.txt")], "Check the path",
    ),
    "more prompts to learn from than there are": (
        lambda m, t: ["vector", "learn", *learn(m.model, t / "o", n_prompts=500)], "504 different ones",
    ),
    "vector learned at no layer": (
        lambda m, t: ["vector", "learn", *learn(m.model, t / "o", hook_points="[resid_post.4]")], "0 to 3",
    ),
    "out that is a file": (lambda m, t: harvest(m, t, out=m.text), "out"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_1(made: Made, saekit: Saekit, tmp_path: Path, name: str) -> None:
    arguments, says = MISTAKES[name]
    ran = saekit(*arguments(made, tmp_path), "--json")
    assert (ran.code, ran.out) == (1, "")
    lines = [line for line in ran.err.splitlines() if not line.startswith("  ")]  # progress and status are indented
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("saekit: ")
    assert ran.err.endswith(lines[0] + "\n")
    assert says in lines[0]
    assert ": expected " in lines[0]


def test_mistakes_leave_the_artefacts_alone(made: Made, saekit: Saekit) -> None:
    assert saekit("inspect", made.store, "--json").json["fingerprint"] == ActivationStore.open(made.store).fingerprint
    assert list(saekit("inspect", made.library, "--json").json["vectors"]) == ["latent-5"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--nope"],
        ["nope"],
        ["inspect"],
        ["inspect", "x", "--latent", "y"],
        ["inspect", "x", "--set", "seed=1"],
        ["inspect", "x", "y", "--latent", "1"],
    ],
)
def test_wrong_usage_exits_with_2(saekit: Saekit, arguments: list[str]) -> None:
    ran = saekit(*arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_what_is_not_ours_keeps_its_traceback(saekit: Saekit, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("steer.inspect.describe", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        saekit("inspect", "x")


def test_an_error_of_several_lines_is_printed_in_one(saekit: Saekit, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise SaekitError("here", expected="one", got="two\n  lines", fix="Do\nthis.")

    monkeypatch.setattr("steer.inspect.describe", broken)
    assert saekit("inspect", "x") == (1, "", "saekit: here: expected one, got two lines. Do this.\n")


def test_ctrl_c_outside_a_stage_is_one_line(saekit: Saekit, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("steer.inspect.describe", stopped)
    assert saekit("inspect", "x") == (1, "", "saekit: stopped.\n")


def test_ctrl_c_during_a_harvest_leaves_a_store_that_resumes(made: Made, saekit: Saekit, tmp_path: Path) -> None:
    rows = (json.dumps({"text": f"Text {i} says {'la ' * (i % 23)}and ends."}) for i in range(4000))
    settings = {"text": text(tmp_path, "\n".join(rows)), "ctx": 32, "commit_sequences": 4, "max_tokens": 100_000}
    arguments = harvest(made, tmp_path, **settings)
    command = [sys.executable, "-c", "from steer.cli import main; main()", *map(str, arguments), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and committed(tmp_path / "out") < 8:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if not line.startswith("  ")]
    assert (process.returncode, out, len(lines)) == (1, "", 1), err
    assert "Run the same command again" in lines[0]
    kept = ActivationStore.open(tmp_path / "out")
    assert not kept.is_complete
    assert kept.n_sequences >= 8
    budget = kept.state.tokens + 200
    again = saekit(*harvest(made, tmp_path, **settings | {"max_tokens": budget}), "--json").json
    assert again["n_sequences"] > kept.n_sequences
    assert again["new_tokens"] < 1000
    assert ActivationStore.open(tmp_path / "out").is_complete


def committed(path: Path) -> int:
    try:
        return ActivationStore.open(path).n_sequences
    except (OSError, ValueError):
        return 0
