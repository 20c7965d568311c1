"""`trainfleet config`: which source decided what, and the files that help to write a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainfleet.errors import ConfigError

if TYPE_CHECKING:
    from trainfleet.training.recipe import Recipe

app = typer.Typer(
    help="Show, explain and begin recipes.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

RECIPE = typer.Argument(..., help="A YAML file.", metavar="RECIPE", show_default=False)
OVERRIDES = typer.Argument(None, help="Values that beat all others.", metavar="[SECTION.KEY=VALUE]...")


@app.command()
def show(
    recipe: Path = RECIPE,
    overrides: list[str] | None = OVERRIDES,
    changed: bool = typer.Option(False, "--changed", help="Only what is not a default."),
    as_yaml: bool = typer.Option(False, "--yaml", help="The resolved recipe as YAML."),
) -> None:
    """Every key with its value and the source that won."""
    from trainfleet.config import load_config, to_yaml
    from trainfleet.config.sections import value_at
    from trainfleet.config.yaml import inline_yaml

    loaded = load_config(_recipe_class(), file=recipe, overrides=overrides or [])
    if as_yaml:
        print(to_yaml(loaded.value), end="")
        return
    rows = [
        (key, inline_yaml(value_at(loaded.value, key)), source)
        for key, source in loaded.sources.items()
        if not (changed and source == "default")
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    widths[1] = min(widths[1], 60)
    for key, value, source in rows:
        print(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}")


@app.command()
def init(
    folder: Path = typer.Argument(Path(), help="Where recipe.yaml and .env go."),
    force: bool = typer.Option(False, "--force", help="Replace files that are there."),
) -> None:
    """Write recipe.yaml and .env with every key explained."""
    from trainfleet.config import commented_env, commented_yaml

    texts = {folder / "recipe.yaml": commented_yaml(_recipe_class()), folder / ".env": commented_env(_recipe_class())}
    there = [str(path) for path in texts if path.exists()]
    if there and not force:
        raise ConfigError(f"{' and '.join(there)} would be replaced.", hint="Name another folder, or add --force.")
    for path, text in texts.items():
        _write(path, text)
        print(f"wrote {path}")


@app.command()
def schema(output: Path | None = typer.Option(None, "--output", "-o", help="A file instead of the screen.")) -> None:
    """The JSON schema of a recipe, for editors."""
    import json

    from trainfleet.config import json_schema

    _put(json.dumps(json_schema(_recipe_class()), indent=2) + "\n", output)


@app.command()
def docs(output: Path | None = typer.Option(None, "--output", "-o", help="A file instead of the screen.")) -> None:
    """The table of all keys, in Markdown."""
    from trainfleet.config import configuration_markdown

    _put(configuration_markdown(_recipe_class()), output)


def _recipe_class() -> type[Recipe]:
    from trainfleet.training.recipe import Recipe

    return Recipe


def _put(text: str, output: Path | None) -> None:
    if output is None:
        print(text, end="")
    else:
        _write(output, text)


def _write(path: Path, text: str) -> None:
    if path.parent.exists() and not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: {path.parent} is a file, not a folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
