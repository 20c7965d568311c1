"""Settings: YAML, `.env`, environment, flags and Python values become checked dataclasses that know who set them."""

from __future__ import annotations

from trainfleet.config.describe import commented_env, commented_yaml, configuration_markdown, json_schema
from trainfleet.config.load import Loaded, load_config
from trainfleet.config.sections import REQUIRED, Key, describe
from trainfleet.config.yaml import to_plain, to_yaml

__all__ = [
    "REQUIRED",
    "Key",
    "Loaded",
    "commented_env",
    "commented_yaml",
    "configuration_markdown",
    "describe",
    "json_schema",
    "load_config",
    "to_plain",
    "to_yaml",
]
