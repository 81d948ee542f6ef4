"""Features as a folder of pages that open without a server: for papers, READMEs and those who have no saekit.

Flow: 1. choose latents: those that are named; else those that somebody explained; else those that steer best, or are
strongest; 2. a page each, from what the feature page shows, and one page that lists them. There is no script in it, and
the templates escape every text. Left out: searching and sorting, which need the browser.
"""

import re
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from markupsafe import Markup

from activations.errors import ConfigError
from sae.charts import template
from sae.latent_query import LatentQuery, Range, order_of
from steer.browser.features import Feature, Window, as_feature
from steer.browser.lists import EXPLAINED, Listing
from steer.browser.sources import Opened

MOST = 200
"""pages of a source, where latents are not named"""


def export_site(opened: Opened, out: Path, latents: Sequence[int] = ()) -> dict[str, Any]:
    """Write the folder `out`, which may not be there yet.

    Args:
      latents: which, of every source; none: as above, MOST of each source.
    Returns: `out`, and the number of `pages`.
    Raises: ConfigError if `out` is there or cannot be written; UnknownNameError for a latent that is not there.
    """
    if not opened.sources:
        raise ConfigError("export", expected="a feature index", got="libraries alone", fix="Name an index.")
    if out.exists():
        fix = "Choose another, or remove it."
        raise ConfigError(out, expected="a folder that is not there yet", got="one", fix=fix)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            parts = _write_all(Path(folder) / out.name, opened, latents)
            (Path(folder) / out.name).rename(out)
    except OSError as error:
        fix = "Choose another place."
        raise ConfigError(out, expected="a folder to write", got=error.strerror, fix=fix) from error
    return {"out": str(out), "pages": 1 + sum(len(part["features"]) for part in parts)}


def _write_all(out: Path, opened: Opened, latents: Sequence[int]) -> list[dict[str, Any]]:
    out.mkdir()
    css = (resources.files("steer.browser") / "static" / "style.css").read_text()
    (out / "style.css").write_text(css)
    parts = [_write_source(out, name, opened, latents) for name in opened.sources]
    (out / "index.html").write_text(_page("site_index.html", "Features", "", parts=parts))
    return parts


def _write_source(out: Path, name: str, opened: Opened, latents: Sequence[int]) -> dict[str, Any]:
    index = opened.source(name).index
    chosen, choice = (list(latents), "Chosen by number.") if latents else _choose(Listing(index))
    folder = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".") or "features"
    while (out / folder).exists():
        folder += "_"
    (out / folder).mkdir()
    features = [as_feature(name, index, index.latent(latent), None) for latent in chosen]
    there = set(chosen)
    for feature in features:
        title = f"{name} {feature.latent}"
        text = _page(
            "site_feature.html", title, "../", there=there, most=feature.max_activation or 1, **_shown(feature)
        )
        (out / folder / f"{feature.latent}.html").write_text(text)
    info = index.info
    model = info["model"]["id"]
    return {"source": name, "folder": folder, "features": features, "choice": choice, "model": model} | {
        key: info[key] for key in ("d_sae", "n_tokens", "sae_sha256")
    }


def _choose(listing: Listing) -> tuple[list[int], str]:
    columns = listing.columns()
    if columns[EXPLAINED].any():
        query = LatentQuery("score", descending=True, ranges=(Range(EXPLAINED, 1, 1),))
        said = "Those that somebody explained, the best explanations first."
    elif np.isfinite(columns["output_score"]).any():
        query, said = LatentQuery("output_score", descending=True, live_only=True), "Those that steer best."
    else:
        query, said = LatentQuery("max_activation", descending=True, live_only=True), "The strongest."
    return order_of(columns, query)[:MOST].tolist(), said


def _page(name: str, title: str, up: str, **values: Any) -> str:
    head = Markup(template("steer.browser", "site_head.html").render(title=title, up=up))
    return template("steer.browser", name).render(head=head, version=version("saekit"), **values)


def _shown(feature: Feature) -> dict[str, Any]:
    def paired(windows: list[Window]) -> list[dict[str, Any]]:
        return [
            {"score": each.score, "peak": each.peak, "pairs": list(zip(each.tokens, each.values, strict=True))}
            for each in windows
        ]

    values = dict(feature) | {"contexts": paired(feature.contexts), "near_misses": paired(feature.near_misses)}
    values["bins"] = [dict(each) | {"contexts": paired(each.contexts)} for each in feature.bins]
    return {"feature": values, "logits": list(zip(feature.raised, feature.lowered, strict=False))}
