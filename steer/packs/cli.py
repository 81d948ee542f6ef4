"""The verbs of `saekit library` that move packs: thin shells around one library call each."""

from typing import Annotated, Any

import typer

from steer.options import AsJson, ConfigOption, ConfigPath, DryRun, Overrides
from steer.packs.config import (
    InstallConfig,
    KeyConfig,
    ListConfig,
    PublishConfig,
    RemoveConfig,
    SearchConfig,
    TrustConfig,
    VerifyConfig,
)
from steer.show import show, status

app = typer.Typer()


@app.command()
def publish(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Write a library into a catalogue, an archive or the Hugging Face hub, signed if you have a key."""
    settings = PublishConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.packs.publish import publish as run

    show(run(settings), json_)


@app.command()
def install(
    pack: Annotated[
        str | None, typer.Argument(help="NAME[@VERSION], an archive, an address, a directory, or hub:ORG/NAME.")
    ] = None,
    config: ConfigOption = None,
    set_: Overrides = None,
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Get a library, check it, and keep it under its name, by which it is found from then on."""
    settings = InstallConfig.load(config, set_)
    if pack is not None:
        settings = settings.model_copy(update={"pack": pack})
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.packs.install import install as run

    done = run(**settings.model_dump(), on_status=status)
    show({**done._asdict(), "signed": str(done.signed), "index_signed": str(done.index_signed or "none")}, json_)


@app.command()
def remove(
    pack: Annotated[str | None, typer.Argument(help="NAME[@VERSION] of an installed pack.")] = None,
    config: ConfigOption = None,
    set_: Overrides = None,
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Take an installed library away; those that come with saekit stay."""
    settings = RemoveConfig.load(config, set_)
    if pack is not None:
        settings = settings.model_copy(update={"pack": pack})
    from steer.packs.remove import find_installed
    from steer.packs.remove import remove as run

    if dry_run:
        found = find_installed(settings.pack)
        return show({"config": settings.model_dump(mode="json"), "path": found.path}, json_)
    show(run(settings.pack)._asdict(), json_)


@app.command()
def search(
    words: Annotated[list[str] | None, typer.Argument(help="What to look for; all packs without.")] = None,
    config: ConfigOption = None,
    set_: Overrides = None,
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Find libraries in a catalogue by their names, labels and summaries, or by the model that they are for."""
    settings = SearchConfig.load(config, set_)
    if words:
        settings = settings.model_copy(update={"words": " ".join(words)})
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.packs.catalogue import search_catalogue

    show(search_catalogue(settings, status), json_)


@app.command()
def verify(
    pack: Annotated[str | None, typer.Argument(help="A directory, an archive, or NAME[@VERSION].")] = None,
    config: ConfigOption = None,
    set_: Overrides = None,
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Compare every file of a library with its hash, and say who signed it."""
    settings = VerifyConfig.load(config, set_)
    if pack is not None:
        settings = settings.model_copy(update={"pack": pack})
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.packs.install import verify as run
    from steer.packs.names import about_of

    manifest, signed = run(**settings.model_dump(), on_status=status)
    about = about_of(settings.pack, manifest)
    named = {"name": about.name, "version": about.version, "content_sha256": manifest["content_sha256"]}
    show({**named, "files": len(manifest["files"]), "signed": str(signed)}, json_)


@app.command()
def key(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Make a private key to sign libraries with, and print what others need to know of it."""
    settings = KeyConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.packs.keys import fingerprint, make_key, public_text

    made = make_key(settings.out, ask=settings.passphrase)
    show({"out": settings.out, "public_key": public_text(made), "fingerprint": fingerprint(made)}, json_)


@app.command()
def trust(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Say whose signatures you believe; without a name, show them."""
    settings = TrustConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.packs.keys import change_trust, fingerprint, public_text

    known = change_trust(settings)
    rows = {name: {"fingerprint": fingerprint(each), "public_key": public_text(each)} for name, each in known.items()}
    show({"trusted": rows}, json_)


@app.command("list")
def list_(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Show which libraries are installed, or which a catalogue has."""
    settings = ListConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    result: dict[str, Any]
    if settings.catalogue is None:
        from steer.packs.listing import describe_installed

        result = describe_installed()
    else:
        from steer.packs.catalogue import describe_catalogue

        result = describe_catalogue(settings.catalogue)
    show(result, json_)
