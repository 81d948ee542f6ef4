"""The `saekit` command: one verb a stage, each a thin shell around one library call.

Every verb reads CONFIG.yaml and `--set key.path=value`, prints a summary or, with `--json`, one JSON object on standard
output, and with `--dry-run` only says what it would do. Exit code 0 is success, 1 an error of the project's own in one
line, 2 wrong usage. Heavy imports sit inside the verbs, so that `saekit --help` answers at once.
"""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import typer

from activations.config import HarvestConfig
from activations.errors import SaekitError
from sae.config import CompareConfig, EvaluateConfig, IndexConfig, TrainConfig
from sae.labels.config import LabelConfig
from steer.browser.config import BrowseConfig
from steer.config import ChatConfig, DemoConfig
from steer.library_cli import app as library_app
from steer.options import (
    AsJson,
    ConfigOption,
    ConfigPath,
    DryRun,
    OnRay,
    Overrides,
    RayAddress,
    RayGpus,
    RayProcesses,
    ray_address_of,
    ray_overrides,
)
from steer.packs.names import printable
from steer.serving.config import ServeConfig
from steer.show import show, status
from steer.uncollected import uncollected
from steer.vector_cli import app as vector_app

PROBE_S = 3.0
"""seconds of forward passes that a dry run of `harvest` times"""
TYPER_STOPPED = 130
"""what typer turns Ctrl-C into"""

