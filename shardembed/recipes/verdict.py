"""What there is to say of how good a run's model is, in sentences: for its page and for `shardembed inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardembed.planner import words
from shardembed.recipes import standing
from shardembed.recipes.recorded import Recorded
from shardembed.recipes.standing import Beside

NAMED = 3  # baselines in a sentence
NOT_EVALUATED = "The model has not been evaluated yet, neither during training nor at the end."
NO_BASELINE = "The evaluation does not tell what anything else reaches, so whether this is good nobody knows."


@dataclass(frozen=True)
class Said:
    """A sentence that must not be overlooked.

    Attributes:
        kind: what it says of the model: it is good, bad, or neither.
        title: begins it.
        said: the rest.
    """

    kind: Literal["good", "bad", "dim"]
    title: str
    said: str


def judged(run: Recorded) -> list[Said]:
    """Whether the model is better than its baselines, and whether it overfits."""
    name = standing.headline(run.results)
    if name is None:
        return [Said("dim", "No result.", NOT_EVALUATED)]
    return [_compared(run, name), *_overfit(run, name)]


def _compared(run: Recorded, name: str) -> Said:
    lost, here = standing.beaten(run.results), standing.beside(run.results)
    if lost:
        pairs = "; ".join(_pair(each, run.results[each], one) for each, one in lost[:NAMED])
        whom = _whom([one for _, one in lost])
        more = f"; and {len(lost) - NAMED:,} more" if len(lost) > NAMED else ""
        said = f"{pairs}{more}. Before it is used, look at its learning rates and epochs, and at the data."
        return Said("bad", f"The model is not better than {whom}.", said)
    first = next((each for each in (name, *here) if any(one.baseline for one in here[each])), None)
    if first is None:
        return Said("dim", "No baseline.", NO_BASELINE)
    found = [one for one in here[first] if one.baseline]
    pairs = "; ".join(_pair(first, run.results[first], one) for one in found[:NAMED])
    return Said("good", f"The model is better than {_whom(found)}:", f"{pairs}.")


def _whom(found: Sequence[Beside]) -> str:
    names = list(dict.fromkeys(one.who for one in found))
    return words.listed(names if len(names) <= NAMED else [*names[:NAMED], f"{len(names) - NAMED:,} more"])


def _pair(name: str, value: float, one: Beside) -> str:
    return f"{name} {value:.4f}, and {one.who} {one.value:.4f}"


def _overfit(run: Recorded, name: str) -> list[Said]:
    found = standing.overfit(name, run.history.get(name, ()), run.curves.loss)
    if found is None:
        return []
    said = (
        f"{name} was best at step {found.step:,} with {found.best:.4f} and is {found.last:.4f} at step {found.last_step:,}, while "
        f"the training loss went on falling, from {found.loss:.4f} to {found.last_loss:.4f} (means of "
        f"{words.plural(found.steps, 'step')} up to each). "
    )
    if run.kept is None:
        said += "Train for fewer steps, end training by eval.patience, keep the best weights, or make the model smaller."
    else:
        said += f"The weights of step {run.kept:,} were kept; the steps since then were for nothing, and eval.patience spares them."
    return [Said("bad", "It overfits.", said)]
