"""What a build says, on the terminal of a run of pytest."""

from __future__ import annotations

import pytest

from tests.debian.cache import Say


def progress(config: pytest.Config) -> Say:
    """Shows a line at once, whatever is captured."""
    capture = config.pluginmanager.getplugin("capturemanager")
    reporter = config.pluginmanager.getplugin("terminalreporter")
    assert capture is not None  # pytest's own plugins, both always there
    assert reporter is not None

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)

    return say
