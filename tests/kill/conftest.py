"""What the kill matrix adds to pytest: most of it is left out unless it is asked for, and a table at the end."""

from __future__ import annotations

import pytest

from tests.kill import table


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--kill-matrix"):
        return
    left_out = [item for item in items if item.get_closest_marker("matrix")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("matrix")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := table.lines():
        terminalreporter.section("kill points")
        terminalreporter.write("\n".join(lines) + "\n")
