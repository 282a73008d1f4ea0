"""Files and environment → frozen settings: every key, which layer set it, and what the service makes of them."""

from gpuswitch.config.settings import DIRECTORY, Config, load

__all__ = ["DIRECTORY", "Config", "load"]
