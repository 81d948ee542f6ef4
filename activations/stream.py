"""Text through the model, group by group, without a store in between.

The groups, their activations and their masks are those that a harvest of the same text would store, bit for bit: it is
the same code (`activations.harvest`, `activations.forward`). Each group comes with the place where the next begins, so
that what reads them can go on from there. Left out: ring mode.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from activations.ahead import ahead
from activations.config import HarvestConfig
from activations.forward import Buffer, GroupRunner, widened
from activations.harvest import PREFETCHED, check_finite, find_outliers, outlier_limits, read_groups
from activations.models import LoadedModel
from activations.store_schema import StoreMeta


class StreamPlace(NamedTuple):
    """Where a text goes on, and what was settled at its start."""

    position: tuple[int, int]
    """document and token in it"""
    outlier_limits: dict[str, float]
    """largest norm that counts, by hook point; none before the first group"""


class StreamGroup(NamedTuple):
    """Sequences and what they are at the hook points."""

    tokens: Int32[np.ndarray, "seq ctx"]
    mask: Bool[np.ndarray, "seq ctx"]
    """True for text that is no norm outlier"""
    documents: Int32[np.ndarray, " seq"]
    activations: dict[str, Float[Tensor, "seq ctx d_model"]]
    """float32 on the model's device, rounded as the store would; valid until the next group"""
    after: StreamPlace


def stream(config: HarvestConfig, loaded: LoadedModel, meta: StoreMeta, place: StreamPlace) -> Iterator[StreamGroup]:
    """The text of `config` from a place on, to its end.

    Raises: NumericsError for NaN or infinity.
    """
    runner, buffer = GroupRunner(meta, loaded), Buffer(meta, loaded.device)
    limits = place.outlier_limits
    with ahead(read_groups(config, loaded.tokenizer, place.position), PREFETCHED) as groups:
        for rows in groups:
            norms = runner.run(rows.tokens, rows.attend, buffer).norms()
            check_finite(meta, norms, rows)
            limits = limits or outlier_limits(config, rows, norms)
            mask = rows.is_text & ~find_outliers(rows, norms, limits)
            part = slice(0, len(rows.tokens))
            activations = {name: widened(buffer.device, name, part) for name in meta.hook_points}
            yield StreamGroup(rows.tokens, mask, rows.documents, activations, StreamPlace(rows.after, limits))
