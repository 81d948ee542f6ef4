"""What is done with libraries as a whole: named, filled, joined and compared.

Each function reads libraries, puts another together, and writes it in one go; what is refused changes nothing.

Left out: making vectors (`steer.making`) and moving libraries (`steer.packs`).
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from activations.errors import ConfigError, MismatchError, MissingArtefactError, UnknownNameError
from sae.artefact import CONFIG, PROVENANCE, WEIGHTS, Dtype, SaeArtefact, file_sha256
from sae.checked_files import safetensors_heads
from sae.index_db import FeatureIndex
from steer.config import AddConfig, InitConfig, MergeConfig
from steer.library import Library
from steer.library_entries import entry_of_vector
from steer.making.features import features_of, read_labels
from steer.manifest import SAE
from steer.pack import Feature, FileRef, Kit, SaeRef


def init(config: InitConfig) -> Library:
    """Name the library at `config.library`, which is made if it is not there; keys that are not given stay."""
    library = Library.open_or_new(config.library)
    given = config.model_dump(exclude={"library"}, exclude_none=True)
    library = replace(library, about=library.about.model_copy(update=given))
    library.save(config.library)
    return library


def add(config: AddConfig) -> Library:
    """Add vectors, features, an SAE or a kit, as `config` has it, to the library at `config.library`.

    Raises: ConfigError if nothing is to be added, MismatchError for what belongs to another SAE, UnknownNameError.
    """
    library = Library.open_or_new(config.library)
    if config.sae is None and config.features is None and config.vectors is None and config.kit is None:
        expected = "vectors, sae, features or kit"
        raise ConfigError("saekit library add", expected=expected, got="none", fix="Say what to add.")
    if config.vectors is not None:
        source = Library.open(config.vectors)
        found = {
            each.name: each for name in config.names or source.vectors for each in source.find(config.vectors, name)
        }
        library = replace(library, vectors=library.vectors | found)
    artefact = None if config.sae is None else _checked_sae(library, config.sae)
    if artefact is not None and config.sae is not None:
        library = replace(library, sae=_sae_ref(artefact, config.sae, embedded=config.embed), attached={})
    if config.features is not None:
        library = _with_features(library, config.features, config.index)
    if config.kit is not None:
        kit = Kit(name=config.kit, summary=config.summary, vectors=config.of)
        library = replace(library, kits=[each for each in library.kits if each.name != kit.name] + [kit])
    library.check()
    if artefact is not None and config.sae is not None and config.embed:  # last, since it writes
        attached = _embedded(artefact, config.library / SAE, _kept_dtype(config.sae))
        library = replace(library, attached=attached)
    return _saved(library, config.library)


def merge(config: MergeConfig) -> Library:
    """All vectors, features and kits of several libraries in one; the first names it, and has the SAE.

    Raises: ConfigError for two things of one name that differ, MismatchError for features of different SAEs.
    """
    libraries = [Library.open(path) for path in config.libraries]
    merged = Library.open_or_new(config.out)
    for path, library in zip(config.libraries, libraries, strict=True):
        _check_same(path, "vector", {n: v.sha256 for n, v in merged.vectors.items()},
                    {n: v.sha256 for n, v in library.vectors.items()}, config.replace)  # fmt: skip
        kits, features = _by_name(merged.kits), _by_latent(merged.features)
        _check_same(path, "kit", kits, _by_name(library.kits), config.replace)
        _check_same(path, "feature", features, _by_latent(library.features), config.replace)
        if library.sae is not None and merged.sae is not None and library.sae.sha256 != merged.sae.sha256:
            fix = "Keep them in libraries of their own."
            raise MismatchError(path, expected="features of the same SAE", got="those of another", fix=fix)
        merged = replace(
            merged,
            about=merged.about if merged.about.name else library.about,
            vectors=merged.vectors | library.vectors,
            kits=list((kits | _by_name(library.kits)).values()),
            features=list((features | _by_latent(library.features)).values()),
            sae=merged.sae or (library.sae and library.sae.model_copy(update={"dtype": None})),
        )
    return _saved(merged, config.out)


def difference(path: Path, other: Path) -> dict[str, dict[str, list[str]]]:
    """What two libraries do not share: of vectors, features and kits the names that were added, removed and changed."""
    old, new = _parts(Library.open(path)), _parts(Library.open(other))
    return {
        kind: {
            "added": sorted(new[kind].keys() - old[kind].keys()),
            "removed": sorted(old[kind].keys() - new[kind].keys()),
            "changed": sorted(
                name for name in old[kind].keys() & new[kind].keys() if old[kind][name] != new[kind][name]
            ),
        }
        for kind in old
    }


def shown(path: Path, name: str | None) -> dict[str, Any]:
    """A library in short, or one vector, kit or feature (by its latent) whole, without what is only for machines.

    Raises: UnknownNameError listing the names there are.
    """
    library = Library.open(path)
    if name is None:
        return {
            **library.about.model_dump(),
            "vectors": {
                each.name: {"hook_point": each.hook_point, "operation": each.operation, "coefficient": each.coefficient,
                            "dose": each.dose(each.coefficient), "receipts": len(each.receipts)}
                for each in library.vectors.values()
            },
            "features": {str(each.latent): each.label for each in library.features},
            "kits": {each.name: each.vectors for each in library.kits},
            "sae": None if library.sae is None else library.sae.model_dump(),
        }  # fmt: skip
    parts = _parts(library)
    for kind in parts.values():
        if name in kind:
            return kind[name]
    expected = f"one of {', '.join(each for kind in parts.values() for each in kind)}"
    raise UnknownNameError(f"{path}: '{name}'", expected=expected, got=f"'{name}'", fix="Correct the name.")


def _saved(library: Library, path: Path) -> Library:
    """With vectors in order of their names."""
    library = replace(library, vectors={name: library.vectors[name] for name in sorted(library.vectors)})
    library.save(path)
    return library


def _checked_sae(library: Library, path: Path) -> SaeArtefact:
    artefact = SaeArtefact.load(path)
    if library.features and library.sae is not None and artefact.sha256 != library.sae.sha256:
        fix = "Make another library of its features."
        raise MismatchError(path, expected="the SAE of the library's features", got="another", fix=fix)
    if artefact.sha256 is None:
        fix = "Save it with saekit convert first."
        raise MismatchError(path, expected="an SAE that saekit wrote", got="one without a hash", fix=fix)
    if "hook_point" not in artefact.metadata or not {"id", "fingerprint"} <= artefact.metadata.get("model", {}).keys():
        fix = "Take one that was trained with saekit, or write hook_point and model into its saekit.json."
        raise MismatchError(path, expected="an SAE that says of which model and place it is", got="less", fix=fix)
    return artefact


def _embedded(artefact: SaeArtefact, target: Path, dtype: Dtype) -> dict[str, FileRef]:
    """Write the SAE into a library, and give its files as the manifest names them."""
    artefact.save(target, dtype)
    return {
        f"{SAE}/{name}": FileRef(bytes=(target / name).stat().st_size, sha256=file_sha256(target / name))
        for name in (CONFIG, WEIGHTS, PROVENANCE)
    }


def _sae_ref(artefact: SaeArtefact, path: Path, *, embedded: bool) -> SaeRef:
    """What a library says of an SAE."""
    metrics = artefact.metadata.get("metrics", {})
    return SaeRef(
        sha256=str(artefact.sha256),
        architecture=artefact.saved_name,
        d_model=artefact.d_model,
        d_sae=artefact.d_sae,
        hook_point=artefact.metadata["hook_point"],
        model_id=artefact.metadata["model"]["id"],
        model_fingerprint=artefact.metadata["model"]["fingerprint"],
        fvu=metrics.get("fvu"),
        l0=metrics.get("l0"),
        dtype=_kept_dtype(path) if embedded else None,
    )


def _kept_dtype(path: Path) -> Dtype:
    return "float16" if safetensors_heads(path / WEIGHTS)["W_dec"].dtype == "F16" else "float32"


def _with_features(library: Library, labels: Path, index: Path) -> Library:
    if library.sae is None:
        fix = "Add it with --set sae=… first."
        raise MissingArtefactError("library", expected="the SAE of the features", got="none", fix=fix)
    with closing(FeatureIndex.open(index)) as opened:
        if opened.info.get("sae_sha256") != library.sae.sha256:
            fix = "Build the index again with this SAE."
            raise MismatchError(index, expected="an index of the library's SAE", got="one of another", fix=fix)
        found = _by_latent(library.features) | _by_latent(features_of(opened, read_labels(labels)))
        sae = library.sae.model_copy(update={"n_layers": opened.info["model"]["n_layers"]})
    return replace(library, features=list(found.values()), sae=sae)


def _by_name(kits: list[Kit]) -> dict[str, Kit]:
    return {kit.name: kit for kit in kits}


def _by_latent(features: list[Feature]) -> dict[str, Feature]:
    return {str(feature.latent): feature for feature in features}


def _check_same(path: Path, what: str, known: dict[str, Any], new: dict[str, Any], may_replace: bool) -> None:
    for name in known.keys() & new.keys():
        if known[name] != new[name] and not may_replace:
            fix = "Rename one, or add --set replace=true to keep the later."
            raise ConfigError(f"{path}: {what} '{name}'", expected="the one there is", got="another", fix=fix)


def _parts(library: Library) -> dict[str, dict[str, Any]]:
    vectors = {name: entry_of_vector(each, {}) | {"sha256": each.sha256} for name, each in library.vectors.items()}
    return {
        "vectors": vectors,
        "features": {name: each.model_dump(mode="json") for name, each in _by_latent(library.features).items()},
        "kits": {name: each.model_dump(mode="json") for name, each in _by_name(library.kits).items()},
    }
