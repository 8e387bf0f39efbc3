"""Topology files: the ones that come along say what their vendors say, and mistakes in any are placed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shardembed.comm.communicators import Communicators
from shardembed.errors import ConfigError
from shardembed.planner import builtin, cost_ops, topology
from shardembed.planner.communicators import COMMUNICATORS, communicator_bytes
from shardembed.planner.topology import GB, GIB
from shardembed.planner.topology_sections import OPTIONAL_OPS, REQUIRED_OPS

CPU = builtin.locate("topologies", "cpu")


def changed(folder: Path, old: str, new: str) -> Path:
    """The file for CPUs with something else in one place."""
    text = CPU.read_text()
    assert text.count(old) == 1
    path = folder / "mine.yaml"
    path.write_text(text.replace(old, new))
    return path


def complaint(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        topology.load(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "memory_gib", "hbm", "nvlink", "nic"),
    [("h100x8", 79, 3350, 450, 50), ("h200x8", 139, 4800, 450, 50), ("a100x8", 79, 2039, 300, 25)],
)
def test_the_topologies_that_come_along_say_what_their_vendors_say(
    name: str, memory_gib: int, hbm: float, nvlink: float, nic: float
) -> None:
    found = topology.load(name)
    assert (found.name, found.ranks, found.ranks_per_node, found.memory) == (name, 8, 8, memory_gib * GIB)
    assert 0.7 * nvlink * GB <= found.intra.bandwidth <= nvlink * GB
    assert 0.7 * nic * GB <= found.inter.bandwidth <= nic * GB
    assert {"memory", "memory_bandwidth", "intra", "inter", "calls"} <= set(found.source)
    # Rows of 128 float32: reads reach 65 to 80 % of the roof; the update, by all it moves, 25 to 50 %.
    row, roof = 512, 1 / (hbm * GB)
    assert 0.65 <= row * roof / found.ops["lookup_sum"].seconds(0, 1, row) <= 0.80
    update = sum(found.ops[name].seconds(0, 1, part * row) for name, part in (("order", 0), ("fused_merge", 1), ("fused", 3)))
    assert 0.25 <= 4 * row * roof / update <= 0.50
    # Narrow rows are farther from it.
    assert 64 * roof / found.ops["lookup_sum"].seconds(0, 1, 64) <= 0.45


def test_all_of_them_give_every_kind_of_work() -> None:
    names = list(builtin.files("topologies"))
    assert {"a100x8", "cpu", "h100x8", "h200x8"} <= set(names)
    for name in names:
        assert set(REQUIRED_OPS) <= set(topology.load(name).ops)


def test_what_a_file_may_leave_out_has_something_to_stand_for_it() -> None:
    assert set(OPTIONAL_OPS) == set(cost_ops.FALLBACK) | {"fused"}  # without which there is no fused kernel
    assert {other for other in cost_ops.FALLBACK.values() if other} <= {*REQUIRED_OPS, "fused"}


def test_ranks_scale_the_same_machines() -> None:
    found = topology.load("h100x8", ranks=1024)
    assert found == topology.load("h100x8").scaled(1024)
    assert (found.ranks, found.ranks_per_node) == (1024, 8)
    with pytest.raises(ConfigError, match="1 to 1,048,576 ranks, not 0"):
        topology.load("h100x8", ranks=0)


def test_units_are_in_the_keys(tmp_path: Path) -> None:
    path = changed(tmp_path, "intra: {bandwidth_gb_per_s: 1.035,", "intra: {efficiency: 0.5, bandwidth_gb_per_s: 2,")
    found = topology.load(path)
    assert found.name == "cpu"
    assert (found.intra.bandwidth, found.intra.latency, found.intra.peer) == pytest.approx((1e9, 358.5e-6, 0.0))
    copy = found.ops["copy"]
    assert (copy.call, copy.row, copy.byte) == pytest.approx((7.004e-6, 0.0, 1 / 9.883e9))
    shared = changed(tmp_path, "  copy: {call_us: 7.004, row_ns: 0.0, gb_per_s: 9.883}", "  copy: {call_us: 7, row_bytes: 8, share: 0.5}")
    shared.write_text("memory_bandwidth_gb_per_s: 10\n" + shared.read_text())
    copy = topology.load(shared).ops["copy"]
    assert (copy.row, copy.byte) == pytest.approx((8 / 5e9, 1 / 5e9))


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    found = topology.load("h200x8", ranks=16)
    path = tmp_path / "again.yaml"
    path.write_text(topology.to_yaml(found))
    again = topology.load(path)
    assert (again.name, again.ranks, again.memory, again.room) == (found.name, 16, found.memory, found.room)
    assert again.source == found.source
    assert again.ops.keys() == found.ops.keys()
    for name, op in found.ops.items():
        assert again.ops[name].seconds(1, 1, 1) == pytest.approx(op.seconds(1, 1, 1), rel=1e-3)
    assert again.inter.bandwidth == pytest.approx(found.inter.bandwidth, rel=1e-3)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("memory_gib", "memroy_gib", ":6:1: unknown key 'memroy_gib'; did you mean 'memory_gib'?"),
        ("memory_gib", "memroy_gib", ":3:1: memory_gib Field required"),
        ("inter: {bandwidth_gb_per_s: 1.035,", "inter: {bandwith_gb_per_s: 1.035,", ":9:9: unknown key 'bandwith_gb_per_s' in inter"),
        ("inter: {bandwidth_gb_per_s: 1.035,", "inter: {", ":9:1: inter.bandwidth_gb_per_s Field required"),
        ("  route_bag:", "  rout_bag:", ":17:3: unknown key 'rout_bag' in ops; did you mean 'route_bag'?"),
        ("  route_bag:", "  rout_bag:", ":11:1: ops.route_bag Field required"),
        ("  copy: {call_us", "  copy: {calls_us", ":19:10: unknown key 'calls_us' in ops.copy; did you mean 'call_us'?"),
        ("  copy: {call_us: 7.004", "  copy: {call_us: -2", ":19:10: ops.copy.call_us should be greater than or equal to 0, not -2"),
        ("  copy: {call_us: 7.004", "  copy: {share: 0.5", ":19:3: ops.copy: give either row_ns and gb_per_s"),
        ("  output: {call_us: 23.34, row_ns: 0.0}", "  output: {row_bytes: 4}", "row_bytes needs a share of the memory's bandwidth"),
        (
            "  output: {call_us: 23.34, row_ns: 0.0}",
            "  output: {share: 0.5}",
            ":26:12: ops.output.share is of memory_bandwidth_gb_per_s, which the file",
        ),
        ("reserve_gib: 2", "reserve_gib: 12", "reserve_gib 12 leaves nothing of memory_gib 10 for tables"),
        ("ranks: 2\nranks_per", "ranks: 0\nranks_per", ":4:1: ranks should be greater than or equal to 1, not 0"),
    ],
)
def test_mistakes_are_placed(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = changed(tmp_path, old, new)
    found = complaint(path)
    assert found.startswith(f"{path}:")
    assert says in found


def test_what_is_not_there_is_told_with_what_is() -> None:
    assert "'h100x' is neither a file nor one of the topologies that come along; did you mean 'h100x8'?" in complaint("h100x")
    assert "none/mine.yaml: there is no such file; those that come along go by name: a100x8, cpu" in complaint("none/mine.yaml")


def test_an_installed_package_looks_among_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Listed:
        """What the metadata of an installed package lists."""

        parts = ("..", "..", "..", "share", "shardembed", "topologies", "cpu.yaml")

        def locate(self) -> Path:
            return CPU

    monkeypatch.setattr(builtin, "_ROOT", tmp_path)
    monkeypatch.setattr(builtin.metadata, "files", lambda name: [Listed()])
    assert builtin.files("topologies") == {"cpu": CPU}
    assert builtin.files("workloads") == {}
    beside = tmp_path / "share" / "shardembed" / "topologies" / "mine.yaml"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert builtin.files("topologies") == {"mine": beside}


def test_the_package_carries_all_of_them() -> None:
    settings = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    for kind in ("topologies", "workloads"):
        assert f'"share/shardembed/{kind}" = ["configs/{kind}/*.yaml"]' in settings
        assert builtin.files(kind)


def test_communicators_are_counted_as_many_as_are_made() -> None:
    assert sum(part.type == "dist.ProcessGroup" for part in dataclasses.fields(Communicators)) == COMMUNICATORS
    # github.com/NVIDIA/nccl, issue 1685: what the first all-to-all of eight H100 took.
    assert communicator_bytes(8, 8) / COMMUNICATORS == pytest.approx(3.28e9, rel=0.05)
    assert communicator_bytes(1024, 8) == communicator_bytes(8, 8) > communicator_bytes(4, 8) > communicator_bytes(2, 8) > 0
    assert communicator_bytes(1, 8) == 0


@pytest.mark.parametrize("name", ["h200x8", "h100x8", "a100x8", "cpu"])
def test_tables_may_fill_what_neither_the_reserve_nor_communicators_take(name: str) -> None:
    found = topology.load(name)
    taken = communicator_bytes(found.ranks, found.ranks_per_node) if name != "cpu" else 0
    assert found.communicators == taken
    assert found.room == found.memory - found.reserve - taken > 0
    assert found.scaled(1).communicators == 0


def test_a_gpu_whose_memory_communicators_fill_is_refused(tmp_path: Path) -> None:
    text = topology.to_yaml(topology.load("h100x8"))
    path = tmp_path / "small.yaml"
    path.write_text(text.replace("memory_gib: 79", "memory_gib: 18"))
    with pytest.raises(ConfigError, match=r"beside 6\.2 GiB of communicators, leaves nothing of memory_gib 18"):
        topology.load(path)
