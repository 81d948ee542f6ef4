"""Packs on the Hugging Face hub: one repository a pack, its files at the top.

    hub:ORG/NAME[@REVISION]   REVISION is a branch, a tag or a commit; main without one

Pushing is one commit of all files, so that nobody ever sees half of it, and takes a signature away that is no longer
there. Pulling: 1. the revision becomes a commit, so that nothing changes on the way; 2. sizes are asked for, and the
manifest is fetched if it is of a size to read; 3. the files that it lists, and no others, are fetched into the hub's
cache, if their sizes are those listed; 4. they are copied out of it, as from any directory that nobody vouches for.

The token is the one of the environment (`HF_TOKEN`) or of `hf auth login`; it is not looked at here. Left out: private
or public, which an organisation's settings decide, pull requests, and the hub's own card metadata.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from activations.errors import ConfigError, EndpointError, MissingArtefactError, SaekitError
from activations.quiet import first_line
from sae.checked_files import JSON_BYTES
from steer.manifest import MANIFEST, SIGNATURE, parse_manifest
from steer.packs.contents import SIGNATURE_BYTES, copy_pack, damaged, declared_files, read_small
from steer.packs.names import name_of, printable

HUB = "hub:"
_SPEC = re.compile(r"hub:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


class HubPlace(NamedTuple):
    """A repository of the hub, and what of it."""

    repo: str
    revision: str | None


def parse_hub(spec: str) -> HubPlace:
    """The repository that hub:ORG/NAME[@REVISION] stands for. Raises: ConfigError."""
    found = _SPEC.fullmatch(spec)
    if found is None:
        fix = "Correct it."
        raise ConfigError(f"'{printable(spec)}'", expected="hub:ORG/NAME[@REVISION]", got="another text", fix=fix)
    return HubPlace(found["repo"], found["revision"])


def push(directory: Path, spec: str, staged: Path, signature: bytes | None = None) -> str:
    """Push the pack in `directory` to the hub as one commit, and return the commit.

    Args:
      staged: an empty folder, which a checked copy is made in.
      signature: content of its signature.json; None: that of the directory, if it has one.
    Raises: CorruptArtefactError for a damaged pack; EndpointError if the hub refuses.
    """
    place = parse_hub(spec)
    manifest = copy_pack(directory, staged / "pack")
    name, version = name_of(directory, manifest)
    if signature is not None:
        (staged / "pack" / SIGNATURE).write_bytes(signature)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, revision = HfApi(), place.revision or "main"
    files = [file for file in (MANIFEST, SIGNATURE, *manifest["files"]) if (staged / "pack" / file).is_file()]
    adds = [CommitOperationAdd(file, staged / "pack" / file) for file in files]
    with _explained(spec):
        api.create_repo(place.repo, exist_ok=True)
        is_stale = SIGNATURE not in files and api.file_exists(place.repo, SIGNATURE, revision=revision)
        gone = [CommitOperationDelete(SIGNATURE)] if is_stale else []
        return api.create_commit(place.repo, [*adds, *gone], commit_message=f"{name} {version}", revision=revision).oid


def pull(spec: str, target: Path, on_status: Callable[[str], None]) -> dict[str, Any]:
    """Copy a pack from the hub into the new folder `target`, checked, and return its manifest.

    Raises: MissingArtefactError if there is no such repository or revision, or no pack in it; EndpointError if the hub
      does not answer; CorruptArtefactError for a damaged pack.
    """
    place = parse_hub(spec)
    on_status(f"fetching {place.repo} from the Hugging Face hub, unless it is here already")
    with _explained(spec):
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download

        about = HfApi().model_info(place.repo, revision=place.revision, files_metadata=True)
        sizes = {file.rfilename: file.size for file in about.siblings or ()}
        _check_sizes(spec, sizes)
        manifest = read_small(Path(hf_hub_download(place.repo, MANIFEST, revision=about.sha)), JSON_BYTES)
        declared = declared_files(spec, parse_manifest(spec, manifest or b""))
        for name, (size, _) in declared.items():
            if sizes.get(name) != size:
                raise damaged(f"{spec}: {name}", f"{size} bytes, as the manifest lists", f"{sizes.get(name)}")
        names = [MANIFEST, *([SIGNATURE] if SIGNATURE in sizes else []), *declared]
        folder = Path(snapshot_download(place.repo, revision=about.sha, allow_patterns=names))
    return copy_pack(folder, target, follow_links=True)


def _check_sizes(spec: str, sizes: dict[str, int | None]) -> None:
    if MANIFEST not in sizes:
        fix = "Check the name and the revision."
        raise MissingArtefactError(spec, expected="a pack", got=f"a repository without {MANIFEST}", fix=fix)
    for name, limit in ((MANIFEST, JSON_BYTES), (SIGNATURE, SIGNATURE_BYTES)):
        if (size := sizes.get(name, 0)) is None or size > limit:
            raise damaged(f"{spec}: {name}", f"at most {limit} bytes", f"{size}")


@contextmanager
def _explained(spec: str) -> Iterator[None]:
    """Errors of the hub as those of this project."""
    import httpx2
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except SaekitError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        fix = "Check the name, and `hf auth login` if it is private."
        got = printable(first_line(error))[:200]
        raise MissingArtefactError(spec, expected="a repository that you may read", got=got, fix=fix) from error
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        fix = "Check the network, and `hf auth login`; then run the same command again."
        got = printable(first_line(error))[:200]
        raise EndpointError(spec, expected="a hub that answers", got=got, fix=fix) from error
