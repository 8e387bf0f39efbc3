"""The model of a finished run that predicts clicks, for rows that have no label: from what lies in the run's folder alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.recipes.build import click_model
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data.clicks.encode import Encoder, looked_up
from shardembed.recipes.data.clicks.moments import Moments
from shardembed.recipes.data.clicks.reads import ReadClicks
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.clicks.sources import open_files
from shardembed.recipes.data.naming import had_texts
from shardembed.recipes.models.ctr import ClickModel
from shardembed.recipes.run_folder import NAMES, VOCABULARIES


@dataclass(frozen=True)
class ClickScorer:
    """What gives log-odds of clicks. Its tables are cut over the ranks of the job.

    Attributes:
        config: of the run.
        encoder: makes batches of rows.
        model: with the run's weights.
        checkpoint: which these are.
        texts: columns of ids that were texts. A file of new rows may hold digits alone there, and they are texts all the same.
    """

    config: CtrConfig
    encoder: Encoder
    model: ClickModel
    checkpoint: Path
    texts: tuple[str, ...] = ()

    @staticmethod
    def of(run: Path, config: CtrConfig, checkpoint: Path) -> ClickScorer:
        """With the weights of a checkpoint of a run, which has these settings. Collective.

        Raises:
            CheckpointError, DataError: on all ranks: something in the run's folder cannot be read.
        """
        comm = Comm.of()
        with comm.preparing("the run"):
            encoder = Encoder.stored(config.data, run / VOCABULARIES)
            known = tuple(name for name in looked_up(config.data) if had_texts(run / NAMES, name))
        comm.agree("the run", [checkpoint.name])
        # The plan was for the ranks of the training; any plan computes the same.
        numbers = len(encoder.numbers.columns)
        elsewhere = config.model_copy(update={"plan": type(config.plan)({})})
        model = click_model(elsewhere, encoder, Moments.none(numbers) if config.data.features and numbers else None)
        se.load_checkpoint(checkpoint, model, weights_only=True)
        return ClickScorer(config, encoder, model.eval(), checkpoint, known)

    def open(self, paths: tuple[str, ...], setting: str = "--data", skip: bool = False) -> ReadClicks:
        """Rows of files without labels, in the run's layout; setting: what named them, for messages.

        Raises:
            DataError: a file or a column is missing.
        """
        data, texts = self.config.data, self.texts if self.config.data.features else ()
        data = data.model_copy(update={"on_bad_row": "skip" if skip else "raise", "texts": (*data.texts, *texts)})
        return open_files(data, paths, setting, labelled=False)

    @torch.no_grad()
    def logits(self, clicks: Clicks) -> np.ndarray:
        """Log-odds of this rank's rows, float32 `[n]`; what a probability is made of by 1 / (1 + exp(-z)). Collective: each rank
        passes its own, of which there may be none.

        Raises:
            InputError: on all ranks: the rows of any are not what the model takes.
        """
        batch = self.encoder(clicks, len(clicks)).to(default_device())
        return self.model.logits(batch).cpu().numpy()
