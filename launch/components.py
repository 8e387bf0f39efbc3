"""A torchx component: `shardembed train` on any scheduler that torchx knows. It needs `torchx.specs` alone.

    torchx run --scheduler local_cwd launch/components.py:train -j 1x2 -- --config configs/train/quickstart.yaml

docs/launching.md says what each line is for, and what the builtin `dist.ddp` does instead.
"""

# torchx reads the annotations of a component, as objects: no `from __future__ import annotations`, and types that it knows.
import shlex
from typing import Dict, Optional  # noqa: UP035

from torchx import specs  # pyright: ignore[reportMissingImports]  (an extra)
from torchx.specs import macros  # pyright: ignore[reportMissingImports]


def train(
    *args: str,
    config: Optional[str] = None,  # noqa: UP045
    j: str = "1x2",
    image: str = ".",
    name: str = "shardembed",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    h: Optional[str] = None,  # noqa: UP045
    port: int = 29500,
    max_restarts: int = 3,
    max_retries: int = 0,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Trains a model with `shardembed train`, on one node or several.

    Args:
        args: what else `shardembed train` takes, after `--`; repeat `--set` with an equals sign, as in --set=train.epochs=3
        config: the YAML file, as all nodes see it; may also stand after `--`
        j: nodes x ranks on each
        image: what the scheduler runs in; for local_cwd it does not matter
        name: of the job
        cpu: cores of a node
        gpu: GPUs of a node
        memMB: memory of a node
        h: a named resource in place of the three above
        port: at which the ranks of several nodes meet, on the first node
        max_restarts: how often ranks are started again after a failure; they resume
        max_retries: how often the scheduler starts the job again
        env: environment variables, such as NCCL_SOCKET_IFNAME=eth0
    """
    nodes, ranks = _shape(j)
    return specs.AppDef(
        name=name,
        roles=[
            specs.Role(
                name="train",
                image=image,
                num_replicas=nodes,
                min_replicas=nodes,
                entrypoint="bash",  # it looks up what the scheduler calls the first node
                args=["-c", _command(nodes, ranks, port, max_restarts, _words(args, config))],
                env=dict(env or {}),
                resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h),
                port_map={"c10d": port},
                max_retries=max_retries,
                retry_policy=specs.RetryPolicy.APPLICATION,  # a node alone cannot join a job that has begun
            )
        ],
    )


def _shape(j: str) -> tuple[int, int]:
    nodes, times, ranks = j.partition("x")
    try:
        shape = (int(nodes), int(ranks)) if times else (1, int(nodes))
    except ValueError:
        shape = (0, 0)
    if min(shape) < 1:
        raise ValueError(f"-j {j}: give nodes x ranks on each, such as 2x8")
    return shape


def _words(args: tuple[str, ...], config: str | None) -> list[str]:
    """The arguments of `shardembed train`, which takes its file without a flag."""
    words = list(args)
    for place, word in enumerate(args):
        flag, equals, value = word.partition("=")
        if flag == "--config" and config is None and (equals or place + 1 < len(args)):
            config = value if equals else args[place + 1]
            del words[place : place + (1 if equals else 2)]
            break
    if config is None:
        raise ValueError("which configuration? Give --config FILE")
    return [config, *words]


def _command(nodes: int, ranks: int, port: int, max_restarts: int, words: list[str]) -> str:
    """One torchrun agent. All agents of a job are given the same endpoint and id, and so find each other."""
    agent = ["python", "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}"]
    agent += [f"--max-restarts={max_restarts}", "--rdzv-backend=c10d", f"--rdzv-id={macros.app_id}"]
    job = shlex.join(["-m", "shardembed", "train", *words]).replace("$", "$$")
    if nodes == 1:
        # Port 0 is any that is free.
        return f"exec {' '.join(agent)} --rdzv-endpoint=localhost:0 --local-addr=localhost {job}"
    lines = [
        f"head=$${{{macros.rank0_env}:-localhost}}",
        'here=""',
        # All on one machine, whose name need not resolve.
        'if [ "$$head" = localhost ]; then here=--local-addr=localhost; fi',
        f'exec {" ".join(agent)} --rdzv-endpoint="$$head:{port}" $$here {job}',
    ]
    return "\n".join(lines)
