"""The documentation agrees with the code: config reference, example configs, errors, verbs, links."""

import inspect
import re
import runpy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from activations import errors
from activations.config import Config

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("activations", "benchmarks", "configs", "docs", "notebooks", "sae", "steer", "tests")
PAGES = sorted(chain(ROOT.glob("*.md"), *((ROOT / room).rglob(end) for room in ROOMS for end in ("*.md", "*.ipynb"))))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """What docs/make_config_reference.py defines."""
    return runpy.run_path(str(ROOT / "docs" / "make_config_reference.py"))


def test_config_reference_is_up_to_date(reference: dict[str, Any]) -> None:
    written = (ROOT / "configs" / "README.md").read_text()
    assert written == reference["render"](), "run python docs/make_config_reference.py"


def test_config_reference_covers_every_verb_with_a_config(reference: dict[str, Any]) -> None:
    def leaves(cls: type[Config]) -> set[type[Config]]:
        return set().union(*map(leaves, cls.__subclasses__())) or {cls}

    taken = {cls.__name__ for cls in reference["CLASSES"].values()}
    groups = {"SaeConfig", "SweepConfig", "ComputeConfig", "LogConfig", "MeasureConfig"}
    groups |= {"ProbingConfig", "ConceptsConfig", "AbsorptionConfig"}
    groups |= {"ChatModelConfig", "ScoringConfig", "BudgetConfig", "LoraTraining"}
    in_config_modules = {cls.__name__ for cls in leaves(Config) if cls.__module__.endswith(".config")}
    assert in_config_modules <= taken | groups


def test_every_example_config_loads(reference: dict[str, Any]) -> None:
    files = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert files == set(reference["EXAMPLES"])
    for file, verb in reference["EXAMPLES"].items():
        assert reference["CLASSES"][verb].load(ROOT / "configs" / file)


def test_every_error_is_documented() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.SaekitError)]
    assert len(classes) > 10
    assert [cls.__name__ for cls in classes if f"### {cls.__name__}\n" not in text] == []


def test_every_verb_is_in_the_readme() -> None:
    from steer.cli import app

    text = (ROOT / "README.md").read_text()
    groups = {"": app, **{f"{group.name} ": group.typer_instance for group in app.registered_groups}}
    verbs = {
        prefix + (command.name or getattr(command.callback, "__name__", ""))
        for prefix, group in groups.items()
        if group is not None
        for command in group.registered_commands
    }
    assert verbs >= {"harvest", "train", "demo", "vector make"}
    assert [verb for verb in sorted(verbs) if f"`saekit {verb}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
