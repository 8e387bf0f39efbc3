"""What the kill matrix adds to pytest: a table at the end."""

from __future__ import annotations

import pytest

from tests.kill import table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := table.lines():
        terminalreporter.section("kill points")
        terminalreporter.write("\n".join(lines) + "\n")
