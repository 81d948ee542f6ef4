"""What the model loses when what the SAE writes takes the place of the residual stream.

Flow: 1. an untouched pass gives what the SAE reads and should write; 2. for each variant that is replaced, and the
model runs again; 3. next-token losses, and the KL from the untouched model, are summed by document.

    sae            its reconstruction, from the untouched pass
    mean, zero     the dataset's mean, or zeros
    random_error   the true value plus an error as long as the SAE's, in a random direction
    others         what the caller adds, such as baselines

    CE loss recovered   = (CE_ablated - CE_sae) / (CE_ablated - CE_clean), and so for KL
    directed error share = 1 - (CE_random_error - CE_clean) / (CE_sae - CE_clean)

Mean ablation is the honest reference and the headline; zero ablation makes CE_ablated huge and the score flattering,
and is given for comparison with others. The directed error share is how much of the harm comes from where the SAE's
error points and not from its size: 0 if noise of that size does as much, near 1 if noise does almost none, below 0 if
noise does more (after Gurnee, "SAE reconstruction errors are (empirically) pathological", 2024). Tokens that the store
masks (BOS, special tokens, norm outliers) are left as they are in every variant, since the SAE never saw their like.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from activations.hook_points import HookPoint
from activations.hooks import capture, edit
from activations.models import LoadedModel
from activations.progress import progress
from activations.store import ActivationStore
from sae.data import statistics
from sae.metrics import Statistic, bootstrap
from sae.torch_view import TorchSae
from sae.wiring import Wiring

CE_SEQUENCES = 4
Replace = Callable[[Float[Tensor, "seq ctx d_in"], Float[Tensor, "seq ctx d_out"]], Float[Tensor, "seq ctx d_out"]]
"""what is read, and what should be written, to what is written"""


class Losses(NamedTuple):
    """Sums over the counted tokens of each document."""

    names: tuple[str, ...]
    """variants; the first is `clean`"""
    sums: Float[np.ndarray, "document column"]
    """tokens, then the cross-entropy of each variant, then its KL from `clean`, in nats"""

    def column(self, measure: str, name: str) -> int:
        """Where the `ce` or `kl` of a variant is."""
        return 1 + self.names.index(name) + (len(self.names) if measure == "kl" else 0)


def spliced_losses(
    store: ActivationStore,
    wiring: Wiring,
    sae: TorchSae,
    loaded: LoadedModel,
    sequences: Int[np.ndarray, " seq"],
    others: Mapping[str, TorchSae] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Cross-entropies and KL with what the SAE writes untouched, reconstructed, and ablated, and what follows.

    A next-token loss counts where the token it is predicted from is unmasked and the text goes on.

    Args:
      others: more SAEs to put in the SAE's place, by name.
    Returns: ce_X in nats a token, kl_X for all but clean, ce_loss_recovered and kl_recovered (mean ablation),
      ce_loss_recovered_zero and kl_recovered_zero, directed_error_share, the same of each other SAE under
      ce_loss_recovered_X, ce_tokens; and for most an interval X_ci95 over documents, where there are two or more.
    """
    others = others or {}
    losses = _losses(store, wiring, variants(store, wiring, sae, others, seed), loaded, sequences)
    statistics, totals = _statistics(losses, tuple(others)), losses.sums.sum(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: dict[str, Any] = {name: float(statistic(totals)[0]) for name, statistic in statistics.items()}
    result |= {f"{name}_ci95": list(both) for name, both in bootstrap(losses.sums, statistics, seed).items()}
    return {**result, "ce_tokens": int(totals[0, 0])}


def variants(
    store: ActivationStore, wiring: Wiring, sae: TorchSae, others: Mapping[str, TorchSae], seed: int
) -> dict[str, Replace]:
    """What is put in the place of what the SAE writes, by name."""
    mean = torch.from_numpy(np.concatenate([statistics(store, name).mean for name in wiring.writes]))
    generator = torch.Generator().manual_seed(seed)

    def random_error(x: Tensor, y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=generator).to(y).unflatten(-1, (len(wiring.writes), store.d_model))
        error = (y - sae(x)).unflatten(-1, (len(wiring.writes), store.d_model)).norm(dim=-1, keepdim=True)
        return y + (error * functional.normalize(noise, dim=-1)).flatten(-2)

    return {
        "sae": lambda x, y: sae(x),
        "mean": lambda x, y: mean.to(y).expand_as(y),
        "zero": lambda x, y: torch.zeros_like(y),
        "random_error": random_error,
        **{name: (lambda x, y, other=other: other(x)) for name, other in others.items()},
    }


def _losses(
    store: ActivationStore,
    wiring: Wiring,
    replacements: Mapping[str, Replace],
    loaded: LoadedModel,
    sequences: Int[np.ndarray, " seq"],
) -> Losses:
    names = ("clean", *replacements)
    sums: dict[int, np.ndarray] = {}
    with progress("evaluate", len(sequences), "seq") as advance:
        for rows in np.array_split(sequences, max(1, len(sequences) // CE_SEQUENCES)):
            tokens, mask = (part.to(loaded.device) for part in _rows(store, rows))
            counted = mask[:, :-1] & mask.flip(1).cumsum(1).flip(1)[:, 1:].bool()
            columns = [counted.sum(1), *_measured(wiring, replacements, loaded, tokens, mask, counted)]
            found = torch.stack([column.double().cpu() for column in columns], dim=1).numpy()
            for row, values in zip(rows.tolist(), found, strict=True):
                document = int(store.documents(row, row + 1)[0])
                sums[document] = sums.get(document, 0) + values
            advance(len(rows))
    return Losses(names, np.stack(list(sums.values())))


def _measured(
    wiring: Wiring,
    replacements: Mapping[str, Replace],
    loaded: LoadedModel,
    tokens: Int[Tensor, "seq ctx"],
    mask: Bool[Tensor, "seq ctx"],
    counted: Bool[Tensor, "seq next"],
) -> Iterator[Float[Tensor, " seq"]]:
    """Summed cross-entropy of each variant, then its summed KL; logits of one are in memory, beside the clean ones."""
    reads, writes = ([HookPoint.parse(name) for name in names] for names in (wiring.reads, wiring.writes))
    with capture(loaded.model, loaded.family, [*reads, *writes]) as captured:
        clean = _log_probs(loaded, tokens, mask, {})
        x, y = (torch.cat([captured[point].float() for point in points], dim=-1) for points in (reads, writes))
    ce, kl = [_cross_entropy(clean, tokens, counted)], [torch.zeros(len(tokens))]
    for replace in replacements.values():
        with torch.inference_mode():
            parts = replace(x, y).split(x.shape[-1] // len(reads), dim=-1)
        log_probs = _log_probs(loaded, tokens, mask, dict(zip(writes, parts, strict=True)))
        ce.append(_cross_entropy(log_probs, tokens, counted))
        kl.append(((clean.exp() * (clean - log_probs)).sum(-1)[:, :-1] * counted).sum(1))
    yield from (*ce, *kl)


def _cross_entropy(
    log_probs: Float[Tensor, "seq ctx vocab"], tokens: Int[Tensor, "seq ctx"], counted: Bool[Tensor, "seq next"]
) -> Float[Tensor, " seq"]:
    losses = functional.nll_loss(log_probs[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return (losses * counted).sum(1)


def _log_probs(
    loaded: LoadedModel,
    tokens: Int[Tensor, "seq ctx"],
    mask: Bool[Tensor, "seq ctx"],
    replaced: Mapping[HookPoint, Float[Tensor, "seq ctx d_model"]],
) -> Float[Tensor, "seq ctx vocab"]:
    """Next-token log-probabilities with unmasked activations replaced.

    Padding is on the right, where causal attention keeps it from everything that counts.
    """
    keep = mask[..., None].to(loaded.device)

    def put(value: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(keep, value.to(x), x)

    with torch.inference_mode(), ExitStack() as stack:
        for point, value in replaced.items():
            stack.enter_context(edit(loaded.model, loaded.family, point, put(value)))
        logits = loaded.model(input_ids=tokens.to(loaded.device), use_cache=False).logits
    return logits.float().log_softmax(-1)


def _rows(
    store: ActivationStore, rows: Int[np.ndarray, " seq"]
) -> tuple[Int[Tensor, "seq ctx"], Bool[Tensor, "seq ctx"]]:
    tokens = np.concatenate([store.tokens(i, i + 1) for i in rows.tolist()])
    mask = np.concatenate([store.mask(i, i + 1) for i in rows.tolist()])
    return torch.from_numpy(tokens).long(), torch.from_numpy(mask)


def _statistics(losses: Losses, others: tuple[str, ...]) -> dict[str, Statistic]:
    """What is reported, each as a function of column sums."""

    def at(measure: str, name: str) -> Statistic:
        return lambda s: s[:, losses.column(measure, name)] / s[:, 0]

    def recovered(measure: str, name: str, ablated: str) -> Statistic:
        worst, best, own = at(measure, ablated), at(measure, "clean"), at(measure, name)
        return lambda s: (worst(s) - own(s)) / (worst(s) - best(s))

    clean, noise, own = at("ce", "clean"), at("ce", "random_error"), at("ce", "sae")
    return {
        **{f"ce_{name}": at("ce", name) for name in losses.names},
        **{f"kl_{name}": at("kl", name) for name in losses.names[1:]},
        "ce_loss_recovered": recovered("ce", "sae", "mean"),
        "ce_loss_recovered_zero": recovered("ce", "sae", "zero"),
        "kl_recovered": recovered("kl", "sae", "mean"),
        "kl_recovered_zero": recovered("kl", "sae", "zero"),
        **{f"ce_loss_recovered_{name}": recovered("ce", name, "mean") for name in others},
        "directed_error_share": lambda s: 1 - (noise(s) - clean(s)) / (own(s) - clean(s)),
    }
