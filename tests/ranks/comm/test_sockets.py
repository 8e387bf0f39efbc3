"""How many sockets a rank has for each other one: what `doctor` counts is what there is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardembed as se
from shardembed.checkpoint.save import save_checkpoint
from shardembed.comm.channels import SPEECH, sockets_a_peer
from shardembed.comm.comm import Comm
from tests.harness import run_ranks

pytestmark = pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="sockets are counted as Linux lists them")
TABLE = se.TableConfig("a", 16, 4)
CPU = torch.device("cpu")


def sockets() -> int:
    """Connected ones of this process."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]]
    connected = {f"socket:[{line[9]}]" for line in lines if line[3] == "01"}
    files = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    return sum(os.readlink(file) in connected for file in files if os.path.lexists(file))


def opened(rank: int, world_size: int, folder: str) -> int:
    """By a group, and a training over it with `prefetched` and a save."""
    before = sockets()
    group = dist.new_group(list(range(world_size)))
    assert isinstance(group, dist.ProcessGroup)
    emb = se.EmbeddingCollection([TABLE], process_group=group)
    for batch in se.prefetched([{"a": torch.arange(4)}] * 2, emb):
        emb(batch)
    save_checkpoint(folder, emb)
    return sockets() - before


def opened_beside_nccl(rank: int, world_size: int) -> tuple[int, int]:
    """By a group and what a job of GPUs has beside NCCL; and once there is a table in host memory."""
    before = sockets()
    group = dist.new_group(list(range(world_size)))
    assert isinstance(group, dist.ProcessGroup)
    comm = Comm(group, 60.0, channels=SPEECH)
    with comm.beside():
        comm.side()
    alone = sockets() - before
    comm.carry(CPU)
    comm.carry(CPU)
    with_tables = sockets() - before
    comm.all_reduce_tables("reduce copies", torch.zeros(16), 0)
    comm.close()
    return alone, with_tables


def test_the_doctor_counts_the_sockets_of_a_job_without_gpus(tmp_path: Path) -> None:
    two, three = (run_ranks(ranks, opened, str(tmp_path / str(ranks)), fresh_ranks=True)[1] for ranks in (2, 3))
    assert three - two == sockets_a_peer(over_nccl=False)


def test_beside_nccl_there_are_channels_for_counts_and_texts_alone_until_a_table_in_host_memory_comes() -> None:
    two, three = (run_ranks(ranks, opened_beside_nccl, fresh_ranks=True)[1] for ranks in (2, 3))
    assert three[0] - two[0] == sockets_a_peer(over_nccl=True) == 6
    assert three[1] - two[1] == sockets_a_peer(over_nccl=False) == 14
