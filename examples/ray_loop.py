"""Ray Train: Ray starts the ranks and makes their process group, and the loop is that of ddp_loop.py.

python examples/ray_loop.py /shared/checkpoints
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ray.train
import torch
from ddp_loop import main as train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def worker(config: dict[str, str]) -> None:
    train(config["folder"])  # se.init joins the group that Ray has made
    ray.train.report({"finished": 1})  # ours lies in the folder, so Ray is given no checkpoint


if __name__ == "__main__":
    # Absolute, and on a file system that all nodes see: Ray's workers start in folders of their own.
    folder = str(Path(sys.argv[1]).absolute())
    # The modules beside this file, for the workers.
    path = [str(Path(__file__).parent.absolute()), os.environ.get("PYTHONPATH", "")]
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, path))}})
    scaling = ScalingConfig(num_workers=2, use_gpu=torch.cuda.is_available())
    TorchTrainer(worker, train_loop_config={"folder": folder}, scaling_config=scaling, run_config=RunConfig()).fit()
