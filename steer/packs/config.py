"""What the verbs of `saekit library` that move packs read."""

from pathlib import Path

from pydantic import Field

from activations.config import Config

RUNS_CATALOGUE = "runs/catalogue"


class PublishConfig(Config):
    """A pack, written where others can get it."""

    library: str = Field(
        default="runs/library",
        description="library with a name and a version; or the NAME[@VERSION] of an installed one",
    )
    to: str = Field(
        default=RUNS_CATALOGUE,
        min_length=1,
        description="a folder to be a catalogue, a file NAME-VERSION.tar.zst, or hub:ORG/NAME[@BRANCH]",
    )
    key: Path | None = Field(
        default=None,
        description="private key to sign with, and the index of a catalogue; none: the library's signature goes along",
    )


class InstallConfig(Config):
    """A pack, got from somewhere and checked."""

    pack: str = Field(
        default="runs/library",
        min_length=1,
        description="NAME or NAME@VERSION of the catalogue, path or address of an archive, a directory, or "
        "hub:ORG/NAME[@REVISION]",
    )
    catalogue: str | None = Field(
        default=None, description="folder or address of the catalogue that NAME is looked up in; none: no names"
    )
    model: str | None = Field(
        default=None, description="model spec: refuse a pack that has nothing for these weights; none: any"
    )
    require_signature: bool = Field(default=False, description="refuse what no trusted key has signed")


class RemoveConfig(Config):
    """An installed pack that is to go."""

    pack: str = Field(default="NAME", min_length=1, description="NAME, or NAME@VERSION if several are installed")


class SearchConfig(Config):
    """Packs of a catalogue, found by words."""

    catalogue: str = Field(default=RUNS_CATALOGUE, min_length=1, description="folder or address of the catalogue")
    words: str = Field(
        default="", description="words that all have to be in names, labels or the summary; none: all packs match"
    )
    model: str | None = Field(
        default=None,
        description="model spec, or the first digits of a fingerprint: packs that have something for these weights",
    )


class VerifyConfig(Config):
    """A pack, checked file by file where it lies."""

    pack: str = Field(
        default="runs/library",
        min_length=1,
        description="a directory, an archive, or NAME[@VERSION] of an installed pack",
    )
    model: str | None = Field(
        default=None, description="model spec: refuse a pack that has nothing for these weights; none: any"
    )
    require_signature: bool = Field(default=False, description="refuse what no trusted key has signed")


class KeyConfig(Config):
    """A key to sign packs with."""

    out: Path = Field(default=Path("saekit.key"), description="file to write; nothing may be there yet")
    passphrase: bool = Field(
        default=False,
        description="ask for a passphrase; without, the one in SAEKIT_KEY_PASSPHRASE is used, if it is set",
    )


class TrustConfig(Config):
    """Whose signatures are believed."""

    name: str | None = Field(default=None, description="whose key it is; none: show the keys that are trusted")
    key: str | None = Field(default=None, description="public key, as saekit library key prints it")
    remove: bool = Field(default=False, description="believe the key of that name no longer")


class ListConfig(Config):
    """Packs that are installed, or those of a catalogue."""

    catalogue: str | None = Field(
        default=None, description="folder or address of a catalogue; none: what is installed on this machine"
    )
