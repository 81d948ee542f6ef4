"""`saekit library`: what goes out of a library and comes into it. Thin shells around one library call each."""

import typer

from steer.config import ExportConfig, ImportConfig
from steer.options import AsJson, ConfigPath, DryRun, Overrides
from steer.packs.cli import app as packs_app
from steer.show import show

app = typer.Typer(help="Share libraries, and move steering vectors to other projects and back.", no_args_is_help=True)
app.registered_commands += packs_app.registered_commands


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
                    "dose": each.dose(each.coefficient)}
        for each in made
    }  # fmt: skip
    show({"library": settings.out, "vectors": rows}, json_)
