"""What several vectors do to each other, before any model runs.

Vectors are taken at their coefficients c_i and unit directions v_i, those of one hook point together:

    S = Σ c_i v_i                  joint dose = ‖S‖ / mean ‖h‖, beside the sum of the single doses
    G = V Vᵀ                       cosines; its condition number is 1 where all are at right angles and grows without
                                   bound as one becomes a combination of the others
    effective rank                 exp of the entropy of G's eigenvalues over their sum (Roy & Vetterli 2007): how many
                                   directions there are in effect, 1 to n
    S·v_i / c_i                    what is pushed along v_i over what was asked for: 1 if the others leave it alone,
                                   above 1 amplified, below 1 cancelled, below 0 reversed

Vectors of different hook points are not summed; their cosines say how alike they are, and are marked as such, since
what one layer writes reaches the next through whatever lies between.

Orthogonalisation, of unit rows V = U Σ Wᵀ:

    symmetric     U Wᵀ             the orthonormal set that is nearest to V in total squared distance (Löwdin 1950), in
                                   which no vector comes before another
    sequential    Gram-Schmidt     the first stays, each later one gives up what it shares with those before it

Left out: Rotate's change of length, ablations and clamps, which add nothing that could be summed; gates and scopes,
which are taken to be open at once; what text makes of it (`steer.receipts.interference`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from activations.errors import ConfigError, MismatchError, NumericsError
from steer.operations import Add, vector_operation
from steer.vectors import SteeringVector

ALIKE = 0.3
"""|cosine| from which on a pair is named"""
DEPENDENT = 1e-4
"""smallest over largest singular value from which on directions count as combinations of each other"""
MOST_GROUPS = 12
"""vectors whose every subset is tried"""

How = Literal["symmetric", "sequential"]
Rows = Float[np.ndarray, "n d_model"]


class Pair(NamedTuple):
    """Two vectors and how alike they are."""

    one: str
    other: str
    cosine: float
    hook_points: tuple[str, str]
    pushed_alike: bool
    """whether they push the same way at their coefficients"""

    def __str__(self) -> str:
        """In words."""
        how = "push the same way" if self.pushed_alike else "push against each other"
        one, other = self.hook_points
        where = f"at {one}" if one == other else f"across layers, {one} and {other}, where cosines say less"
        return f"{self.one} and {self.other} {how}: cosine {self.cosine:+.2f} {where}"


@dataclass(frozen=True)
class AtPoint:
    """The vectors of one hook point."""

    hook_point: str
    names: list[str]
    cosines: Float[np.ndarray, "n n"]
    condition: float
    """of the Gram matrix of unit directions; infinite if one is a combination of the others"""
    effective_rank: float
    joint_dose: float
    sum_of_doses: float
    shares: dict[str, float]
    """S·v_i / c_i of each vector that adds something"""


@dataclass(frozen=True)
class Composition:
    """The report of a set of vectors."""

    points: list[AtPoint]
    pairs: list[Pair]
    """those of a cosine of at least the threshold either way, most alike first"""
    across: dict[tuple[str, str], float]
    """cosines of vectors of different hook points, by their names"""

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON; what is infinite is none."""
        points = {
            point.hook_point: {
                "names": point.names,
                "cosines": point.cosines.round(6).tolist(),
                "condition": point.condition if np.isfinite(point.condition) else None,
                "effective_rank": point.effective_rank,
                "joint_dose": point.joint_dose,
                "sum_of_doses": point.sum_of_doses,
                "shares": point.shares,
            }
            for point in self.points
        }
        across = [{"one": one, "other": other, "cosine": cosine} for (one, other), cosine in self.across.items()]
        return {"points": points, "pairs": [str(pair) for pair in self.pairs], "across": across}


def composition(vectors: Sequence[SteeringVector], threshold: float = ALIKE) -> Composition:
    """What `vectors` do to each other at their own coefficients.

    Raises: ConfigError for two of one name; MismatchError for vectors of several models.
    """
    _check(vectors)
    points = [_at_point(point, some) for point, some in by_point(vectors).items()]
    pairs, across = [], {}
    for i, one in enumerate(vectors):
        for other in vectors[i + 1 :]:
            cosine = (_unit([one]) @ _unit([other]).T).item()
            if one.hook_point != other.hook_point:
                across[one.name, other.name] = cosine
            if abs(cosine) >= threshold:
                alike = cosine * one.coefficient * other.coefficient >= 0
                pairs.append(Pair(one.name, other.name, cosine, (one.hook_point, other.hook_point), alike))
    return Composition(points, sorted(pairs, key=lambda pair: -abs(pair.cosine)), across)


def cosines(vectors: Sequence[SteeringVector]) -> Float[np.ndarray, "n n"]:
    """Of each with each, whatever their hook points."""
    unit = _unit(vectors)
    return unit @ unit.T


def by_point(vectors: Sequence[SteeringVector]) -> dict[str, list[SteeringVector]]:
    """Vectors by hook point, in their order."""
    found: dict[str, list[SteeringVector]] = {}
    for vector in vectors:
        found.setdefault(vector.hook_point, []).append(vector)
    return found


def joint_doses(vectors: Sequence[SteeringVector]) -> dict[str, float]:
    """‖Σ c_i v_i‖ / mean ‖h‖ at each hook point; of several mean norms the smallest counts."""
    return {point: _joint_dose(some) for point, some in by_point(vectors).items()}


