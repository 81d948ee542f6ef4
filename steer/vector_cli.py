"""`saekit vector`: make steering vectors, find what to make them from, choose their dose, measure them.

Thin shells around one library call each, as `steer.cli` has them for the other verbs.
"""

from typing import Annotated

import typer

from steer.making.config import (
    CombineConfig,
    FeaturesConfig,
    FindConfig,
    GateConfig,
    LayersConfig,
    LearnConfig,
    VectorConfig,
)
from steer.options import AsJson, ConfigOption, ConfigPath, DryRun, Overrides
from steer.receipts.config import CalibrateConfig, CompareAxisConfig, InterferenceConfig, KitConfig, ScoreConfig
from steer.show import show, status

app = typer.Typer(help="Make steering vectors, choose their dose, and measure what they do.", no_args_is_help=True)


@app.command()
def make(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Make a steering vector from latents, a contrast or an instruction, and measure what it does."""
    settings = VectorConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.making.make import make_vector

    made = make_vector(settings)
    receipt = {key: value for key, value in made.receipts[-1].items() if key not in ("examples", "sweep")}
    show({"name": made.name, "library": settings.out, "source": made.source, **receipt}, json_)


@app.command()
def features(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Make and measure a vector of every labelled feature of a library."""
    settings = FeaturesConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.making.features import steer_features

    made = steer_features(settings)
    rows = {
        each.name: {"coefficient": each.coefficient, **{key: each.receipts[-1][key] for key in ("effect", "kl")}}
        for each in made
    }
    show({"library": settings.out, "made": len(made), "vectors": rows}, json_)


@app.command()
def find(
    text: Annotated[list[str] | None, typer.Argument(help="Text to run; else the config's.")] = None,
    config: ConfigOption = None,
    set_: Overrides = None,
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Find latents that a text makes active; what it prints under `make` is what `make` takes."""
    settings = FindConfig.load(config, set_)
    if text:
        settings = settings.model_copy(update={"text": " ".join(text)})
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.making.find import as_result, command_of, find_latents

    found = find_latents(settings)
    result = as_result(settings, found)
    show(result if json_ else {**result, "make": command_of(found)}, json_)


@app.command()
def combine(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Make a vector from others: add and subtract, one without others, what they share, or what each has alone."""
    settings = CombineConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.making.arithmetic import as_result
    from steer.making.arithmetic import combine as run

    show(as_result(settings, run(settings)), json_)


@app.command()
def layers(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Try a contrast at every layer: how well it is told apart there, what steering there does, and what it costs."""
    settings = LayersConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.making.layers import as_result, sweep_layers

    show({**as_result(sweep_layers(settings)), "out": settings.out}, json_)


@app.command()
def gate(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Give a vector of a library a gate, calibrated on texts where it should open and where it should not."""
    settings = GateConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.making.gate_vector import gate_vector

    show({"library": settings.library, **gate_vector(settings)}, json_)


@app.command()
def calibrate(
    config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False
) -> None:
    """Find between which coefficients a vector works and does no harm, and store its dose."""
    settings = CalibrateConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.receipts.calibrate import calibrate_vector

    calibrated = calibrate_vector(settings, on_status=status)
    receipt = dict(calibrated[-1].receipts[-1])
    receipt["picked"] = {f"{trial['dose']:.3g}": trial for trial in receipt["picked"]}
    show({"name": calibrated[-1].name, "library": settings.library, **receipt}, json_)


@app.command()
def score(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Measure all that a vector does, for good and bad, beside baselines."""
    settings = ScoreConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.receipts.score import laid_out, score_vector

    receipt = score_vector(settings, on_status=status)
    show(receipt if json_ else laid_out(receipt), json_)


@app.command()
def learn(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Learn vectors that stand for a context, and measure how much of it they recover."""
    settings = LearnConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.making.learn import learn as run

    made = run(settings)
    receipt = {key: value for key, value in made[0].receipts[-1].items() if key not in ("examples", "training")}
    vectors = {each.name: {"coefficient": each.coefficient, "dose": each.dose(each.coefficient)} for each in made}
    show({"library": settings.out, "scope": made[0].scope, "vectors": vectors, **receipt}, json_)


@app.command()
def kit(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Measure what the vectors of a kit do together."""
    settings = KitConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.receipts.kit import measure_kit

    receipt = measure_kit(settings).receipts[-1]
    show({"kit": settings.kit, **{key: value for key, value in receipt.items() if key != "examples"}}, json_)


@app.command()
def interference(
    config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False
) -> None:
    """Measure how many vectors can be used at once before concepts fade or text falls apart."""
    settings = InterferenceConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.receipts.interference import interference as measure

    result = measure(settings, on_status=status)
    if json_:
        return show({"out": settings.out, **result}, json_)
    curves = {arm: {f"{k} axes": row for k, row in found["curve"].items()} for arm, found in result["arms"].items()}
    show({"report": settings.out / "interference.html", "verdicts": result["verdicts"]}, json_)
    show({"pairs": result["composition"]["pairs"], "vectors": result["vectors"], **curves}, json_)


@app.command()
def compare(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Compare a vector with asking in words, with examples and with a fine-tune, along whole axes."""
    settings = CompareAxisConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.receipts.compare import compare as compare_axes
    from steer.receipts.compare import table

    results = compare_axes(settings, on_status=status)
    show({"report": str(settings.out / "report.html"), **(results if json_ else table(results))}, json_)
