"""A browser on a port of its own, and Chromium to look at it."""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from activations.models import LoadedModel
from activations.store_schema import ModelRef
from sae.artefact import SaeArtefact
from sae.contexts import Context
from sae.index_db import LatentRow, write_index
from sae.labels.store import LabelStore, NewLabel
from sae.labels.tables import Score
from sae.vocabulary import Vocabulary
from steer.browser.app import create_app
from steer.browser.guard import Account
from steer.browser.model import SharedModel
from steer.browser.people import single
from steer.browser.sources import Opened, open_paths
from steer.listening import LOOPBACK, listen

expect.set_options(timeout=20_000)  # milliseconds: processors that others use are slow
TOKEN = "t" * 32
N_LATENTS = 300
D_SAE = 24
DENSITY = [0.5 if i % 6 == 0 else 0.001 * (i + 1) for i in range(D_SAE)]
"""of the latents of an SAE that can be run"""
OFFLINE = "ERR_INTERNET_DISCONNECTED"
"""what a test means that takes the page's network away"""
TEXTS = (b" river", b" cat", b"<script>", b" 12", b"\n", b"&amp;", b" mill", b" dog", b"\xe2\x80\xae", b"\x1b[31m",
         "\u05e9\u05dc".encode(), b"\xc3", b"\xa9", b"<img src=x onerror=alert(1)>", b"\x00", b" of")  # fmt: skip
"""of tokens, hostile ones among them"""
VOCABULARY = Vocabulary.of(TEXTS[i % len(TEXTS)] for i in range(200))
HOSTILE = "</script><img src=x onerror=alert(1)>\u202e&lt;"
WORDS = (" river", " cat", "<script>", " 12", "\n", "&amp;", " mill", " dog")
SCREENSHOTS = Path(".pytest_cache") / "screenshots"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


def latent_row(latent: int, rng: np.random.Generator) -> LatentRow:
    """A made-up latent; every tenth is dead."""
    if latent % 10 == 9:
        return LatentRow(latent, 0.0, 0.0, 0.0, [], [(" none", 0.0)], [(" none", 0.0)], [(0, 0.1)], [])
    strongest = float(rng.uniform(1, 20))

    def context(document: int) -> Context:
        values = np.where(rng.random(12) < 0.3, rng.uniform(0, strongest, 12), 0).astype(np.float32)
        values[6] = strongest * float(rng.uniform(0.3, 1))
        return Context(document, 6, rng.integers(3, 200, 12), values, 0, float(values[6]))

    contexts = sorted((context(i) for i in range(8)), key=lambda each: -each.score)
    return LatentRow(
        latent, float(10 ** rng.uniform(-5, -1)), strongest, strongest / 3, [int(n) for n in rng.integers(1, 90, 20)],
        [(WORDS[int(i)], float(2 - k / 4)) for k, i in enumerate(rng.integers(0, len(WORDS), 5))],
        [(WORDS[int(i)], float(k / 4 - 2)) for k, i in enumerate(rng.integers(0, len(WORDS), 5))],
        [((latent + k) % N_LATENTS, 0.9 - k / 10) for k in range(1, 4)],
        contexts, contexts[::-1], [context(100)], 60, float(rng.uniform(0, 10)),
        [((latent + k) % N_LATENTS, 0.5 / k, 3.0 / k) for k in range(1, 4)], float(rng.random()), float(rng.normal()),
        None if latent % 4 else latent / N_LATENTS,
    )  # fmt: skip


