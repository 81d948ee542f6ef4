"""`saekit vector`: make steering vectors, choose their dose, measure them.

Thin shells around one library call each, as `steer.cli` has them for the other verbs.
"""

import typer

from steer.config import InterferenceConfig, VectorConfig
from steer.options import AsJson, ConfigPath, DryRun, Overrides
from steer.show import show, status

app = typer.Typer(help="Make steering vectors, choose their dose, and measure what they do.", no_args_is_help=True)


@app.command()
def make(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Make a steering vector from a latent or a contrast, and measure what it does."""
    settings = VectorConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.make import make_vector

    made = make_vector(settings)
    receipt = {key: value for key, value in made.receipts[-1].items() if key not in ("examples", "sweep")}
    show({"name": made.name, "library": settings.out, "source": made.source, **receipt}, json_)


@app.command()
def interference(
    config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False
) -> None:
    """Measure how many vectors can be used at once before concepts fade or text falls apart."""
    settings = InterferenceConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.interference import interference as measure

    result = measure(settings, on_status=status)
    if json_:
        return show({"out": settings.out, **result}, json_)
    curves = {arm: {f"{k} axes": row for k, row in found["curve"].items()} for arm, found in result["arms"].items()}
    show({"report": settings.out / "interference.html", "verdicts": result["verdicts"]}, json_)
    show({"pairs": result["composition"]["pairs"], "vectors": result["vectors"], **curves}, json_)
