"""From a text and an SAE to a feature index: what each latent responds to, and what it says and does.

Flow:
1. one pass over a store, or over a text that is run through the model (`sae.index_source`): counts, histograms,
   contexts, near misses and co-activations (`sae.index_pass`), with a checkpoint now and then (`sae.index_state`);
2. from the weights alone: logits, their entropy (`sae.index_weights`), nearest latents (`sae.cosines`), and a picture
   of all (`sae.index_map`);
3. in the running model: what amplifying a latent does to the next token, and what the text costs without it
   (`sae.index_effects`);
4. one transaction into the database (`sae.index_db`).

A run that was stopped anywhere goes on from its last checkpoint. A later run over another store or text, or over the
same one when it has grown, adds to what is there. Left out: labels.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.errors import ConfigError, TextError
from activations.models import LoadedModel, load_model
from activations.progress import progress
from activations.store import ActivationStore
from sae import coactivation
from sae.artefact import SaeArtefact
from sae.belongs import check_belongs, check_sae
from sae.config import IndexConfig
from sae.contexts import Context
from sae.cosines import mean_largest, nearest
from sae.evaluation.stability import load_others
from sae.histogram import trim
from sae.index_db import FILE_NAME, SCHEMA_VERSION, LatentRow, read_info, write_index
from sae.index_effects import LENS_TOKENS, measure_effects
from sae.index_map import layout
from sae.index_pass import PassSettings, Statistics
from sae.index_source import Source, seed_key, store_source, text_source
from sae.index_state import Cursor, Progress, SourceState, load_state, save_state
from sae.index_weights import logit_lens
from sae.priorities import LARGEST
from sae.reservoir import MAX_SOURCES, NO_TOKEN, split_key
from sae.torch_view import TorchSae
from sae.vocabulary import Vocabulary
from sae.wiring import Wiring

CHECKPOINT_S = 60.0
CONFIG_NAME = "index.yaml"
DIGITS = 4
Counter = Callable[[int, int, Cursor], Iterator[tuple[int, Cursor | None]]]
"""counts a source in from its number, the int64 that stands for it and a seed, and a cursor; tells of tokens as they
are counted, each time with the place behind them, or None where nothing can go on"""


def build_index(config: IndexConfig, loaded: LoadedModel | None = None) -> Path:
    """Build or extend the index of the SAE at `config.sae`, over `config.text` or the store; returns its directory.

    Raises: MismatchError if model, store and SAEs do not belong together, or if the index is of another SAE or was
      begun with other settings; TextError if there are no tokens.
    """
    artefact = SaeArtefact.load(config.sae)
    assert artefact.sha256 is not None
    loaded = loaded or load_model(config.model, device=config.device)
    sae, reads = TorchSae(artefact).to(loaded.device), Wiring.parse(artefact.hook_point).reads
    if config.ray is not None and config.text is not None:
        fix = "Harvest the text on Ray first, and index the store."
        raise ConfigError("ray with text", expected="a store, which workers read parts of", got=config.text, fix=fix)
    if config.text is None:
        store = ActivationStore.open(config.store)
        check_belongs(store, loaded, artefact)
        source = store_source(store, reads, artefact.d_sae, loaded.device)
    else:
        check_sae(artefact, loaded)
        source = text_source(config, reads, artefact.d_sae, loaded)
    seeds = [*load_others(config.compare_to, artefact).values()]
    state, statistics = load_state(config.out, artefact, pass_settings(config), loaded.device)
    state = _read_text(config, source, state, statistics, _counter(config, source, statistics, sae))
    info = _info(config, artefact, loaded, state, statistics)
    if not _is_written(config, info):
        vocabulary = Vocabulary.of_tokenizer(loaded.tokenizer)
        places = layout(artefact.W_dec, config.map, config.seed)
        words = _Words(loaded.tokenizer, vocabulary)
        rows = _rows(config, loaded, artefact, sae, statistics, words, seeds)
        write_index(config.out, info, rows, vocabulary, places)
        config.save(config.out / CONFIG_NAME)
    return config.out


def pass_settings(config: IndexConfig) -> PassSettings:
    """The part of a config that cannot be changed once the pass has begun."""
    return PassSettings(
        n_top=config.n_contexts,
        n_sampled=config.n_sampled,
        n_near=config.n_near_misses,
        before=config.window_before,
        after=config.window_after,
        coactivation_tokens=config.coactivation_tokens,
        seed=config.seed,
    )


def _counter(config: IndexConfig, source: Source, statistics: Statistics, sae: TorchSae) -> Counter:
    """What counts the blocks behind a cursor in: this process, or the workers of Ray."""
    if config.ray is not None:
        from sae.ray_index import count_on_ray

        return functools.partial(count_on_ray, config, statistics)

    def count(number: int, key: int, cursor: Cursor) -> Iterator[tuple[int, Cursor | None]]:
        for block, after in source.blocks(number, key, cursor):
            if len(block.x):
                statistics.add(sae, block)
            yield len(block.x), after

    return count


def _read_text(
    config: IndexConfig, source: Source, state: Progress, statistics: Statistics, counter: Counter
) -> Progress:
    """Count in what was not read yet, with a checkpoint every CHECKPOINT_S and at the end."""
    keys = [known.key for known in state.sources]
    number = keys.index(source.key) if source.key in keys else len(keys)
    if number == MAX_SOURCES:
        fix = "Use another out."
        raise ConfigError(str(config.out), expected=f"at most {MAX_SOURCES} texts", got=number + 1, fix=fix)
    begun = state.sources[number] if number < len(keys) else SourceState(name=source.name, key=source.key)
    saved, is_saved = time.monotonic(), True
    counted = counter(number, seed_key(source.key, config.seed), begun.cursor)
    with progress("index", max(source.expected_tokens - begun.cursor.tokens, 0), "tok") as advance:
        for n_tokens, cursor in counted:
            advance(n_tokens)
            is_saved = False
            if cursor is not None:
                state = state.with_source(number, begun.model_copy(update={"cursor": cursor}))
                if time.monotonic() - saved >= CHECKPOINT_S:
                    save_state(config.out, state, statistics)
                    saved, is_saved = time.monotonic(), True
    if not statistics.n_tokens:
        raise TextError(source.name, expected="some unmasked tokens", got=0, fix="Choose a text that is not empty.")
    if not is_saved:
        save_state(config.out, state, statistics)
    return state


def _info(
    config: IndexConfig, artefact: SaeArtefact, loaded: LoadedModel, state: Progress, statistics: Statistics
) -> dict[str, Any]:
    return {
        "d_sae": artefact.d_sae,
        "hook_point": artefact.hook_point,
        "sae_sha256": artefact.sha256,
        "model": loaded.ref.model_dump(mode="json"),
        "n_tokens": statistics.n_tokens,
        "map": config.map,
        "sources": [
            {"name": each.name, "key": each.key, "sequences": each.cursor.sequence, "tokens": each.cursor.tokens}
            for each in state.sources
        ],
    }


def _is_written(config: IndexConfig, info: dict[str, Any]) -> bool:
    """Whether the database holds this very index already."""
    if not (config.out / FILE_NAME).exists() or not (config.out / CONFIG_NAME).exists():
        return False
    whole = {**info, "schema_version": SCHEMA_VERSION}
    return IndexConfig.load(config.out / CONFIG_NAME) == config and whole.items() <= read_info(config.out).items()


def _rows(
    config: IndexConfig,
    loaded: LoadedModel,
    artefact: SaeArtefact,
    sae: TorchSae,
    found: Statistics,
    words: "_Words",
    seeds: Sequence[SaeArtefact],
) -> Iterator[LatentRow]:
    arrays = {name: value.cpu().numpy() for name, value in found.tensors().items()}
    lens = logit_lens(loaded, sae.W_dec, max(config.n_logits, LENS_TOKENS))
    cosines, others = nearest(sae.W_dec, sae.W_dec, min(config.n_neighbours, sae.d_sae - 1), same=True)
    neighbours = _listed(others, cosines)
    sample = coactivation.first(found.sample, config.coactivation_tokens)
    partners = _listed(*coactivation.partners(sample, artefact.d_sae, config.n_coactivations))
    stable = mean_largest(sae.W_dec, [torch.from_numpy(seed.W_dec).to(sae.W_dec) for seed in seeds])
    effects = measure_effects(config, loaded, sae, Wiring.parse(artefact.hook_point), lens, found)
    contexts = [_contexts(arrays, kind, config.window_before) for kind in ("top", "sampled", "near")]
    top_logits, bottom_logits = (
        words.listed(tokens[:, : config.n_logits], values[:, : config.n_logits])
        for tokens, values in ((lens.top, lens.top_values), (lens.bottom, lens.bottom_values))
    )
    active, total, peak = arrays["active"].tolist(), arrays["total"].tolist(), arrays["top.score"][:, 0].tolist()
    for i in range(artefact.d_sae):
        start, counts = trim(arrays["histogram"][i])
        top, sampled, near = (held(i) for held in contexts)
        yield LatentRow(
            latent=i,
            density=active[i] / found.n_tokens,
            max_activation=max(peak[i], 0.0),
            mean_activation=total[i] / max(active[i], 1),
            histogram=counts.tolist(),
            histogram_start=start,
            top_logits=top_logits(i),
            bottom_logits=bottom_logits(i),
            logit_entropy=round(float(lens.entropy[i]), DIGITS),
            neighbours=neighbours(i),
            coactivations=[pair for pair in partners(i) if pair[1] > 0],
            contexts=[
                context._replace(effect=float(effects.ablation[i, rank])) if rank < config.n_ablated else context
                for rank, context in enumerate(top)
            ],
            sampled=sampled,
            near_misses=near,
            output_score=_measured(effects.output_score[i]),
            confidence_change=_measured(effects.confidence_change[i]),
            stability=_measured(stable[i]),
        )


def _contexts(arrays: dict[str, np.ndarray], kind: str, before: int) -> Callable[[int], list[Context]]:
    """A function from a latent to what a reservoir holds of it."""
    score, priority, document, tokens, values = (
        arrays[f"{kind}.{name}"] for name in ("score", "priority", "document", "tokens", "values")
    )
    inside = tokens != NO_TOKEN  # of the text, which is one stretch of each window
    starts, lengths, peaks = inside.argmax(-1), inside.sum(-1), inside[..., :before].sum(-1)
    counts = (priority != LARGEST).sum(-1)

    def of(latent: int) -> list[Context]:
        held = slice(int(counts[latent]))
        wide = values[latent, held].astype(np.float32)
        columns = (part[latent, held].tolist() for part in (document, score, peaks, starts, lengths))
        return [
            Context(number, peak, tokens[latent, rank, i : i + n], wide[rank, i : i + n], source, score)
            for rank, (key, score, peak, i, n) in enumerate(zip(*columns, strict=True))
            for source, number in (split_key(key),)
        ]

    return of


def _listed(latents: Int[Tensor, "d_sae n"], *figures: Float[Tensor, "d_sae n"]) -> Callable[[int], list[Any]]:
    """A function from a latent to its list of other latents, each with its figures."""
    columns = [latents.tolist(), *(figure.double().round(decimals=DIGITS).tolist() for figure in figures)]
    return lambda i: list(zip(*(column[i] for column in columns), strict=True))


def _measured(value: Tensor) -> float | None:
    return None if value.isnan() else round(float(value), DIGITS)


class _Words:
    """Token texts, each decoded once; of a part of a character, its bytes."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary):
        @functools.cache
        def text(token: int) -> str:
            decoded = str(tokenizer.decode([token]))
            return vocabulary.texts([token])[0] if "\ufffd" in decoded else decoded

        self._text = text

    def listed(
        self, tokens: Int[Tensor, "d_sae n"], values: Float[Tensor, "d_sae n"]
    ) -> Callable[[int], list[tuple[str, float]]]:
        """A function from a latent to its tokens, each with its value."""
        ids, figures = tokens.tolist(), values.tolist()
        return lambda i: [
            (self._text(token), round(value, DIGITS)) for token, value in zip(ids[i], figures[i], strict=True)
        ]
