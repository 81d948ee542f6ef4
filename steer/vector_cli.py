"""`saekit vector`: make steering vectors, choose their dose, measure them.

Thin shells around one library call each, as `steer.cli` has them for the other verbs.
"""

import typer

from steer.config import CalibrateConfig, ScoreConfig, VectorConfig
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
def calibrate(
    config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False
) -> None:
    """Find between which coefficients a vector works and does no harm, and store its dose."""
    settings = CalibrateConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.calibrate import calibrate_vector

    calibrated = calibrate_vector(settings, on_status=status)
    receipt = dict(calibrated.receipts[-1])
    receipt["picked"] = {f"{trial['dose']:.3g}": trial for trial in receipt["picked"]}
    show({"name": calibrated.name, "library": settings.library, **receipt}, json_)


@app.command()
def score(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Measure all that a vector does, for good and bad, beside baselines."""
    settings = ScoreConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.score import laid_out, score_vector

    receipt = score_vector(settings, on_status=status)
    show(receipt if json_ else laid_out(receipt), json_)
