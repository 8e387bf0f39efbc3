"""The kinds of work that a topology gives speeds for, and what its links make of a message: what the five passes of a step do
(docs/architecture.md), and what moves bytes between them.

    op              call                  row                                byte
    step            a step                -                                  -
    route_ids       a feature             an id of the batch                 -
    route_unique    -                     an id read by id (deduplicated)    -
    route_place     -                     a distinct id sent to a strip      of the map from ids to segments, 8 an id and strip
    route_bag       -                     an id sent in a bag                of the segments they become, 8 a segment
    route_slab      a slab, and each      -                                  -
                    group read by id
    counts          a step                -                                  -
    message         a message put         -                                  -
                    together or taken apart
    copy            a slab in it          -                                  of what it is put together from; of casts
    block           -                     a slab and rank in a message       -
    lookup          a slab                a row read for its own sake        read
    lookup_sum      -                     a row read into a partial sum      read
    order           a slab                an entry whose row is sorted       -
                                          before its gradient comes
    pool            a group               a vector added to a bag            read, and written to the output
    pool_adjoint    a group               as pool, on the way back           read, and written to the segments' gradients
    pool_max        a group               a vector in a maximum, both ways   of the output; pool reads
    gather          a group               a vector given out as it is        read and written
    gather_adjoint  a group               as gather, on the way back         read and written
    output          a feature             -                                  -
    join            -                     a strip's vector put beside others of the output
    backward        a step                -                                  -
    apply           a step                -                                  -
    merge           a slab                an entry (a row and a gradient)    of gradients read, once each, and of sums written
    update          a slab                a distinct row                     of weights and state read and written, gradients read
    round           -                     a row rounded at random            of its new values before
    twins           a stretch             a touched row whose columns are cut, of    a statistic, 8 a row
                                          a rowwise optimizer
    fused_merge     -                     as merge, where one call merges    of gradients, once an entry
    fused           a slab                and updates: as update             as update
    dense           a slab                a row of a table copied whole      of the buffer that copies are summed in
    all_reduce      -                     -                                  of that buffer, in the sum itself

A group is what `combine` pools alike of a slab, in one call. A stretch is the rows of a strip that lie on one rank. `order` is
counted on GPUs alone, which sort rows in the forward. `dense` and `all_reduce` are of copies that are summed whole; where rows of
copies travel, it is `copy` and `merge`.

`update` and `fused` may be given by optimizer, as `update_adam`: the plain name serves those that are not. An optimizer without
either `fused` op has no fused kernel there. What else may be left out stands in `FALLBACK`.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardembed.errors import ConfigError
from shardembed.planner.topology import Op, Topology
from shardembed.planner.topology_sections import OPTIONAL_OPS, REQUIRED_OPS

OPS = (*REQUIRED_OPS, *OPTIONAL_OPS)
OPTIMIZER_OPS = tuple(name for name in OPTIONAL_OPS if name.startswith(("update_", "fused_")) and name != "fused_merge")
FREE = Op(0.0, 0.0, 0.0)
# What stands for an op that a topology does not give; None: nothing, what it takes belongs to `step` then.
FALLBACK = {
    "counts": None,
    "message": None,
    "block": None,
    "order": None,
    "backward": None,
    "apply": None,
    "twins": None,
    "fused_merge": "merge",
    "pool_max": "gather_adjoint",
    "join": "copy",
    "round": "update",
}
FALLBACK |= {name: name.split("_", 1)[0] for name in OPTIMIZER_OPS}


def op_of(topology: Topology, name: str) -> Op:
    """The speed of a kind of work.

    Raises:
        ConfigError: the topology gives neither it nor what may stand for it.
    """
    other = FALLBACK.get(name, name)
    found = topology.ops.get(name, FREE if other is None else topology.ops.get(other))
    if found is None:
        raise ConfigError(f"topology {topology.name!r} gives no speed for the op {name!r}; its ops are {sorted(topology.ops)}")
    return found


@dataclass(frozen=True)
class Exchange:
    """An all-to-all in which every pair of ranks exchanges alike.

    Attributes:
        latency: seconds, whatever is sent.
        byte: seconds for each byte of a message to (or from) one peer.
    """

    latency: float
    byte: float


def all_to_all(topology: Topology) -> Exchange:
    """The slower of the links within and between nodes, since both carry at once what is for different peers (NCCL's all-to-all
    is a group of sends and receives, one a peer).

    On a link: latency + peer * (peers - 1) + peers * bytes / bandwidth. Of R - 1 peers, G - 1 share the node.
    """
    if topology.ranks == 1:
        return Exchange(0.0, 0.0)
    within = min(topology.ranks, topology.ranks_per_node) - 1
    tiers = [(link, peers) for link, peers in ((topology.intra, within), (topology.inter, topology.ranks - 1 - within)) if peers]
    return Exchange(
        max(link.latency + link.peer * (peers - 1) for link, peers in tiers),
        max(peers / link.bandwidth for link, peers in tiers),
    )


def all_reduce(topology: Topology) -> Exchange:
    """An all-reduce: `byte` is for each byte of the buffer.

    Every rank sends and receives 2 (R - 1) / R of the buffer (the "bus bandwidth" of nccl-tests, doc/PERFORMANCE.md; Gloo's ring
    likewise). Between nodes, the G ranks of a node carry their node's share together, 1 / G each, as NCCL's rings over parallel
    rails do. Latency: the buffer passes every rank twice within a node, and every node twice between nodes along a tree
    (2 log2(nodes), NCCL's double binary trees).
    """
    if topology.ranks == 1:
        return Exchange(0.0, 0.0)
    ranks, within = topology.ranks, min(topology.ranks, topology.ranks_per_node)
    travels = 2.0 * (ranks - 1) / ranks
    intra, inter = topology.intra, topology.inter
    latency = byte = 0.0
    if within > 1:
        latency, byte = 2 * (intra.latency + intra.peer * (within - 2)), travels / intra.bandwidth
    nodes = -(-ranks // within)
    if nodes > 1:
        latency += 2 * inter.latency * (nodes - 1).bit_length()
        byte = max(byte, travels / (within * inter.bandwidth))
    return Exchange(latency, byte)
