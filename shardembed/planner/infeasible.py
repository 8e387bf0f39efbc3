"""Why no plan fits, as a proof, and the smallest change that would make room."""

from __future__ import annotations

from shardembed.planner.cost_model import CostModel
from shardembed.planner.problem import Problem
from shardembed.planner.space import Space


def explain(model: CostModel, space: Space, problem: Problem) -> str:
    """The message of the error."""
    raise NotImplementedError
