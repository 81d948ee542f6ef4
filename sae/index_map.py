"""A picture of all latents: their decoder directions in two dimensions, near each other where they are alike.

    pca     the two principal components of the unit rows: linear, exact, and mostly a cloud
    umap    McInnes et al. (arXiv:1802.03426) with cosine distances: neighbourhoods hold, distances between them do not

Both are brought into -1..1, the longer side filling it. Left out: drawing (`steer.browser`).
"""

import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from activations.errors import ConfigError

Directions = Float[np.ndarray, "d_sae d_model"]
Places = Float[np.ndarray, "d_sae 2"]


def layout(W_dec: Directions, kind: str, seed: int) -> Places:
    """A place for each latent, by one of LAYOUTS; rows that are zero lie where nothing pulls them.

    Raises: ConfigError if what it needs is not installed.
    """
    unit = W_dec / np.maximum(np.linalg.norm(W_dec, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    places = np.zeros((len(unit), 2)) if len(unit) < 3 else LAYOUTS[kind](unit, seed)
    centred = places - (places.max(axis=0) + places.min(axis=0)) / 2
    return (centred / max(float(np.abs(centred).max()), 1e-12)).astype(np.float32)


def principal(unit: Directions, seed: int) -> Places:
    """Coordinates along the two principal components; the largest weight of each is positive, so that it is one map."""
    centred = unit - unit.mean(axis=0)
    components = np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]
    signs = np.sign(components[np.abs(components).argmax(axis=0), [0, 1]])
    return centred @ (components * signs)


def neighbourhoods(unit: Directions, seed: int) -> Places:
    """UMAP's layout, one for a seed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)  # of TensorFlow, which is not needed
            from umap import UMAP
    except ImportError as error:
        fix = "Install it with: pip install 'saekit[umap]'"
        raise ConfigError("map", expected="the package umap-learn", got="none", fix=fix) from error
    neighbours = min(15, len(unit) - 1)
    return UMAP(metric="cosine", n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(unit)


LAYOUTS: dict[str, Callable[[Directions, int], Places]] = {"pca": principal, "umap": neighbourhoods}
"""by the value of IndexConfig.map"""
