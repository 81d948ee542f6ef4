"""What a run of `saekit label` reads and asks, opened and checked before anything is spent.

Flow: 1. endpoints and their keys; 2. the index, and the latents that were chosen; 3. the model, and whether all belong
together; 4. the database, and the labels that no model has to be asked for; 5. contexts of random latents, read anew.
Left out: asking (`sae.label`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from activations.errors import ConfigError, UnknownNameError
from activations.models import LoadedModel, Status, load_model
from activations.progress import progress
from sae.artefact import SaeArtefact
from sae.belongs import check_index
from sae.contexts import Context
from sae.index_db import FeatureIndex, LatentRow
from sae.labels.amplifier import Amplifier
from sae.labels.chat import Chat
from sae.labels.config import LOCAL, ChatModelConfig, LabelConfig
from sae.labels.embedding import Embed, tfidf, unit
from sae.labels.endpoint import Endpoint
from sae.labels.examples import Pool, draw_pool, text_of
from sae.labels.ledger import Ledger, check_budget
from sae.labels.local import LocalChat
from sae.labels.plain import Names, namer, plain_labels
from sae.labels.reading import active_in, pooled
from sae.labels.store import LabelStore
from sae.torch_view import TorchSae
from sae.wiring import Wiring


@dataclass(frozen=True)
class Session:
    """All that a run reads and asks."""

    config: LabelConfig
    index: FeatureIndex
    loaded: LoadedModel
    explainer: Chat
    judge: Chat
    amplifier: Amplifier
    store: LabelStore
    ledger: Ledger
    pool: Pool
    embed: Embed
    chosen: list[int]
    names: Names

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids."""
        return str(self.loaded.tokenizer.decode(tokens))


@contextmanager
def open_session(
    config: LabelConfig, loaded: LoadedModel | None, on_status: Status | None, write: bool
) -> Iterator[Session]:
    """Open and check everything; if `write`, with labels of all latents that no model has to be asked for."""
    chats = [config.explainer, config.judge or config.explainer]
    check_budget(config.budget, [(each.price_in, each.price_out) for each in chats if each.base_url])
    endpoints = [_endpoint(each) for each in chats]
    artefact = SaeArtefact.load(config.sae)
    assert artefact.sha256 is not None
    with ExitStack() as stack:
        index = FeatureIndex.open(config.index)
        stack.callback(index.close)
        chosen = _choose(config, index)
        model = loaded or load_model(config.model, device=config.device, on_status=on_status)
        check_index(index, model, artefact)
        explainer = endpoints[0] or _local(chats[0], config, model, on_status)
        judge = explainer if chats[1] == chats[0] else endpoints[1] or _local(chats[1], config, model, on_status)
        store = stack.enter_context(LabelStore.open(config.index, artefact.sha256, write=write))
        if write:
            _label_plainly(index, store, model)
        sae, wiring = TorchSae(artefact).to(model.device), Wiring.parse(artefact.hook_point)
        contexts = draw_pool(index, config.scoring.pool, config.seed) if chosen else []
        pool = Pool(contexts, active_in(model, sae, wiring, contexts))
        yield Session(
            config=config,
            index=index,
            loaded=model,
            explainer=explainer,
            judge=judge,
            amplifier=Amplifier(model, sae, wiring, artefact.sha256, config.scoring, config.seed),
            store=store,
            ledger=Ledger(store, config.budget, (explainer, judge)),
            pool=pool,
            embed=_embedding(config, model, contexts),
            chosen=chosen,
            names=namer(model.tokenizer),
        )


def _endpoint(config: ChatModelConfig) -> Endpoint | None:
    """The endpoint of a model; none if it runs here."""
    is_local = config.model.startswith(LOCAL)
    if is_local and config.base_url is not None:
        fix = "Leave one of them out."
        raise ConfigError("base_url", expected=f"none for a model that begins with {LOCAL}", got="an address", fix=fix)
    return None if is_local else Endpoint(config)


def _local(chat: ChatModelConfig, config: LabelConfig, loaded: LoadedModel, on_status: Status | None) -> LocalChat:
    spec = chat.model.removeprefix(LOCAL)
    same = spec == loaded.spec
    return LocalChat(chat, loaded if same else load_model(spec, device=config.device, on_status=on_status))


def _label_plainly(index: FeatureIndex, store: LabelStore, loaded: LoadedModel) -> None:
    with progress("labels without an LLM", index.info["d_sae"], "latents") as advance:
        store.add_labels(plain_labels(_counted(index.each(), advance), namer(loaded.tokenizer)))


def _counted(rows: Iterator[LatentRow], advance: Callable[[int], None]) -> Iterator[LatentRow]:
    for row in rows:
        yield row
        advance(1)


def _choose(config: LabelConfig, index: FeatureIndex) -> list[int]:
    """The latents to explain: those of the config, or the first of a random order."""
    if config.latents is not None:
        n = index.info["d_sae"]
        unknown = [latent for latent in config.latents if latent >= n]
        if unknown:
            fix = "Choose latents of this SAE."
            raise UnknownNameError("latents", expected=f"numbers from 0 to {n - 1}", got=unknown[0], fix=fix)
        return list(dict.fromkeys(config.latents))
    least = max(config.min_density, float(np.finfo(float).tiny))
    live = index.latents(min_density=least, max_density=config.max_density)
    return np.random.default_rng(config.seed).permutation(live).tolist()[: config.n_latents]


def _embedding(config: LabelConfig, loaded: LoadedModel, contexts: Sequence[Context]) -> Embed:
    texts = [text_of(lambda ids: str(loaded.tokenizer.decode(ids)), context.tokens) for context in contexts]
    if config.scoring.embedding == "tfidf" or not texts:
        return tfidf(texts or [""])
    centre = pooled(loaded, texts).mean(0)
    return lambda texts: unit(pooled(loaded, texts) - centre)
