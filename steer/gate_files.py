"""Gates as JSON and tensors, as a library keeps them.

    {"when": {"and": ["refusal", {"not": "code"}]}, "gates": [{"name": "refusal", "kind": "energy", ...}, ...]}

Flow: 1. every gate of a condition becomes an entry, its weights a tensor; 2. the condition names them, joined by
`and`, `or` and `not`; 3. reading goes the other way and believes nothing: kinds, numbers, shapes and sizes are checked.

Left out: files and hashes (`steer.library`).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from activations.errors import ConfigError
from activations.hook_points import HookPoint
from steer.gates import INF, Condition, Gate, Readout, gates_of, joined, parts_of

READOUTS: dict[str, tuple[bool, bool]] = {
    "energy": (True, True),
    "cosine": (False, True),
    "probe": (False, False),
    "latent": (False, False),
}
"""Kind -> absolute, relative; `latent` alone has a floor."""
MAX_NODES = 32
"""gates, `and`, `or` and `not` of a condition at most; as clauses, which are what runs, it would grow exponentially"""

Entry = dict[str, Any]


def entry_of(condition: Condition) -> tuple[Entry, dict[str, Float[np.ndarray, " d_model"]]]:
    """A condition as JSON, and the weights of its gates by their names.

    Raises: ConfigError if two of its gates have one name, one has another readout than READOUTS or thresholds that are
      not finite, or there are more than MAX_NODES of them.
    """
    gates = gates_of(condition)
    names = [gate.name for gate in gates]
    for name in names:
        if names.count(name) > 1:
            fix = "Give them names, by which they are told apart."
            raise ConfigError(f"gate '{name}'", expected="one of this name", got=names.count(name), fix=fix)
    if (n := len(list(_nodes(condition)))) > MAX_NODES:
        raise ConfigError("gate", expected=f"at most {MAX_NODES} gates and joints", got=n, fix="Make it simpler.")
    weights = {gate.name: gate.readout.weight.detach().float().cpu().numpy() for gate in gates}
    return {"when": _when(condition), "gates": [_gate_entry(gate) for gate in gates]}, weights


def kind_of(readout: Readout) -> str:
    """Which of READOUTS it is. Raises: ConfigError if none."""
    flags = (readout.absolute, readout.relative)
    if readout.floor > -INF and flags == READOUTS["latent"]:
        return "latent"
    for kind, wanted in READOUTS.items():
        if kind != "latent" and flags == wanted and readout.floor == -INF:
            return kind
    raise ConfigError("gate", expected=f"a readout that is one of {', '.join(READOUTS)}", got="another", fix="Use one.")


def condition_of(entry: Any, weights: Mapping[str, Float[np.ndarray, " d_model"]], known: dict[Any, Gate]) -> Condition:
    """The condition of an entry.

    Args:
      weights: of its gates, by their names.
      known: gates that were read before, to which this adds; equal ones become one gate, which runs once.
    Raises: ValueError, KeyError or TypeError saying what is wrong with it.
    """
    gates = {each["name"]: _gate(each, weights[each["name"]], known) for each in entry["gates"]}
    if len(gates) != len(entry["gates"]):
        raise ValueError("two gates of one name")
    return _condition(entry["when"], gates, [MAX_NODES])


def _when(condition: Condition) -> Any:
    if isinstance(condition, Gate):
        return condition.name
    how, parts = parts_of(condition)
    inner = [_when(part) for part in parts]
    return {how: inner[0] if how == "not" else inner}


def _nodes(condition: Condition) -> Iterator[Condition]:
    yield condition
    if not isinstance(condition, Gate):
        for part in parts_of(condition)[1]:
            yield from _nodes(part)


def _gate_entry(gate: Gate) -> Entry:
    readout, kind = gate.readout, kind_of(gate.readout)
    numbers = {"bias": readout.bias, "on": gate.on, "off": gate.shuts_at}
    numbers |= {"floor": readout.floor} if kind == "latent" else {}
    if not all(map(math.isfinite, numbers.values())):
        got, fix = ", ".join(f"{key} {value}" for key, value in numbers.items()), "Choose finite ones."
        raise ConfigError(f"gate '{gate.name}'", expected="finite thresholds", got=got, fix=fix)
    about = {"min_tokens": gate.min_tokens, "model": gate.model, "calibration": gate.calibration}
    return {"name": gate.name, "kind": kind, "hook_point": str(readout.hook_point), **numbers, **about}


def _gate(entry: Entry, weight: Float[np.ndarray, " d_model"], known: dict[Any, Gate]) -> Gate:
    kind = entry["kind"]
    if kind not in READOUTS:
        raise ValueError(f"a gate of the unknown kind '{kind}'")
    numbers = {key: _finite(entry, key) for key in ("bias", "on", "off")}
    floor = _finite(entry, "floor") if kind == "latent" else -INF
    key = (repr(sorted((name, value) for name, value in entry.items() if name != "weight")), weight.tobytes())
    if key not in known:
        point, vector = HookPoint.parse(_text(entry, "hook_point")), torch.from_numpy(weight)
        readout = Readout(point, vector, numbers["bias"], floor, *READOUTS[kind])
        model, calibration, least = entry["model"], entry["calibration"], entry["min_tokens"]
        if not (isinstance(least, int) and isinstance(calibration, dict) and isinstance(model, str | None)):
            raise TypeError(f"gate '{entry['name']}' with min_tokens, model or calibration of another type")
        known[key] = Gate(readout, numbers["on"], numbers["off"], least, _text(entry, "name"), model, calibration)
    return known[key]


def _finite(entry: Entry, key: str) -> float:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a gate whose {key} is {value!r}")
    return float(value)


def _text(entry: Entry, key: str) -> str:
    if not isinstance(entry[key], str):
        raise TypeError(f"a gate whose {key} is {entry[key]!r}")
    return entry[key]


def _condition(when: Any, gates: Mapping[str, Gate], left: list[int]) -> Condition:
    """Read what `_when` wrote, `left` nodes at most."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"a gate of more than {MAX_NODES} gates and joints")
    if isinstance(when, str):
        return gates[when]
    (how, inner), *more = when.items()
    parts = [inner] if how == "not" else inner
    if (
        more
        or how not in ("and", "or", "not")
        or not isinstance(parts, list)
        or len(parts) != (1 if how == "not" else 2)
    ):
        raise ValueError(f"gates joined by {list(when)}")
    return joined(how, [_condition(part, gates, left) for part in parts])