@pytest.fixture(scope="session")
def index_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index of made-up latents. Do not write into it; `own_index` may be."""
    folder = tmp_path_factory.mktemp("run") / "index"
    rng = np.random.default_rng(0)
    model = ModelRef(id="tiny", fingerprint="0" * 64, n_layers=4, d_model=32).model_dump(mode="json")
    info = {"d_sae": N_LATENTS, "hook_point": "resid_post.1", "sae_sha256": "0" * 64, "model": model,
            "n_tokens": 100_000, "map": "pca", "sources": []}  # fmt: skip
    rows = [latent_row(i, rng) for i in range(N_LATENTS)]
    write_index(folder, info, rows, VOCABULARY, rng.uniform(-1, 1, (N_LATENTS, 2)).astype(np.float32))
    with LabelStore.open(folder, "0" * 64, write=True) as store:
        store.add_labels(NewLabel(i, "tokens", f"tokens river, {i}", "saekit") for i in range(0, N_LATENTS, 2))
        for latent in range(0, N_LATENTS, 5):
            text = HOSTILE if latent == 10 else f"rivers and mills, number {latent}"
            label = store.add_label(NewLabel(latent, "explanation", text, "some-model"))
            store.add_scores(label, latent, scores_of(latent))
    return folder


def scores_of(latent: int) -> list[Score]:
    """Made-up scores, better for larger numbers."""
    value = 0.5 + latent / N_LATENTS / 2
    own = [Score(method, "explanation", "balanced_accuracy", value, value - 0.1, min(value + 0.1, 1.0), 20, latent % 3,
                 "judge") for method in ("detection", "fuzzing")]  # fmt: skip
    beside = [Score("detection", control, "balanced_accuracy", 0.5, None, None, 20, 0, "judge")
              for control in ("shuffled", "tokens")]  # fmt: skip
    return [*own, *beside, Score("intruder", "contexts", "accuracy", 0.6, 0.4, 0.8, 20, 0, "tf-idf")]


def write_run(folder: Path, loaded: LoadedModel) -> Path:
    """A folder with an SAE of a model at resid_post.1 and an index that says it is of it."""
    rng = np.random.default_rng(0)
    W_dec = rng.standard_normal((D_SAE, loaded.d_model)).astype(np.float32)
    zeros = {"b_enc": np.full(D_SAE, -0.5, np.float32), "b_dec": np.zeros(loaded.d_model, np.float32)}
    SaeArtefact("standard", W_dec.T.copy(), W_dec=W_dec, metadata={"hook_point": "resid_post.1"}, **zeros).save(
        folder / "sae"
    )
    sha = SaeArtefact.load(folder / "sae").sha256
    info = {"d_sae": D_SAE, "hook_point": "resid_post.1", "sae_sha256": sha, "n_tokens": 1000, "sources": [],
            "model": loaded.ref.model_dump(mode="json")}  # fmt: skip
    rows = [
        LatentRow(i, DENSITY[i], 3.0, 1.0 + i, [4], [(f" word{i}", 1.0)], [(" b", -1.0)], [], []) for i in range(D_SAE)
    ]
    write_index(folder / "index", info, rows, Vocabulary.of_tokenizer(loaded.tokenizer))
    (folder / "index" / "index.yaml").write_text(f"sae: {folder / 'sae'}\n")
    return folder


@pytest.fixture
def own_index(index_path: Path, tmp_path: Path) -> Path:
    """A copy that a test may write into."""
    return Path(shutil.copytree(index_path, tmp_path / "index"))


Serve = Callable[[Any], contextlib.AbstractContextManager[str]]


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Answer on a free port; gives the address without a path."""
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def opened(own_index: Path) -> Iterator[Opened]:
    """That copy, opened."""
    with contextlib.closing(open_paths([own_index])) as found:
        yield found


@pytest.fixture
def address(opened: Opened) -> Iterator[str]:
    """Where a browser over that copy answers."""
    with serving(create_app(opened, single(Account("ada", "admin"), TOKEN), LOOPBACK, SharedModel(None))) as where:
        yield where


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Chromium without a window: the one in SAEKIT_CHROMIUM, or the machine's own.

    Not for longer than a module: Playwright keeps an event loop running in this thread, in which other tests start
    theirs.
    """
    program = os.environ.get("SAEKIT_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        pytest.fail("these tests need Chromium: apt-get install chromium, or set SAEKIT_CHROMIUM to a program")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = yield
    setattr(item, f"report_{report.when}", report)
    return report


@pytest.fixture
def page(chromium: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page that is logged in. Errors on it, and anything that its policy forbids, fail the test; a failed test leaves
    a picture in .pytest_cache/screenshots.
    """
    context = chromium.new_context(base_url=address, viewport={"width": 1280, "height": 800})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: (
            problems.append(message.text) if message.type == "error" and OFFLINE not in message.text else None
        ),
    )
    page.goto(f"/#token={TOKEN}")
    page.locator(".who").wait_for()
    yield page
    if getattr(request.node, "report_call", None) is None or request.node.report_call.failed:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{request.node.name}.png")
    context.close()
    assert problems == []
