"""`saekit vector`: make steering vectors, choose their dose, measure them.

Thin shells around one library call each, as `steer.cli` has them for the other verbs.
"""

import typer

from steer.config import CompareAxisConfig, VectorConfig
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
def compare(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Compare a vector with asking in words, with examples and with a fine-tune, along whole axes."""
    settings = CompareAxisConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.compare import compare as compare_axes
    from steer.compare import table

    results = compare_axes(settings, on_status=status)
    show({"report": str(settings.out / "report.html"), **(results if json_ else table(results))}, json_)
