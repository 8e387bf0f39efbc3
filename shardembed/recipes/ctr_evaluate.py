"""The metrics of a model that predicts clicks, on rows that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.recipes.build import CtrJob
from shardembed.recipes.calibration import calibration_bins
from shardembed.recipes.ctr_metrics import ClickMetrics, auc, measure
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.clicks.scan import ClickData
from shardembed.recipes.data.criteo.planted import PlantedClicks
from shardembed.recipes.data.stream import rank_slice
from shardembed.recipes.logistic import Logistic


@dataclass(frozen=True)
class Baselines:
    """What costs nothing reaches on the same rows.

    Attributes:
        logistic: a logistic regression, see `logistic`.
        base_log_loss: of the share of clicks in training, for every row.
    """

    logistic: ClickMetrics
    base_log_loss: float

    def to_json(self) -> dict[str, Any]:
        found = {
            "logistic_auc": self.logistic.auc,
            "logistic_log_loss": self.logistic.log_loss,
            "base_log_loss": self.base_log_loss,
        }
        return {name: None if math.isnan(value) else value for name, value in found.items()}


@dataclass(frozen=True)
class ClickEvaluation:
    """How well clicks are predicted.

    Attributes:
        metrics: of the model.
        generator_auc: of the model that made the clicks, where it is known.
        bins: what `calibration_bins` gives.
        baselines: what the model is compared with.
        purpose: what the rows are for, in words.
    """

    metrics: ClickMetrics
    generator_auc: float | None = None
    bins: dict[str, Any] | None = None
    baselines: Baselines | None = None
    purpose: str = "for validation"

    @property
    def score(self) -> float:
        return self.metrics.auc

    def to_json(self) -> dict[str, Any]:
        found = self.metrics.to_json()
        best = self.generator_auc
        known = {} if best is None else {"generator_auc": None if math.isnan(best) else best}
        return {
            **{name: found[name] for name in found if name != "rows"},
            **known,
            **(self.baselines.to_json() if self.baselines is not None else {}),
            "evaluated_rows": self.metrics.rows,
            **self._binned(),
        }

    def _binned(self) -> dict[str, Any]:
        return {} if self.bins is None else {"calibration_bins": self.bins}

    def show(self, console: Console) -> None:
        found = self.metrics
        if math.isnan(found.auc):
            text = f"\nno AUC: it needs clicks and others among the rows {self.purpose}, and predictions that are numbers"
            console.print(text, style="bold")
        console.print(
            f"\n{found.rows:,} rows {self.purpose}, {found.click_rate:.2%} of them clicks",
            style="bold",
            highlight=False,
            soft_wrap=True,
        )
        best = "" if self.generator_auc is None else f" (the generating model's: {self.generator_auc:.4f})"
        beside = self.baselines
        simple = "" if beside is None else f" (logistic regression: {beside.logistic.auc:.4f})"
        constant = (
            ""
            if beside is None
            else f" (logistic regression: {beside.logistic.log_loss:.4f}, the share of clicks: {beside.base_log_loss:.4f})"
        )
        console.print(f"AUC                 {found.auc:.4f}{best}{simple}", highlight=False, soft_wrap=True)
        console.print(f"normalised entropy  {found.normalized_entropy:.4f}", highlight=False, soft_wrap=True)
        console.print(f"log loss            {found.log_loss:.4f}{constant}", highlight=False, soft_wrap=True)
        console.print(f"calibration         {found.calibration:.4f}\n", highlight=False, soft_wrap=True)
        if beside is not None and not math.isnan(found.auc) and found.auc <= beside.logistic.auc:
            console.print(
                "the model ranks no better than logistic regression on the numbers and the columns of few values", style="bold"
            )
        if beside is not None and found.log_loss >= min(beside.base_log_loss, beside.logistic.log_loss):
            who = "the share of clicks" if found.log_loss >= beside.base_log_loss else "logistic regression"
            console.print(f"its log loss is no better than that of {who}", style="bold")


def evaluate(job: CtrJob, data: ClickData, batch_size: int, logistic: Logistic, validation: bool = False) -> ClickEvaluation:
    """The metrics on all rows that are held out for the result, or on those for evaluations during training alone. Collective.

    logistic: what they are compared with.
    """
    comm, device = Comm.of(), default_device()
    planted = data.source if isinstance(data.source, PlantedClicks) else None
    logits, labels, known = [np.empty(0, np.float32)], [np.empty(0, np.int8)], [np.empty(0, np.float32)]
    simple = [np.empty(0, np.float32)]
    for clicks, found in predicted(job, data, batch_size, validation):
        logits.append(found)
        labels.append(clicks.labels)
        simple.append(logistic.logits(clicks))
        if planted is not None:
            known.append(planted.probabilities(clicks).astype(np.float32))
    truth = np.concatenate(labels)
    scores = np.concatenate(logits)
    metrics, bins = measure(scores, truth, comm, device), calibration_bins(scores, truth, comm, device)
    beside = Baselines(measure(np.concatenate(simple), truth, comm, device), _constant_loss(metrics.click_rate, logistic.rate))
    best = None if planted is None else auc(np.concatenate(known), truth, comm, device)
    purpose = "for the test" if data.validates and not validation else "for validation"
    return ClickEvaluation(metrics, best, bins, beside, purpose)


def _constant_loss(rate: float, said: float) -> float:
    """The mean log loss where a share `rate` are clicks and each has the chance `said`."""
    return -(rate * math.log(said) + (1 - rate) * math.log(1 - said))


@torch.no_grad()
def predicted(job: CtrJob, data: ClickData, batch_size: int, validation: bool = False) -> Iterator[tuple[Clicks, np.ndarray]]:
    """This rank's part of each batch of `held_out` rows, with its log-odds float32 `[b]`. Collective.

    Raises:
        DataError: on all ranks: the data are not what they were when they were scanned.
    """
    device = default_device()
    for chunk in job.given(data.held_batches(batch_size, validation)):
        mine = rank_slice(chunk, se.rank(), se.world_size())
        yield mine, job.model.logits(job.encoder(mine, len(chunk)).to(device)).cpu().numpy()
