"""A model of RecBole on MovieLens 100k, with RecBole's default settings: what `benchmarks.movielens` starts. Prints recall and NDCG
of the test as the last line, in JSON.

    python -m benchmarks.movielens_recbole BPR|SASRec FOLDER NAME FOLDER_FOR_CHECKPOINTS SEED

`FOLDER/NAME` has the files. Needs RecBole 1.2.1 in another folder, on PYTHONPATH: `pip install --no-deps --target OTHER
recbole==1.2.1 tqdm colorlog==4.7.2 colorama==0.4.4 texttable thop plotly`. It was written for NumPy 1 and an older torch, whose
names and defaults are mended here.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch

NAMES = {"float_": "float64", "complex_": "complex128", "unicode_": "str_", "bool8": "bool_", "object0": "object_"}
OF_MODEL: dict[str, dict[str, Any]] = {
    "BPR": {"benchmark_filename": ["train", "valid", "test"]},
    "SASRec": {
        "train_neg_sample_args": None,  # its loss is cross entropy over all items
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    },
}


def _say(epoch: int, score: float) -> None:
    print(f"{time.strftime('%X')} epoch {epoch}: {score:.4f} on validation", file=sys.stderr, flush=True)


def main() -> None:
    model, folder, name, checkpoints, seed = sys.argv[1:]
    del sys.argv[1:]  # RecBole reads it too
    for old, new in NAMES.items():
        if not hasattr(np, old):
            setattr(np, old, getattr(np, new))
    torch.load = partial(torch.load, weights_only=False)  # of files that RecBole itself has just written
    from recbole.config import Config  # pyright: ignore[reportMissingImports]
    from recbole.data import create_dataset, data_preparation  # pyright: ignore[reportMissingImports]
    from recbole.utils import get_model, get_trainer, init_seed  # pyright: ignore[reportMissingImports]

    settings = {"use_gpu": False, "state": "CRITICAL", "show_progress": False, "data_path": folder, "checkpoint_dir": checkpoints}
    config = Config(model, name, config_dict={**settings, **OF_MODEL[model], "seed": int(seed)})
    init_seed(config["seed"], reproducibility=True)
    training, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], reproducibility=True)
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, get_model(model)(config, training.dataset))
    torch.autograd.set_detect_anomaly(False)  # one of its models has it on once it is imported, for all: half of SASRec's time
    trainer.fit(training, valid, saved=True, show_progress=False, verbose=False, callback_fn=_say)
    found = trainer.evaluate(test, load_best_model=True, show_progress=False)
    print(json.dumps({"recall": float(found["recall@10"]), "ndcg": float(found["ndcg@10"])}))


if __name__ == "__main__":
    main()
