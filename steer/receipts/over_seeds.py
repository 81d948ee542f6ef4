"""Comparisons of several seeds as one: means, with 95% intervals over seeds and prompts.

A figure of a condition is a table, a row a seed and a column a prompt. Its mean is that of the whole table; its
interval comes from drawing rows and columns again, each with replacement and independently, since all seeds continue
the same prompts. A few seeds tell little of how much seeds differ: what each found stands beside the mean, under
`by_seed`.

A disparity is no mean over prompts, so that its figures have no interval here. Left out: measuring
(`steer.receipts.compare`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sae.metrics import RESAMPLES, Interval, draw, interval

SHARED = ("axis", "measure", "wanted", "model", "device", "hook_point", "n_prompts", "max_new_tokens", "judge")
"""what is that of the first seed"""


def over_seeds(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """One result from those of each seed, as `steer.receipts.compare.compare_axis` has them."""
    seeds, several = list(results), list(results.values())
    first = several[0]
    coefficients = [result["coefficient"] for result in several]
    return {
        **{key: first[key] for key in SHARED},
        "coefficient": None if None in coefficients else float(np.mean(coefficients)),
        "seeds": seeds,
        "conditions": {name: _row(name, several, seeds[0]) for name in first["conditions"]},
        "by_seed": {
            str(seed): {name: row["effect"] for name, row in result["conditions"].items()}
            for seed, result in results.items()
        },
        "examples": first["examples"],
    }


def _row(name: str, several: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    rows = [result["conditions"][name] for result in several]
    row = _means_of(rows)
    row |= {"effect_ci95": None, "value_ci95": None}
    for figure in several[0]["per_text"][name]:
        table = np.array([result["per_text"][name][figure] for result in several])
        row |= {figure: float(table.mean()), f"{figure}_ci95": crossed(table, seed)}
    ranges = [row["latency_ms_range"] for row in rows]
    row["latency_ms_range"] = [min(low for low, _ in ranges), max(high for _, high in ranges)]
    return row | {"cost": _means_of([row["cost"] for row in rows])}


def _means_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each number that all rows have; what is the same in all of them stays as it is."""
    numbers = [key for key in rows[0] if all(isinstance(row.get(key), int | float) for row in rows)]
    values = {key: [row[key] for row in rows] for key in numbers}
    return {key: some[0] if len(set(some)) == 1 else float(np.mean(some)) for key, some in values.items()}


def crossed(table: Float[np.ndarray, "seed prompt"], seed: int) -> Interval | None:
    """95% interval of the mean of a table whose rows and columns are both drawn; none of a single cell."""
    if table.size < 2:
        return None
    generator = np.random.default_rng(seed)
    rows, columns = (draw(n, RESAMPLES, generator) / n for n in table.shape)
    return interval(((rows @ table) * columns).sum(axis=1))
