"""How good an SAE is, on text it was not trained on.

Flow:
1. take the held-out tail of the store that the SAE was trained from;
2. from stored activations: FVU, L0, dead fraction and density (`sae.metrics`);
3. from the model: replace what the SAE writes by its reconstruction from an untouched pass, and compare the
   cross-entropy of the next token with that of the untouched model, and with that of a mean, or zero, in the same
   places.

    CE loss recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)

Mean ablation is the honest reference and the headline; zero ablation makes CE_ablated huge and the score flattering,
and is given for comparison with others. Tokens that the store masks (BOS, special tokens, norm outliers) are left as
they are in every variant, since the SAE never saw their like. Left out: probing, absorption, automatic labels.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from activations.errors import MismatchError, ShapeError
from activations.hook_points import HookPoint
from activations.hooks import capture, edit
from activations.models import LoadedModel, load_model
from activations.progress import progress
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.config import EvaluateConfig
from sae.data import held_out, statistics, used_tokens
from sae.index import check_belongs
from sae.metrics import Evaluation
from sae.torch_view import TorchSae
from sae.wiring import Wiring, side_by_side

BLOCK_SEQUENCES = 32
CE_SEQUENCES = 4


def evaluate(config: EvaluateConfig, loaded: LoadedModel | None = None) -> dict[str, float]:
    """Evaluate the SAE at `config.sae` and write `evaluation.json` beside it.

    Returns: fvu, l0, dead_fraction and dense_fraction over `n_tokens` held-out tokens; ce_clean, ce_sae, ce_mean,
      ce_zero and kl_sae in nats a token over `ce_tokens`; ce_loss_recovered and ce_loss_recovered_zero.
    Raises: MismatchError if store, SAE and model do not belong together.
    """
    store, artefact = ActivationStore.open(config.store), SaeArtefact.load(config.sae)
    loaded = loaded or load_model(config.model, device=config.device)
    check_belongs(store, loaded, artefact)
    _check_share(config, artefact)
    start, stop = held_out(store, config.holdout_fraction)
    if not store.mask(start, stop).any():
        raise ShapeError(
            f"{store.path}: held-out tokens", expected="some that are unmasked", got=0, fix="Raise holdout_fraction."
        )
    sae, wiring = TorchSae(artefact).to(loaded.device), Wiring.parse(artefact.hook_point)
    result = reconstruction(store, wiring, sae, start, stop)
    result |= spliced_losses(store, wiring, sae, loaded, _spread(start, stop, config.ce_sequences))
    (config.sae / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def reconstruction(store: ActivationStore, wiring: Wiring, sae: TorchSae, start: int, stop: int) -> dict[str, float]:
    """Measures on stored activations of sequences start..stop."""
    mean = np.concatenate([statistics(store, name).mean for name in wiring.writes])
    evaluation = Evaluation(mean, sae.d_sae)
    for first in range(start, stop, BLOCK_SEQUENCES):
        last = min(first + BLOCK_SEQUENCES, stop)
        used = {name: used_tokens(store, name, first, last) for name in wiring.hook_points}
        x, y = torch.from_numpy(side_by_side(used, wiring.reads)), side_by_side(used, wiring.writes)
        with torch.inference_mode():
            latents = sae.encode(x.to(sae.W_enc.device))
            evaluation.add(y, sae.reconstruct(x.to(latents), latents).cpu().numpy(), latents.cpu().numpy())
    return {**evaluation.summary(), "n_tokens": evaluation.n_tokens}


def spliced_losses(
    store: ActivationStore, wiring: Wiring, sae: TorchSae, loaded: LoadedModel, sequences: Int[np.ndarray, " seq"]
) -> dict[str, float]:
    """Cross-entropies with the residual stream untouched, through the SAE, and ablated.

    A next-token loss counts where the token it is predicted from is unmasked and the text goes on.
    """
    sums: dict[str, float] = dict.fromkeys(("clean", "sae", "mean", "zero"), 0.0)
    kl, count = 0.0, 0
    with progress("evaluate", len(sequences), "seq") as advance:
        for rows in np.array_split(sequences, max(1, len(sequences) // CE_SEQUENCES)):
            tokens, mask = (part.to(loaded.device) for part in _rows(store, rows))
            log_probs = _variants(store, wiring, sae, loaded, tokens, mask)
            counted = mask[:, :-1] & mask.flip(1).cumsum(1).flip(1)[:, 1:].bool()
            for name, values in log_probs.items():
                losses = functional.nll_loss(values[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
                sums[name] += float(losses[counted].sum())
            clean, spliced = log_probs["clean"][:, :-1][counted], log_probs["sae"][:, :-1][counted]
            kl += float((clean.exp() * (clean - spliced)).sum())
            count += int(counted.sum())
            advance(len(rows))
    ce = {name: total / max(count, 1) for name, total in sums.items()}
    return {
        **{f"ce_{name}": value for name, value in ce.items()},
        "ce_loss_recovered": _recovered(ce["mean"], ce),
        "ce_loss_recovered_zero": _recovered(ce["zero"], ce),
        "kl_sae": kl / max(count, 1),
        "ce_tokens": count,
    }


def _variants(
    store: ActivationStore,
    wiring: Wiring,
    sae: TorchSae,
    loaded: LoadedModel,
    tokens: Int[Tensor, "seq ctx"],
    mask: Bool[Tensor, "seq ctx"],
) -> dict[str, Float[Tensor, "seq ctx vocab"]]:
    """Next-token log-probabilities: clean, and with what the SAE writes replaced: by its reconstruction, mean, zero."""
    reads, writes = ([HookPoint.parse(name) for name in names] for names in (wiring.reads, wiring.writes))
    with capture(loaded.model, loaded.family, reads) as captured:
        clean = _log_probs(loaded, tokens, mask, {})
        x = torch.cat([captured[point].float() for point in reads], dim=-1)
    with torch.inference_mode():
        parts = sae(x).split(store.d_model, dim=-1)
    means = [torch.from_numpy(statistics(store, name).mean).to(x) for name in wiring.writes]
    replacements = {
        "sae": parts,
        "mean": [mean.expand_as(part) for mean, part in zip(means, parts, strict=True)],
        "zero": [torch.zeros_like(part) for part in parts],
    }
    return {"clean": clean} | {
        name: _log_probs(loaded, tokens, mask, dict(zip(writes, values, strict=True)))
        for name, values in replacements.items()
    }


def _log_probs(
    loaded: LoadedModel,
    tokens: Int[Tensor, "seq ctx"],
    mask: Bool[Tensor, "seq ctx"],
    replaced: dict[HookPoint, Float[Tensor, "seq ctx d_model"]],
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


def _check_share(config: EvaluateConfig, artefact: SaeArtefact) -> None:
    trained = artefact.metadata.get("config", {}).get("holdout_fraction", config.holdout_fraction)
    if trained != config.holdout_fraction:
        raise MismatchError(
            "holdout_fraction",
            expected=f"{trained}, as in training, so that no text is tested that was trained on",
            got=config.holdout_fraction,
            fix=f"Use --set holdout_fraction={trained}.",
        )


def _spread(start: int, stop: int, n: int) -> Int[np.ndarray, " seq"]:
    """Up to `n` sequences, evenly over start..stop."""
    return np.unique(np.linspace(start, stop - 1, n).astype(int))


def _recovered(ablated: float, ce: dict[str, float]) -> float:
    return (ablated - ce["sae"]) / (ablated - ce["clean"])
