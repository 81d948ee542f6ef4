"""Steering vectors: a unit direction at a hook point, and where it came from.

    h' = h + coefficient * direction            coefficient > 0 adds, 0 changes nothing at all
    dose = |coefficient| * ||direction|| / mean ||h||

The dose makes coefficients comparable between layers and models: the mean norm is taken at the hook point, over tokens
that are neither the first of a text nor padding. Two ways to get a direction:

- from a latent: the decoder row of an SAE, at the hook point that the SAE writes;
- from contrast pairs: difference in means. For pairs (prompt, positive, negative), the mean residual stream over the
  tokens of the positive continuations minus that over the negative ones (Marks & Tegmark, arXiv:2310.06824, section 3;
  Rimsky et al., arXiv:2312.06681).

Left out: applying them (`steer.runtime`), measuring them (`steer.effect`), keeping them (`steer.library`).
"""

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import MismatchError, TextError, UnknownNameError
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from activations.store_schema import ModelRef
from sae.artefact import SaeArtefact
from sae.wiring import Wiring


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A unit direction at one hook point of one model."""

    name: str
    """how a person refers to it"""
    direction: Float[np.ndarray, " d_model"]
    """unit norm, float32"""
    hook_point: str
    """where it is added"""
    model: ModelRef
    """the model it was made from"""
    mean_norm: float
    """mean ||h|| at the hook point; turns a coefficient into a dose"""
    source: dict[str, Any]
    """kind `latent` or `contrast`, and what it was made from"""
    coefficient: float = 0.0
    """suggested coefficient; 0 until one was measured"""
    receipts: list[dict[str, Any]] = field(default_factory=list)
    """measured effects, newest last"""
    operation: str = "add"
    """what it is used for: a key of `steer.operations.VECTOR_OPERATIONS`"""
    scope: str = "all"
    """on which tokens, in the words of `steer.scopes`"""

    def dose(self, coefficient: float) -> float:
        """|coefficient| in units of the mean norm of the residual stream."""
        return abs(coefficient) / self.mean_norm

    def coefficient_of(self, dose: float) -> float:
        """The positive coefficient of a dose."""
        return dose * self.mean_norm


@dataclass(frozen=True)
class ContrastPair:
    """One prompt with two continuations that differ in the concept and in little else."""

    prompt: str
    positive: str
    negative: str
    split: str
    """`fit` or `heldout`"""


def contrast_names() -> list[str]:
    """Names of the contrast sets that saekit ships."""
    folder = resources.files("steer") / "data" / "contrasts"
    return sorted(file.name.removesuffix(".jsonl") for file in folder.iterdir() if file.name.endswith(".jsonl"))


def load_pairs(spec: str) -> list[ContrastPair]:
    """Pairs from a shipped set's name or from a .jsonl file with the keys prompt, positive, negative and, optionally,
    split.

    Raises: UnknownNameError for a name that is not shipped, TextError for a file that is not such a file.
    """
    if spec in contrast_names():
        text = (resources.files("steer") / "data" / "contrasts" / f"{spec}.jsonl").read_text()
    elif spec.endswith(".jsonl"):
        try:
            text = Path(spec).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(spec, expected="a readable .jsonl file", got=str(error), fix="Check the path.") from error
    else:
        raise UnknownNameError(
            f"contrast '{spec}'",
            expected=f"one of {', '.join(contrast_names())}, or a .jsonl file",
            got=f"'{spec}'",
            fix="Correct the name.",
        )
    return [_parse_pair(line, f"{spec} line {i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _parse_pair(line: str, where: str) -> ContrastPair:
    try:
        data = json.loads(line)
        pair = ContrastPair(data["prompt"], data["positive"], data["negative"], data.get("split", "fit"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise TextError(
            where,
            expected='{"prompt", "positive", "negative"}',
            got=f"{type(error).__name__} {error}",
            fix="Correct it.",
        ) from error
    if not all(isinstance(part, str) and part for part in (pair.prompt, pair.positive, pair.negative)):
        raise TextError(where, expected="three non-empty strings", got=line[:60], fix="Correct the line.")
    return pair


class Places(NamedTuple):
    """The two hook points of an SAE, which differ if it transcodes."""

    reads: HookPoint
    """where its latents are read"""
    writes: HookPoint
    """where its decoder rows belong"""


def places_of(artefact: SaeArtefact) -> Places:
    """Where an SAE is read and steered with. Raises: MismatchError if it reads or writes several hook points."""
    wiring = Wiring.parse(artefact.hook_point)
    for verb, names in (("reads", wiring.reads), ("writes", wiring.writes)):
        if len(names) > 1:
            raise MismatchError(
                f"SAE of {wiring}",
                expected="one hook point that it reads and one that it writes, to steer at",
                got=f"one that {verb} {len(names)}",
                fix="Choose an autoencoder or a transcoder.",
            )
    return Places(HookPoint.parse(wiring.reads[0]), HookPoint.parse(wiring.writes[0]))


class EncoderRow(NamedTuple):
    """How one latent is read: z = s where s = weight·x + bias is above the threshold, else 0."""

    weight: Float[Tensor, " d_model"]
    bias: float
    threshold: float
    """at least 0; a TopK SAE asks besides that s be one of the k largest"""


def encoder_row(artefact: SaeArtefact, latent: int) -> EncoderRow:
    """The encoder of a latent, b_dec folded into its bias. Raises: UnknownNameError if there is no such latent."""
    _check_latent(artefact, latent)
    weight = torch.tensor(artefact.W_enc[:, latent])
    bias = float(artefact.b_enc[latent])
    if artefact.apply_b_dec_to_input:
        bias -= float(torch.tensor(artefact.b_dec).double() @ weight.double())
    threshold = 0.0 if artefact.threshold is None else max(0.0, float(artefact.threshold[latent]))
    return EncoderRow(weight, bias, threshold)


def _check_latent(artefact: SaeArtefact, latent: int) -> None:
    if not 0 <= latent < artefact.d_sae:
        raise UnknownNameError(
            f"latent {latent}", expected=f"0 to {artefact.d_sae - 1}", got=latent, fix="Choose a latent of this SAE."
        )


def from_latent(artefact: SaeArtefact, latent: int, model: ModelRef, mean_norm: float) -> SteeringVector:
    """The decoder row of one latent, at the hook point that the SAE writes.

    Raises: UnknownNameError if the SAE has no such latent, MismatchError if it has several hook points.
    """
    _check_latent(artefact, latent)
    row = artefact.W_dec[latent].astype(np.float32)
    source = {"kind": "latent", "latent": latent, "sae_sha256": artefact.sha256}
    direction, hook_point = row / np.linalg.norm(row), str(places_of(artefact).writes)
    return SteeringVector(f"latent-{latent}", direction, hook_point, model, mean_norm, source)


def from_contrast(loaded: LoadedModel, hook_point: str, name: str, pairs: list[ContrastPair]) -> SteeringVector:
    """Difference in means over the `fit` pairs, normalised; raises TextError if there are none.

    `source` keeps the midpoint between the two means along the direction, which tells the sides apart when text is read
    back, and the share of `heldout` pairs whose positive continuation lies further along the direction than the other.
    """
    fit = [pair for pair in pairs if pair.split == "fit"]
    if not fit:
        raise TextError(f"contrast '{name}'", expected="pairs of the split 'fit'", got="none", fix="Add some.")
    point = HookPoint.parse(hook_point).check(loaded.n_layers, loaded.family.sites(loaded.model.config))
    positive, norm_p = _continuation_mean(loaded, point, [(pair.prompt, pair.positive) for pair in fit])
    negative, norm_n = _continuation_mean(loaded, point, [(pair.prompt, pair.negative) for pair in fit])
    difference = positive - negative
    direction = difference / np.linalg.norm(difference)
    source = {
        "kind": "contrast",
        "contrast": name,
        "pairs": len(fit),
        "midpoint": float((positive + negative) @ direction / 2),
        "heldout_accuracy": _accuracy(loaded, point, direction, [pair for pair in pairs if pair.split == "heldout"]),
    }
    return SteeringVector(name, direction.astype(np.float32), hook_point, loaded.ref, (norm_p + norm_n) / 2, source)


def _accuracy(
    loaded: LoadedModel, point: HookPoint, direction: Float[np.ndarray, " d_model"], pairs: list[ContrastPair]
) -> float | None:
    if not pairs:
        return None
    sides = [
        [
            _continuation_mean(loaded, point, [(pair.prompt, side)])[0] @ direction
            for side in (pair.positive, pair.negative)
        ]
        for pair in pairs
    ]
    return float(np.mean([positive > negative for positive, negative in sides]))


def _continuation_mean(
    loaded: LoadedModel, point: HookPoint, texts: list[tuple[str, str]]
) -> tuple[Float[np.ndarray, " d_model"], float]:
    """Mean residual stream over continuation tokens, and its mean norm over all tokens but the first."""
    total = np.zeros(loaded.d_model)
    count, norms = 0, []
    with capture(loaded.model, loaded.family, [point], stop_after_last=True) as captured:
        for prompt, continuation in texts:
            ids, start = encode_pair(loaded, prompt, continuation)
            run_until(loaded.model, {"input_ids": ids})
            x = captured[point][0].float().cpu().numpy()
            total += x[start:].sum(axis=0, dtype=np.float64)
            count += len(x) - start
            norms += np.linalg.norm(x[1:], axis=1).tolist()
    return total / count, float(np.mean(norms))


def encode_pair(loaded: LoadedModel, prompt: str, continuation: str) -> tuple[Tensor, int]:
    """Token ids [1, pos] of prompt + continuation, and where the continuation starts."""
    head = loaded.tokenizer(prompt)["input_ids"]
    ids = loaded.tokenizer(prompt + continuation)["input_ids"]
    start = min(len(head), len(ids) - 1)
    return torch.tensor([ids], device=loaded.device), max(start, 1)
