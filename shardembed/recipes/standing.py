"""How good a model is, by the numbers of its evaluations: what they stand beside, whether it is better, and whether it overfits.

A key of an evaluation such as `popularity_recall@20` is what somebody else reaches in `recall@20`: whatever stands before the
name of another key is taken for whose number it is, so that a new baseline needs nothing here but, at best, its words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardembed.recipes.series import Point, Series

WHO = {
    "popularity": "popular items",
    "logistic": "logistic regression",
    "base": "the share of clicks",
    "generator": "what made the data",
}
CEILING = "generator"  # nobody is expected to be better
KNOWN = {"auc": ("chance", 0.5), "normalized_entropy": ("the share of clicks", 1.0)}  # what follows from the metric itself
HEADLINES = ("recall@", "auc", "ndcg@")  # the first of them that there is tells how good a model is
LOWER = ("log_loss", "normalized_entropy")  # is better
AIMS = {"calibration": 1.0}  # neither more nor less
GIVEN = ("click_rate",)  # describe the data
WORDS = 4  # before the name of a metric, at most
FALLS = 0.02  # of what a metric is above its zero, from which on a fall counts
SMOOTH = 40  # a smoothed point is made of this part of a curve's points on either side


@dataclass(frozen=True)
class Beside:
    """What stands beside a metric of the model.

    Attributes:
        who: reaches it, in words.
        value: of the metric.
        baseline: the model has to be better; else nobody expects it to.
        key: of the number in an evaluation; empty where it follows from the metric.
    """

    who: str
    value: float
    baseline: bool
    key: str = ""


def owner(key: str, names: Mapping[str, object]) -> tuple[str, str] | None:
    """Of a number that is somebody else's: who, as keys have it, and which of `names` it is in."""
    parts = key.split("_", WORDS)
    for count in range(1, len(parts)):
        name = "_".join(parts[count:])
        if name in names:
            return "_".join(parts[:count]), name
    return None


def metrics(results: Mapping[str, float]) -> list[str]:
    """The model's own, which it can be good or bad at, as the evaluation orders them."""
    return [name for name in results if name not in GIVEN and owner(name, results) is None]


def headline(results: Mapping[str, float]) -> str | None:
    """The metric to see first; None where nothing was evaluated."""
    own = metrics(results)
    found = (name for begin in HEADLINES for name in own if name.startswith(begin))
    return next(found, own[0] if own else None)


def beside(results: Mapping[str, float]) -> dict[str, list[Beside]]:
    """Of each metric of the model what stands beside it, baselines first."""
    found: dict[str, list[Beside]] = {name: [] for name in metrics(results)}
    for key, value in results.items():
        whose = owner(key, results)
        if whose is not None and whose[1] in found:
            who = WHO.get(whose[0], whose[0].replace("_", " "))
            found[whose[1]].append(Beside(who, value, whose[0] != CEILING, key))
    for name, (who, value) in KNOWN.items():
        if name in found and not any(each.baseline for each in found[name]):
            found[name].append(Beside(who, value, True))
    return {name: sorted(each, key=lambda one: not one.baseline) for name, each in found.items()}


def better(name: str, value: float, than: float) -> bool:
    """Whether a value of the metric is better than another one; a nan is better than none, and none than a nan."""
    if name in AIMS:
        return abs(value - AIMS[name]) < abs(than - AIMS[name])
    return value < than if name in LOWER else value > than


def beaten(results: Mapping[str, float]) -> list[tuple[str, Beside]]:
    """The metrics in which the model is not better than a baseline, with the baseline."""
    named = ((name, each) for name, found in beside(results).items() for each in found if each.baseline)
    return [(name, each) for name, each in named if not better(name, results[name], each.value)]


@dataclass(frozen=True)
class Overfit:
    """That a model has grown worse at rows it was not trained on, while it went on to grow better at those it was.

    Attributes:
        step: of the best evaluation.
        best: the metric then.
        last_step: of the last evaluation.
        last: the metric then.
        loss: in training, up to the best evaluation.
        last_loss: in training, up to the last.
        steps: that each of the two losses is the mean of, where there are as many.
    """

    step: int
    best: float
    last_step: int
    last: float
    loss: float
    last_loss: float
    steps: int


def overfit(name: str, points: Sequence[Point], loss: Series) -> Overfit | None:
    """Whether a run overfits, by the evaluations of one metric in the order of steps and the training loss.

    It does if both hold: the last evaluation is worse than the best one by more than `FALLS` of what the best one is above the
    metric's zero (its value where nothing is known, 0.5 for the AUC); and the mean training loss of the steps up to the last
    evaluation is lower than that of as many steps up to the best one. As many are half of the steps up to the best evaluation,
    or half of those since, whichever is less. Steps and evaluations count, and no seconds.
    """
    if not points:
        return None
    best = points[0]
    for point in points[1:]:
        best = point if better(name, point.mean, best.mean) else best
    last = points[-1]
    zero = KNOWN[name][1] if name in KNOWN else AIMS.get(name, 0.0)
    worse = last.mean - best.mean if name in LOWER else best.mean - last.mean
    if last.step <= best.step or not worse > FALLS * abs(best.mean - zero):
        return None
    steps = max(1, min(best.step, last.step - best.step) // 2)
    then, now = loss.between(best.step - steps, best.step), loss.between(last.step - steps, last.step)
    if then is None or now is None or not now < then:
        return None
    return Overfit(best.step, best.mean, last.step, last.mean, then, now, steps)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Each point as the mean of its neighbours on either side, itself among them; at the ends there are fewer."""
    reach = len(points) // SMOOTH
    found = []
    for place, point in enumerate(points):
        near = points[max(0, place - reach) : place + reach + 1]
        count, total = sum(one.count for one in near), sum(one.total for one in near)
        found.append(Point(point.step, count, total, total / count, total / count))
    return found
