"""Vectors that steer together, one a hook point, at one common factor: what was learned or made for several layers.

    coefficient of vector i = coefficient of the lead * coefficient_i / coefficient_lead

The lead is the vector of the highest dose, and the dose of a group is that of its lead. Vectors of which one has no
coefficient yet all get the same dose. A single vector is a group of one.

Left out: a factor of its own for each vector (`saekit vector learn` finds those).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from steer.operations import Intervention
from steer.vectors import SteeringVector


class Group(NamedTuple):
    """Vectors, and how strong each is beside the lead."""

    vectors: list[SteeringVector]
    lead: SteeringVector
    ratios: list[float]
    """coefficient of each over that of the lead"""

    def at(self, coefficient: float) -> list[SteeringVector]:
        """Each vector with its own coefficient, where the lead has this one."""
        return [replace(each, coefficient=coefficient * by) for each, by in zip(self.vectors, self.ratios, strict=True)]

    def interventions(self, coefficient: float) -> list[Intervention]:
        """All of them, where the lead has this coefficient."""
        return [Intervention.of(each, each.coefficient) for each in self.at(coefficient)]

    def random(self, rng: np.random.Generator) -> "Group":
        """The same with random unit directions."""
        return self._replace(vectors=[each.random(rng) for each in self.vectors])


def group_of(vectors: SteeringVector | Sequence[SteeringVector]) -> Group:
    """One vector or several as a group."""
    several = [vectors] if isinstance(vectors, SteeringVector) else list(vectors)
    units = [1.0 if each.operation == "ablate" else each.mean_norm for each in several]  # of one dose, or all of it
    sizes = [each.coefficient for each in several]
    if not all(sizes):
        sizes = units
    first = max(range(len(several)), key=lambda i: several[i].dose(sizes[i]))
    return Group(several, several[first], [size / sizes[first] for size in sizes])
