"""One of the ranks that `trainfleet train` starts: `python -m trainfleet.cli.rank RESOLVED FOLDER [--debug]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Train as the recipe RESOLVED says, whose import paths begin in FOLDER; the exit code."""
    from trainfleet.cli.train import make_importable, train_here
    from trainfleet.comm.environment import RankEnvironment
    from trainfleet.config import load_config
    from trainfleet.training.recipe import Recipe

    resolved, folder = arguments[:2]
    recipe = load_config(Recipe, file=Path(resolved), env={}, dotenv=Path(os.devnull)).value
    make_importable(Path(folder))
    return train_here(recipe, RankEnvironment.from_env(), debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
