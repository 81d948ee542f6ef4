"""The arguments that most verbs have."""

import json
from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Config file; defaults without one.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Config file; defaults without one.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the config.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
OnRay = Annotated[bool, typer.Option("--ray", help="Run on workers of Ray, on this machine.")]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", metavar="HOST:PORT", help="Run on the workers of this Ray cluster.")
]
RayProcesses = Annotated[
    int | None, typer.Option("--ray-processes", min=1, help="Processes on Ray; one a node without.")
]
RayGpus = Annotated[
    int | None, typer.Option("--ray-gpus", min=0, help="GPUs of each process on Ray; all of its node without.")
]


def ray_address_of(on_ray: bool, address: str | None) -> str | None:
    """Where `--ray` and `--ray-address` say that Ray is; none where they are not given."""
    return address or ("local" if on_ray else None)


def ray_overrides(on_ray: bool, address: str | None) -> list[str]:
    """What `--ray` and `--ray-address` set."""
    where = ray_address_of(on_ray, address)
    return [] if where is None else [f"ray={json.dumps(where)}"]
