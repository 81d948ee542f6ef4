"""From a store and an SAE to a feature index: what each latent responds to and what it says.

Flow:
1. first pass over the store: per latent the density, mean and strongest activation, and the sequences in which it is
   strongest, one a document;
2. second pass: the windows of tokens around those places with the activations inside them, and the histogram, whose
   range is known only now;
3. from the weights alone: the logits that each decoder row raises and lowers through the final norm and the
   unembedding, and its nearest decoder rows by cosine (exact);
4. one transaction into the database.

Left out: labels, scores, co-activation.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.errors import MismatchError
from activations.models import LoadedModel, load_model
from activations.progress import progress
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.config import IndexConfig
from sae.contexts import Context
from sae.data import used_tokens
from sae.index_db import LatentRow, write_index
from sae.torch_view import TorchSae
from sae.wiring import Wiring, side_by_side

BLOCK_TOKENS = 4096
SPARE = 3


class Block(NamedTuple):
    """A slice of the store, encoded."""

    start: int
    """first sequence"""
    tokens: Int[np.ndarray, "seq ctx"]
    """token ids"""
    lengths: Int[np.ndarray, " seq"]
    """tokens up to the last unmasked one; padding is behind it"""
    documents: Int[np.ndarray, " seq"]
    """document of each sequence"""
    latents: Float[Tensor, "seq ctx d_sae"]
    """activations of every latent; zero on masked tokens"""


class Usage(NamedTuple):
    """What the first pass found, by latent."""

    active: Int[Tensor, " d_sae"]
    """tokens on which it is active"""
    total: Float[Tensor, " d_sae"]
    """sum of its activations"""
    peak: Float[Tensor, "top d_sae"]
    """its strongest activations in distinct sequences, descending"""
    sequence: Int[Tensor, "top d_sae"]
    """the sequences of those"""


def build_index(config: IndexConfig, loaded: LoadedModel | None = None) -> Path:
    """Build the index of the SAE at `config.sae` over the store at `config.store`; returns the index directory.

    Raises: MismatchError if model, store and SAE do not belong together.
    """
    store, artefact = ActivationStore.open(config.store), SaeArtefact.load(config.sae)
    loaded = loaded or load_model(config.model, device=config.device)
    check_belongs(store, loaded, artefact)
    reads = Wiring.parse(artefact.hook_point).reads
    sae = TorchSae(artefact).to(loaded.device)
    n_tokens = sum(int(store.mask(kept.start, kept.stop).sum()) for kept in store.kept())
    with progress("index", 2 * n_tokens, "tok") as advance:
        usage = _usage(_blocks(store, reads, sae), config.n_contexts * SPARE, advance)
        places = _places(usage, store.documents(), config.n_contexts)
        histogram, contexts = _second_pass(_blocks(store, reads, sae), usage.peak[0], places, config, advance)
    top, bottom = _logits(artefact, loaded, config.n_logits)
    neighbours = _neighbours(torch.from_numpy(artefact.W_dec), config.n_neighbours)
    info = {
        "d_sae": artefact.d_sae,
        "hook_point": artefact.hook_point,
        "sae_sha256": artefact.sha256,
        "store_fingerprint": store.fingerprint,
        "model": store.meta.model.model_dump(mode="json"),
        "n_tokens": n_tokens,
    }
    active, total, peak = usage.active.tolist(), usage.total.tolist(), usage.peak[0].tolist()
    rows = (
        LatentRow(
            latent=i,
            density=active[i] / max(n_tokens, 1),
            max_activation=max(peak[i], 0.0),
            mean_activation=total[i] / max(active[i], 1),
            histogram=histogram[i].tolist(),
            top_logits=top[i],
            bottom_logits=bottom[i],
            neighbours=neighbours[i],
            contexts=contexts[i],
        )
        for i in range(artefact.d_sae)
    )
    write_index(config.out, info, rows)
    config.save(config.out / "index.yaml")
    return config.out


def check_store(store: ActivationStore, loaded: LoadedModel) -> None:
    """Raise MismatchError unless the store was harvested from this model with this tokenizer."""
    if store.meta.model.fingerprint != loaded.fingerprint:
        expected, got = f"a store of {loaded.id}", f"one of {store.meta.model.id}"
    elif store.meta.tokenizer_fingerprint != loaded.tokenizer_fingerprint:
        expected, got = f"a store made with the tokenizer of {loaded.id}", "one made with another tokenizer"
    else:
        return
    raise MismatchError(store.path, expected=expected, got=got, fix="Name the model that the store was harvested from.")


def check_belongs(store: ActivationStore, loaded: LoadedModel, artefact: SaeArtefact) -> None:
    """Raise MismatchError unless store and SAE were made from this model, and the SAE fits the store."""
    check_store(store, loaded)
    model = artefact.metadata.get("model", {})
    if model.get("fingerprint", loaded.fingerprint) != loaded.fingerprint:
        raise MismatchError(
            "SAE",
            expected=f"one trained on {loaded.id}",
            got=f"one trained on {model.get('id')}",
            fix="Choose another.",
        )
    wiring = Wiring.parse(artefact.hook_point)
    expected = len(wiring.reads) * store.d_model, len(wiring.writes) * store.d_model
    if (artefact.d_model, artefact.d_out) != expected:
        raise MismatchError(
            "SAE",
            expected=f"one that reads and writes widths {expected}",
            got=(artefact.d_model, artefact.d_out),
            fix="Choose an SAE of this model.",
        )


def _blocks(store: ActivationStore, reads: tuple[str, ...], sae: TorchSae) -> Iterator[Block]:
    rows = max(1, BLOCK_TOKENS // store.ctx)
    for start, stop in (
        (i, min(i + rows, kept.stop)) for kept in store.kept() for i in range(kept.start, kept.stop, rows)
    ):
        mask = store.mask(start, stop)
        x = side_by_side({name: used_tokens(store, name, start, stop) for name in reads}, reads)
        latents = torch.zeros(*mask.shape, sae.d_sae)
        with torch.inference_mode():
            latents[torch.from_numpy(mask)] = sae.encode(torch.from_numpy(x).to(sae.W_enc.device)).cpu()
        lengths = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
        yield Block(start, store.tokens(start, stop), lengths, store.documents(start, stop), latents)


def _usage(blocks: Iterator[Block], top: int, advance) -> Usage:
    usage = None
    for block in blocks:
        flat = block.latents.flatten(0, 1)
        peaks = block.latents.amax(dim=1)
        order = torch.arange(block.start, block.start + len(peaks))[:, None].expand_as(peaks)
        active, total = (flat > 0).sum(0), flat.sum(0, dtype=torch.float64)
        if usage is not None:
            active, total = active + usage.active, total + usage.total
            peaks, order = torch.cat([usage.peak, peaks]), torch.cat([usage.sequence, order])
        peak, rank = peaks.topk(min(top, len(peaks)), dim=0)
        usage = Usage(active, total, peak, order.gather(0, rank))
        advance(int((flat > 0).any(1).sum()))
    assert usage is not None
    return usage


def _places(usage: Usage, documents: Int[np.ndarray, " seq"], n: int) -> dict[int, list[tuple[int, int]]]:
    """By sequence, the latents to show there with their rank; at most one sequence a document and latent."""
    places: dict[int, list[tuple[int, int]]] = {}
    for latent in torch.nonzero(usage.active).flatten().tolist():
        seen: set[int] = set()
        for peak, sequence in zip(usage.peak[:, latent].tolist(), usage.sequence[:, latent].tolist(), strict=True):
            document = int(documents[sequence])
            if peak <= 0 or len(seen) == n:
                break
            if document not in seen:
                places.setdefault(sequence, []).append((latent, len(seen)))
                seen.add(document)
    return places


def _second_pass(
    blocks: Iterator[Block],
    peak: Float[Tensor, " d_sae"],
    places: dict[int, list[tuple[int, int]]],
    config: IndexConfig,
    advance,
) -> tuple[Int[np.ndarray, "d_sae bins"], list[list[Context]]]:
    d_sae, bins = len(peak), config.histogram_bins
    counts = torch.zeros(d_sae * bins, dtype=torch.int64)
    ranked: list[dict[int, Context]] = [{} for _ in range(d_sae)]
    for block in blocks:
        flat = block.latents.flatten(0, 1)
        token, latent = torch.nonzero(flat, as_tuple=True)
        bin_ = (flat[token, latent] / peak[latent] * bins).long().clamp(0, bins - 1)
        counts += torch.bincount(latent * bins + bin_, minlength=d_sae * bins)
        for row in range(len(block.tokens)):
            for i, rank in places.get(block.start + row, ()):
                ranked[i][rank] = _window(block, row, i, config.window_before, config.window_after)
        advance(len(token.unique()))
    contexts = [[by_rank[rank] for rank in sorted(by_rank)] for by_rank in ranked]
    return counts.view(d_sae, bins).numpy(), contexts


def _window(block: Block, row: int, latent: int, before: int, after: int) -> Context:
    values = block.latents[row, :, latent].numpy()
    peak = int(values.argmax())
    start, stop = max(0, peak - before), min(int(block.lengths[row]), peak + after + 1)
    return Context(int(block.documents[row]), peak - start, block.tokens[row, start:stop], values[start:stop])


def _logits(
    artefact: SaeArtefact, loaded: LoadedModel, n: int
) -> tuple[list[list[tuple[str, float]]], list[list[tuple[str, float]]]]:
    """Tokens whose logits each decoder row raises and lowers most through the final norm and the unembedding.

    Of a row that writes several hook points, the part for the last one counts.

    The norm is applied to the row itself, less what it makes of nothing (a bias), so that gain and centring of any
    kind of norm count; its data-dependent scale is left out, since it stretches all logits of a token alike.
    """
    unembedding = loaded.family.lm_head(loaded.model).weight.detach().float().cpu()  # type: ignore[union-attr]
    pushes = _through_norm(loaded, torch.from_numpy(artefact.W_dec[:, -loaded.d_model :]))
    vocabulary = [loaded.tokenizer.decode([i]) for i in range(len(unembedding))]
    top, bottom = [], []
    with torch.inference_mode():
        for rows in pushes.split(256):
            logits = rows @ unembedding.T
            logits -= logits.mean(dim=1, keepdim=True)
            for sign, out in ((1, top), (-1, bottom)):
                values, tokens = (sign * logits).topk(n, dim=1)
                out += [
                    [(vocabulary[t], round(sign * v, 4)) for t, v in zip(ts, vs, strict=True)]
                    for ts, vs in zip(tokens.tolist(), values.tolist(), strict=True)
                ]
    return top, bottom


def _through_norm(loaded: LoadedModel, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """What the final norm makes of directions, at the scale of the directions."""
    norm = loaded.family.final_norm(loaded.model)
    large = (1e3 * rows).to(device=loaded.device, dtype=loaded.dtype)  # far above the norm's epsilon
    with torch.inference_mode():
        pushes = (norm(large) - norm(torch.zeros_like(large[:1]))).float().cpu()
    return pushes * rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5


def _neighbours(W_dec: Float[Tensor, "d_sae d_model"], n: int) -> list[list[tuple[int, float]]]:
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    out = []
    for start, rows in zip(range(0, len(unit), 1024), unit.split(1024), strict=True):
        cosines = rows @ unit.T
        cosines[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = -2
        values, latents = cosines.topk(min(n, len(unit) - 1), dim=1)
        out += [
            [(j, round(v, 4)) for j, v in zip(js, vs, strict=True)]
            for js, vs in zip(latents.tolist(), values.tolist(), strict=True)
        ]
    return out
