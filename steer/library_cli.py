"""`saekit library`: what goes out of a library and comes into it. Thin shells around one library call each."""

import typer

from steer.config import BakeConfig, ExportConfig, ImportConfig
from steer.options import AsJson, ConfigPath, DryRun, Overrides
from steer.show import show

app = typer.Typer(help="Move steering vectors between libraries and other projects.", no_args_is_help=True)


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