def within_budget(vectors: Sequence[SteeringVector], budget: float) -> list[SteeringVector]:
    """The vectors, those of a hook point whose joint dose is above `budget` at one share of their coefficients."""
    factors = {point: min(1.0, budget / max(dose, 1e-12)) for point, dose in joint_doses(vectors).items()}
    return [replace(vector, coefficient=factors[vector.hook_point] * vector.coefficient) for vector in vectors]


def longest_sum(rows: Rows) -> float:
    """Length of the longest sum of some of the rows; of more than MOST_GROUPS, the sum of all lengths, which is above.

    >>> longest_sum(np.array([[3.0, 0.0], [-2.0, 0.0], [0.0, 4.0]]))
    5.0
    """
    n = len(rows)
    if n > MOST_GROUPS:
        return float(np.linalg.norm(rows, axis=1).sum())
    chosen = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    return float(np.linalg.norm(chosen @ rows, axis=1).max())


# --- orthogonalisation -----------------------------------------------------------------------------------------------


def symmetric(rows: Rows) -> Rows:
    """The orthonormal rows nearest to some unit rows. Raises: NumericsError if those depend on each other."""
    left, _, right = np.linalg.svd(_independent(rows), full_matrices=False)
    return left @ right


def sequential(rows: Rows) -> Rows:
    """Orthonormal rows of which the first k span what the first k of `rows` do, and point the same way.

    Raises: NumericsError if `rows` depend on each other.
    """
    basis, sizes = np.linalg.qr(_independent(rows).T)
    return (basis * np.sign(np.diag(sizes))).T


ORTHOGONALISATIONS = {"symmetric": symmetric, "sequential": sequential}


class Orthogonalised(NamedTuple):
    """Vectors at right angles to each other, and how far each was turned."""

    vectors: list[SteeringVector]
    kept: dict[str, float]
    """cosine of each with what it was"""


def orthogonalised(vectors: Sequence[SteeringVector], how: How = "symmetric") -> Orthogonalised:
    """The vectors, those of each hook point made orthogonal, at their coefficients.

    Args:
      how: `symmetric`, or `sequential`, in which vectors come in order of priority.
    Raises: NumericsError if some at one hook point depend on each other; as `composition` besides.
    """
    _check(vectors)
    directions, kept = {}, {}
    for some in by_point(vectors).values():
        before = _unit(some)
        after = ORTHOGONALISATIONS[how](before)
        for vector, old, new in zip(some, before, after, strict=True):
            directions[vector.name], kept[vector.name] = new.astype(np.float32), float(old @ new)
    found = [
        replace(
            vector,
            direction=directions[vector.name],
            source={**vector.source, "orthogonalised": {"how": how, "cosine": kept[vector.name]}},
        )
        for vector in vectors
    ]
    return Orthogonalised(found, kept)


def _independent(rows: Rows) -> Rows:
    sizes = np.linalg.svd(rows, compute_uv=False)
    if len(sizes) < len(rows) or sizes[-1] < DEPENDENT * sizes[0]:
        raise NumericsError(
            "orthogonalise",
            expected="directions none of which is a combination of the others",
            got=f"{len(rows)} of which {int((sizes >= DEPENDENT * sizes[0]).sum())} are independent",
            fix="Leave one out, or combine those that are alike.",
        )
    return rows


# --- parts -----------------------------------------------------------------------------------------------------------


def _at_point(hook_point: str, vectors: Sequence[SteeringVector]) -> AtPoint:
    unit, gram = _unit(vectors), cosines(vectors)
    values = np.linalg.eigvalsh(gram).clip(min=0)
    condition = float(values[-1] / values[0]) if values[0] > DEPENDENT**2 * values[-1] else float("inf")
    share = values[values > 0] / values.sum()
    total, shares = _sum(vectors), {}
    for vector, direction in zip(vectors, unit, strict=True):
        if _adds(vector) and vector.coefficient:
            shares[vector.name] = float(total @ direction / vector.coefficient)
    doses = [vector.dose(vector.coefficient) for vector in vectors if _adds(vector)]
    return AtPoint(
        hook_point,
        [vector.name for vector in vectors],
        gram,
        condition,
        float(np.exp(-(share * np.log(share)).sum())),
        _joint_dose(vectors),
        float(sum(doses)),
        shares,
    )


def _joint_dose(vectors: Sequence[SteeringVector]) -> float:
    return float(np.linalg.norm(_sum(vectors))) / min(vector.mean_norm for vector in vectors)


def _sum(vectors: Sequence[SteeringVector]) -> Float[np.ndarray, " d_model"]:
    """S, of the vectors that add."""
    coefficients = [vector.coefficient if _adds(vector) else 0.0 for vector in vectors]
    return np.array(coefficients) @ _unit(vectors)


def _adds(vector: SteeringVector) -> bool:
    return issubclass(vector_operation(vector.operation), Add)


def _unit(vectors: Sequence[SteeringVector]) -> Rows:
    rows = np.stack([vector.direction for vector in vectors]).astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)


def _check(vectors: Sequence[SteeringVector]) -> None:
    names = [vector.name for vector in vectors]
    for name in names:
        if names.count(name) > 1:
            fix = "Name each once, or rename one."
            raise ConfigError(f"vector '{name}'", expected="one of this name", got=names.count(name), fix=fix)
    models = sorted({vector.model.fingerprint for vector in vectors})
    if len(models) > 1:
        got = f"those of {len(models)}: {', '.join(model[:12] for model in models)}"
        fix = "Make them from the same weights."
        raise MismatchError(", ".join(names), expected="vectors of one model", got=got, fix=fix)
