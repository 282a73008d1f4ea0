"""The settings as variables of the environment have them.

Imported by need: pydantic-settings takes longer to import than all else that the configuration is made of, and few
machines set a variable.
"""

from __future__ import annotations

from typing import Any

from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from gpuswitch.config.kinds import model_of_all
from gpuswitch.config.schema import ENVIRONMENT


class _Variables(model_of_all(), BaseSettings):  # type: ignore[misc] # made by a function
    """The tables, by the names that pydantic-settings gives them in the environment."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT, env_nested_delimiter="__")


def read(variable: str, value: str) -> dict[str, Any]:
    """What one variable sets, by table; empty where it is none of ours.

    Raises:
        ValueError: its value is not JSON, where it has to be.
        RecursionError: it is too deep.
    """
    source = EnvSettingsSource(_Variables)
    source.env_vars = {variable.lower(): value}
    try:
        return source()
    except SettingsError as error:
        raise ValueError(str(error)) from error
