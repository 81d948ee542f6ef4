"""`saekit vector`: make steering vectors, choose their dose, measure them.

Thin shells around one library call each, as `steer.cli` has them for the other verbs.
"""

import typer

from steer.config import LearnConfig, VectorConfig
from steer.options import AsJson, ConfigPath, DryRun, Overrides
from steer.show import show

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
def learn(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Learn vectors that stand for a context, and measure how much of it they recover."""
    settings = LearnConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.learn import learn as run

    made = run(settings)
    receipt = {key: value for key, value in made[0].receipts[-1].items() if key not in ("examples", "training")}
    vectors = {each.name: {"coefficient": each.coefficient, "dose": each.dose(each.coefficient)} for each in made}
    show({"library": settings.out, "scope": made[0].scope, "vectors": vectors, **receipt}, json_)
