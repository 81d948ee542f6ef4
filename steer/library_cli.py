"""`saekit library`: what goes out of a library and comes into it. Thin shells around one library call each."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.config import AddConfig, BakeConfig, ExportConfig, ImportConfig, InitConfig, MergeConfig
from steer.options import AsJson, ConfigPath, DryRun, Overrides
from steer.packs.cli import app as packs_app
from steer.show import show

if TYPE_CHECKING:
    from steer.library import Library

app = typer.Typer(help="Make, share and compare libraries of steering vectors.", no_args_is_help=True)
app.registered_commands += packs_app.registered_commands


@app.command()
def init(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Give a library a name, a version and a licence, so that it can be published."""
    settings = InitConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.library_edit import init as run

    show({"library": settings.library, **run(settings).about.model_dump()}, json_)


@app.command()
def add(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Add vectors of another library, an SAE, labelled features, or a kit of vectors that are used together."""
    settings = AddConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.library_edit import add as run

    show({"library": settings.library, **_counts(run(settings))}, json_)


@app.command()
def merge(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Join the vectors, features and kits of several libraries."""
    settings = MergeConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.library_edit import merge as run

    show({"library": settings.out, **_counts(run(settings))}, json_)


@app.command()
def diff(
    library: Annotated[Path, typer.Argument(help="A library.")],
    other: Annotated[Path, typer.Argument(help="Another, such as a later version.")],
    json_: AsJson = False,
) -> None:
    """Say which vectors, features and kits were added, removed or changed."""
    from steer.library_edit import difference

    found = difference(library, other)
    plain = {f"{kind} {what}": ", ".join(names) or "-" for kind, each in found.items() for what, names in each.items()}
    show(found if json_ else plain, json_)


@app.command("show")
def show_(
    library: Annotated[Path, typer.Argument(help="A library.")],
    name: Annotated[str | None, typer.Argument(help="A vector, a kit or the number of a latent; all without.")] = None,
    json_: AsJson = False,
) -> None:
    """Show what a library holds, or one vector, kit or feature of it."""
    from steer.library_edit import shown

    show(shown(library, name), json_)


@app.command()
def export(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Write a vector as a file for llama.cpp, ds4, lm-eval, hotwire, Neuronpedia and others."""
    settings = ExportConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.exchange import export_vectors

    result = export_vectors(settings)
    show(
        result if json_ else result | {"vectors": ", ".join(result["vectors"]), "use": "\n".join(result["use"])}, json_
    )


@app.command("import")
def import_(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Add the vectors of a file of another project to a library."""
    settings = ImportConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.exchange import import_vectors

    made = import_vectors(settings)
    rows = {
        each.name: {"hook_point": each.hook_point, "operation": each.operation, "coefficient": each.coefficient,
                    "scope": each.scope, "dose": each.dose(each.coefficient),
                    **{key: each.source[key] for key in ("made_on",) if key in each.source}}
        for each in made
    }  # fmt: skip
    show({"library": settings.out, "vectors": rows}, json_)


@app.command()
def bake(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Write a vector as weights, a LoRA or an edited copy of the model, that do exactly what steering does."""
    settings = BakeConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.baking.bake import bake as bake_vectors
    from steer.baking.bake import summary

    receipt = bake_vectors(settings)
    show(receipt if json_ else summary(receipt, settings.out), json_)


def _counts(library: "Library") -> dict[str, Any]:
    return {"vectors": len(library.vectors), "features": len(library.features), "kits": len(library.kits)}