app = typer.Typer(
    name="saekit",
    help="Find features in a language model with sparse autoencoders, and steer the model with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(vector_app, name="vector")
app.add_typer(library_app, name="library")


@app.command()
def harvest(
    config: ConfigPath = None,
    set_: Overrides = None,
    keep_tokens: Annotated[
        int | None,
        typer.Option("--keep-tokens", min=1, help="Ring mode: positions on disk at most, a trainer following."),
    ] = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Run text through a model and keep its residual stream."""
    ring = [] if keep_tokens is None else [f"keep_tokens={keep_tokens}"]
    settings = HarvestConfig.load(config, [*(set_ or []), *ring, *ray_overrides(ray, ray_address)])
    if dry_run:
        from activations.harvest import store_meta
        from activations.models import load_model
        from activations.plan import plan

        loaded = load_model(settings.model, device=settings.device, dtype=settings.compute_dtype, on_status=status)
        planned = plan(settings, loaded, store_meta(settings, loaded), probe_s=PROBE_S)
        return show({"config": settings.model_dump(mode="json"), **planned._asdict()}, json_)
    from activations.harvest import harvest as run

    result = run(settings, on_status=status)
    show({**result._asdict(), "tok_s": result.tok_s}, json_)


@app.command()
def train(
    config: ConfigPath = None,
    set_: Overrides = None,
    finetune: Annotated[
        Path | None, typer.Option("--finetune", help="Start from this SAE, in any form that convert reads.")
    ] = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    ray_processes: RayProcesses = None,
    ray_gpus: RayGpus = None,
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Fit sparse autoencoders to an activation store, one a hook point or a sweep of them."""
    cluster = ray_address_of(ray, ray_address)
    if cluster is None and (ray_processes or ray_gpus) is not None:
        raise typer.BadParameter("--ray-processes and --ray-gpus need --ray or --ray-address")
    initial = [] if finetune is None else [f"finetune={json.dumps(str(finetune))}"]
    settings = TrainConfig.load(config, [*(set_ or []), *initial])
    if dry_run:
        from sae.plan import plan

        planned = plan(settings)
        figures = planned.figures() if planned else {}
        return show({"config": settings.model_dump(mode="json"), **figures}, json_)
    if cluster is not None:
        from steer.launch import launch

        sets = [word for setting in [*(set_ or []), *initial] for word in ("--set", setting)]
        words = [*([] if config is None else [str(config)]), *sets]
        return show(launch(words, cluster, ray_processes, ray_gpus, on_status=status), json_)
    from sae.train import train as run

    result = run(settings)
    saes = {name: {"path": sae.path, **sae.metrics} for name, sae in result.saes.items()}
    show({"steps": result.n_steps, "resumed_from": result.resumed_from, "saes": saes}, json_)


@app.command()
def evaluate(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Score an SAE on held-out text, also inside the model."""
    settings = EvaluateConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from sae.evaluate import evaluate as run
    from sae.evaluation.report import tables

    result = run(settings)
    report = {"report": settings.sae / "evaluation.html"}
    show(result if json_ else report | {table.title: table.rows for table in tables(result)}, json_)


@app.command()
def index(
    config: ConfigPath = None,
    set_: Overrides = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Find out what each latent responds to, and keep it in a database."""
    settings = IndexConfig.load(config, [*(set_ or []), *ray_overrides(ray, ray_address)])
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from sae.index import build_index

    show({"path": build_index(settings)}, json_)


@app.command()
def label(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Say what latents stand for, with a language model's help and without, and score what was said."""
    settings = LabelConfig.load(config, set_)
    from sae.label import estimate
    from sae.label import label as run
    from sae.labels.report import tables

    if dry_run:
        planned = estimate(settings, on_status=status)
        return show({"config": settings.model_dump(mode="json"), **planned}, json_)
    result = run(settings, on_status=status)
    show(result if json_ else tables(result), json_)


@app.command()
def browse(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Indexes, libraries, or folders that hold some; runs/demo without.")
    ] = None,
    config: ConfigOption = None,
    set_: Overrides = None,
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Look at features in a web browser: what they respond to, say and do."""
    given = [f"paths={json.dumps([str(path) for path in paths])}"] if paths else []
    settings = BrowseConfig.load(config, [*(set_ or []), *given])
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    if settings.export is not None:
        from steer.browser.export import export_site
        from steer.browser.sources import open_paths

        with closing(open_paths(settings.paths)) as opened:
            return show(export_site(opened, settings.export, settings.latents), json_)
    with uncollected():
        from steer.browser.serve import browse as run

    run(settings, as_json=json_)


@app.command()
def chat(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompt; without one, a conversation on the terminal.")
    ] = None,
    config: ConfigOption = None,
    set_: Overrides = None,
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Talk to a model, steered by vectors of a library; without a prompt, with commands that change what steers."""
    settings = ChatConfig.load(config, set_)
    if json_ and not (prompt or dry_run):
        raise typer.BadParameter("--json needs a prompt")
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.chat.session import Chat, summary

    session = Chat(settings, on_status=status)
    if prompt:
        text, steering = " ".join(prompt), summary(session.state)
        return show({"prompt": text, "vectors": steering, "answer": session.answer(text)}, json_, plain="answer")
    from steer.chat.terminal import converse

    converse(session)


@app.command()
def serve(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Answer OpenAI-compatible requests, each steered as it asks."""
    settings = ServeConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.serving.serve import serve as run

    run(settings, as_json=json_, on_status=status)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The directory of an SAE, in any of the formats.")],
    target: Annotated[Path, typer.Argument(help="Where to write it; nothing may be there yet.")],
    to: Annotated[
        str,
        typer.Option("--to", help="saekit, saelens, sparsify, dictionary_learning, gemma_scope or gemma_scope_2."),
    ] = "saekit",
    from_: Annotated[str | None, typer.Option("--from", help="Format of the source; found out without it.")] = None,
    hook_point: Annotated[
        str | None,
        typer.Option("--hook-point", metavar="SITE.LAYER", help="What it reads; A->B for a transcoder."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option("--dtype", help="What the weights are kept in, to saekit.")
    ] = "float32",
    json_: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Bring an SAE from one project's format into another's."""
    from sae.formats.convert import convert as run

    show(run(source, target, to, from_, hook_point, dry_run, dtype), json_)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A store (also s3://BUCKET/PREFIX), SAE, feature index or library.")],
    other: Annotated[
        Path | None, typer.Argument(help="Another SAE, index or run to compare with; see --set store.")
    ] = None,
    latent: Annotated[int | None, typer.Option(help="Show this latent of a feature index.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read a store whole, and compare every checksum.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write all latents of an index, or pairs of two SAEs: .parquet, .jsonl or .csv."),
    ] = None,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Say what an artefact is and holds, or how two SAEs compare."""
    if other is None and set_:
        raise typer.BadParameter("--set is for comparing two SAEs")
    if (other or out) and (verify or latent is not None):
        raise typer.BadParameter("--latent and --verify are for looking at one artefact")
    if other is not None:
        from sae.compare import compare
        from steer.inspect import laid_out

        result = compare(path, other, CompareConfig.load(None, set_), out)
        return show(result if json_ else laid_out(result), json_)
    if out is not None:
        from sae.index_export import export_index

        return show(export_index(path, out), json_)
    from steer.inspect import describe

    show(describe(path, latent, verify), json_)


@app.command()
def demo(config: ConfigPath = None, set_: Overrides = None, json_: AsJson = False, dry_run: DryRun = False) -> None:
    """Run the whole pipeline on the embedded model and text."""
    settings = DemoConfig.load(config, set_)
    if dry_run:
        return show({"config": settings.model_dump(mode="json")}, json_)
    from steer.demo import run_demo, transcript

    summary = run_demo(settings, on_status=status)
    if json_:
        return show(summary, True)
    sys.stdout.write(transcript(settings, summary))


def main() -> None:
    """Run the command; a SaekitError becomes one line, which may quote what somebody else wrote, and exit code 1."""
    try:
        app()
    except SaekitError as error:
        sys.stderr.write(f"saekit: {printable(' '.join(str(error).split()))}\n")
        sys.exit(1)
    except SystemExit as stop:
        if stop.code != TYPER_STOPPED:
            raise
        sys.stderr.write("saekit: stopped.\n")
        sys.exit(1)
