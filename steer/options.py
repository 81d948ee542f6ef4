"""The arguments that most verbs have."""

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Config file; defaults without one.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Config file; defaults without one.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the config.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
