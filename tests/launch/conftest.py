"""What the launchers add to pytest: each takes two torchrun agents, so these are left out unless they are asked for."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--launchers"):
        return
    left_out = [item for item in items if item.get_closest_marker("launcher")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("launcher")]
