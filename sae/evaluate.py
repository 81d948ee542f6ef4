"""How good an SAE is, on text it was not trained on.

Flow:
1. take the held-out tail of the store that the SAE was trained from;
2. from stored activations: FVU, L0, dead fraction and density (`sae.metrics`);
3. from the model: splice the SAE into its residual stream and compare the cross-entropy of the next token with that of
   the untouched model, and with that of the model whose residual stream is replaced by its mean, or by zero.

    CE loss recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)

Mean ablation is the honest reference and the headline; zero ablation makes CE_ablated huge and the score flattering,
and is given for comparison with others. Tokens that the store masks (BOS, special tokens, norm outliers) are left as
they are in every variant, since the SAE never saw their like. Left out: probing, absorption, automatic labels.
"""

import json
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from activations.errors import MismatchError, ShapeError
from activations.hook_points import HookPoint
from activations.hooks import edit
from activations.models import LoadedModel, load_model
from activations.progress import progress
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.config import EvaluateConfig
from sae.data import held_out, statistics
from sae.index import check_belongs
from sae.metrics import Evaluation
from sae.torch_view import TorchSae

BLOCK_SEQUENCES = 32
CE_SEQUENCES = 4
Replace = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]


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
    sae = TorchSae(artefact).to(loaded.device)
    result = reconstruction(store, artefact.hook_point, sae, start, stop)
    result |= spliced_losses(store, artefact.hook_point, sae, loaded, _spread(start, stop, config.ce_sequences))
    (config.sae / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def reconstruction(store: ActivationStore, hook_point: str, sae: TorchSae, start: int, stop: int) -> dict[str, float]:
    """Measures on stored activations of sequences start..stop."""
    evaluation = Evaluation(statistics(store, hook_point).mean, sae.d_sae)
    for first in range(start, stop, BLOCK_SEQUENCES):
        last = min(first + BLOCK_SEQUENCES, stop)
        x = torch.from_numpy(store.activations(hook_point, first, last)[store.mask(first, last)])
        with torch.inference_mode():
            latents = sae.encode(x.to(sae.W_enc.device))
            evaluation.add(x.numpy(), sae.decode(latents).cpu().numpy(), latents.cpu().numpy())
    dense = float((evaluation.density > 0.1).mean())
    return {**evaluation.summary(), "dense_fraction": dense, "n_tokens": evaluation.n_tokens}


def spliced_losses(
    store: ActivationStore, hook_point: str, sae: TorchSae, loaded: LoadedModel, sequences: Int[np.ndarray, " seq"]
) -> dict[str, float]:
    """Cross-entropies with the residual stream untouched, through the SAE, and ablated.

    A next-token loss counts where the token it is predicted from is unmasked and the text goes on.
    """
    point = HookPoint.parse(hook_point)
    mean = torch.from_numpy(statistics(store, hook_point).mean).float()
    variants: dict[str, Replace] = {
        "clean": lambda x: x,
        "sae": lambda x: sae(x.float()).to(x),
        "mean": lambda x: mean.to(x).expand_as(x),
        "zero": torch.zeros_like,
    }
    sums, kl, count = dict.fromkeys(variants, 0.0), 0.0, 0
    with progress("evaluate", len(sequences), "seq") as advance:
        for rows in np.array_split(sequences, max(1, len(sequences) // CE_SEQUENCES)):
            tokens, mask = _rows(store, rows)
            log_probs = {name: _log_probs(loaded, point, tokens, mask, fn) for name, fn in variants.items()}
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


def _log_probs(
    loaded: LoadedModel,
    point: HookPoint,
    tokens: Int[Tensor, "seq ctx"],
    mask: Bool[Tensor, "seq ctx"],
    replace: Replace,
) -> Float[Tensor, "seq ctx vocab"]:
    """Next-token log-probabilities with the unmasked residual stream replaced.

    Padding is on the right, where causal attention keeps it from everything that counts.
    """
    keep = mask[..., None].to(loaded.device)
    with torch.inference_mode(), edit(loaded.model, loaded.family, point, lambda x: torch.where(keep, replace(x), x)):
        logits = loaded.model(input_ids=tokens.to(loaded.device), use_cache=False).logits
    return logits.float().cpu().log_softmax(-1)


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
