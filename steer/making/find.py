"""From a text to latents: which of an SAE's latents a text makes active, beyond what they are anyway.

Flow of `find_latents`:
1. the text runs through model and SAE; its first token, special tokens and, in a chat, all that is not the user's turn
   are left out;
2. what is usual for a latent, its density and its mean activation where it is active, is looked up in a feature index,
   or else counted on an activation store;
3. latents active on too few tokens of the text, or on too large a share of any text, are left out, and the others are
   ranked by

       score = peak activation / usual activation * -ln(density)

   which is high for what is strong here and rare elsewhere. Where nothing is known of what is usual, by the peak.

The weights for `saekit vector make`, kind `latents`, are peak activations: the vector is what these latents write where
they are strongest. Left out: whether they do something when they are added, which the receipt says.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.chat import chat_prompt
from activations.errors import ConfigError, TextError
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.belongs import check_index, check_sae, check_store
from sae.index_db import FeatureIndex
from sae.torch_view import TorchSae
from steer.latents import places_of
from steer.making.config import FindConfig

SHOWN_TOKENS = 3


class Usual(NamedTuple):
    """What a latent is like on any text."""

    density: float
    """share of tokens on which it is active"""
    activation: float
    """mean over those"""


class Read(NamedTuple):
    """A text in an SAE."""

    tokens: list[str]
    latents: Float[Tensor, "token d_sae"]


class Placed(NamedTuple):
    """A text at a hook point."""

    ids: list[int]
    counts: Bool[Tensor, " token"]
    """which of them count"""
    x: Float[Tensor, "counting d_model"]
    """activations at those"""


class Found(NamedTuple):
    """A latent of a text."""

    latent: int
    score: float
    peak: float
    """largest activation, in units of the residual stream along its decoder row if that is a unit"""
    n_tokens: int
    """tokens of the text on which it is active"""
    usual: Usual | None
    on: list[tuple[str, float]]
    """the tokens on which it is strongest"""
    label: str | None


def find_latents(config: FindConfig, loaded: LoadedModel | None = None) -> list[Found]:
    """The latents of the config's text, best first.

    Raises: ConfigError without a text; TextError if none of its tokens count; MismatchError for an SAE, index or store
      of another model.
    """
    if not config.text.strip():
        raise ConfigError("text", expected="something to run", got="none", fix='Write saekit vector find "A TEXT".')
    loaded = loaded or load_model(config.model, device=config.device)
    artefact = SaeArtefact.load(config.sae)
    check_sae(artefact, loaded)
    index = None if config.index is None else FeatureIndex.open(config.index)
    if index is not None:
        check_index(index, loaded, artefact)
    read = read_text(loaded, artefact, config.text, config.chat)
    active = (read.latents > 0).sum(0)
    candidates = torch.nonzero(active >= config.min_tokens)[:, 0].tolist()
    usual = _usual(config, loaded, artefact, index, candidates)
    found = [
        _found(read, latent, usual.get(latent))
        for latent in candidates
        if latent not in usual or usual[latent].density <= config.max_density
    ]
    found = sorted(found, key=lambda each: (-each.score, each.latent))[: config.n]
    return found if index is None else [each._replace(label=label_of(index, each.latent, loaded)) for each in found]


def read_text(loaded: LoadedModel, artefact: SaeArtefact, text: str, chat: bool = False) -> Read:
    """Latents on the tokens of a text that count."""
    placed = place_text(loaded, places_of(artefact).reads, text, chat)
    ids = [token for token, counts in zip(placed.ids, placed.counts.tolist(), strict=True) if counts]
    return Read([str(loaded.tokenizer.decode([token])) for token in ids], TorchSae(artefact).encode(placed.x))


def place_text(loaded: LoadedModel, point: HookPoint, text: str, chat: bool = False, most: int | None = None) -> Placed:
    """A text at a hook point.

    Args:
      most: tokens that it may have.
    Raises: TextError if it has more, or none that count.
    """
    prompt, span = text, (0, len(text))
    if chat:
        prompt = chat_prompt(loaded, text)
        start = prompt.rfind(text.strip())
        if start < 0:
            got, fix = "one that changes it", "Leave chat out."
            raise TextError("chat template", expected="one that keeps the text", got=got, fix=fix)
        span = (start, start + len(text.strip()))
    encoded = loaded.tokenizer(prompt, add_special_tokens=not chat, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    if most is not None and len(ids) > most:
        raise TextError("text", expected=f"at most {most} tokens", got=len(ids), fix="Take a part of it.")
    counts = torch.tensor(_counts(loaded, ids, encoded["offset_mapping"], span), dtype=torch.bool)
    if not bool(counts.any()):
        fix = "Write more: the first token of a text does not count."
        raise TextError("text", expected="a token beyond the first", got="none", fix=fix)
    with capture(loaded.model, loaded.family, [point], stop_after_last=True) as captured:
        run_until(loaded.model, {"input_ids": torch.tensor([ids], device=loaded.device)})
    return Placed(ids, counts, captured[point][0].float().cpu()[counts])


def _counts(
    loaded: LoadedModel, ids: Sequence[int], offsets: Sequence[tuple[int, int]], span: tuple[int, int]
) -> list[bool]:
    special = set(loaded.tokenizer.all_special_ids)
    return [
        i > 0 and token not in special and low < span[1] and high > span[0]
        for i, (token, (low, high)) in enumerate(zip(ids, offsets, strict=True))
    ]


def _found(read: Read, latent: int, usual: Usual | None) -> Found:
    values = read.latents[:, latent]
    order = values.argsort(descending=True, stable=True).tolist()
    on = [(read.tokens[i], float(values[i])) for i in order[:SHOWN_TOKENS] if values[i] > 0]
    peak = float(values.max())
    score = peak if usual is None else peak / max(usual.activation, 1e-12) * -math.log(max(usual.density, 1e-12))
    return Found(latent, score, peak, int((values > 0).sum()), usual, on, None)


def _usual(
    config: FindConfig,
    loaded: LoadedModel,
    artefact: SaeArtefact,
    index: FeatureIndex | None,
    latents: Sequence[int],
) -> Mapping[int, Usual]:
    """By latent; nothing if there is neither an index nor a store."""
    if index is not None:
        rows = map(index.latent, latents)
        n = index.info.get("n_tokens") or math.inf
        return _filled({row.latent: Usual(max(row.density, 1 / n), row.mean_activation) for row in rows})
    if config.store is None:
        return {}
    store = ActivationStore.open(config.store)
    check_store(store, loaded)
    return usual_in(store, artefact, latents, config.store_tokens)


def usual_in(
    store: ActivationStore, artefact: SaeArtefact, latents: Sequence[int], n_tokens: int
) -> Mapping[int, Usual]:
    """What is usual for some latents on the first tokens of a store; one that is never active counts as once."""
    sae, picks, point = TorchSae(artefact), torch.tensor(latents, dtype=torch.long), str(places_of(artefact).reads)
    fired, total = torch.zeros(len(latents)), torch.zeros(len(latents))
    seen, start, step = 0, 0, store.piece_sequences
    while seen < n_tokens and start < store.n_sequences:
        mask = torch.from_numpy(store.mask(start, start + step))
        values = sae.encode_some(_rows(store, point, start, start + step, mask), picks)
        fired, total = fired + (values > 0).sum(0), total + values.sum(0)
        seen, start = seen + len(values), start + step
    activation = total / fired.clamp(min=1)
    found = zip(latents, fired.tolist(), activation.tolist(), strict=True)
    return _filled({latent: Usual(max(n, 1.0) / max(seen, 1), usual) for latent, n, usual in found})


def _filled(usual: dict[int, Usual]) -> dict[int, Usual]:
    """Latents that were never active count as strong as the others are on average."""
    known = [each.activation for each in usual.values() if each.activation > 0]
    typical = sum(known) / len(known) if known else 1.0
    return {latent: each if each.activation > 0 else Usual(each.density, typical) for latent, each in usual.items()}


def _rows(
    store: ActivationStore, point: str, start: int, stop: int, mask: Bool[Tensor, "seq ctx"]
) -> Float[Tensor, "token d_model"]:
    return torch.from_numpy(store.activations(point, start, stop))[mask]


def label_of(index: FeatureIndex, latent: int, loaded: LoadedModel) -> str:
    """What a latent was explained as, or else labelled as, or else the tokens that it is strongest on."""
    labels = sorted(index.labels(latent), key=lambda label: label.kind != "explanation")
    if labels:
        return labels[0].text
    peaks = Counter(int(context.tokens[context.peak]) for context in index.latent(latent).contexts)
    return "on " + ", ".join(repr(loaded.tokenizer.decode([token])) for token, _ in peaks.most_common(SHOWN_TOKENS))


def as_result(config: FindConfig, found: Sequence[Found]) -> dict[str, Any]:
    """What the command shows: a row a latent, and what `saekit vector make` takes."""
    rows = {
        str(each.latent): {
            "score": each.score,
            "peak": each.peak,
            "usual": None if each.usual is None else each.usual.activation,
            "density": None if each.usual is None else each.usual.density,
            "tokens": each.n_tokens,
            "strongest on": ", ".join(f"{token!r} {value:.3g}" for token, value in each.on),
            "label": each.label or "",
        }
        for each in found
    }
    weights = {str(each.latent): round(each.peak, 4) for each in found}
    return {"text": config.text, "latents": rows, "make": {"kind": "latents", "latents": weights}}


def command_of(found: Sequence[Found]) -> str:
    """The command that makes a vector of these latents."""
    weights = ", ".join(f"{each.latent}: {each.peak:.4g}" for each in found)
    return f"saekit vector make --set kind=latents --set latents='{{{weights}}}'"
