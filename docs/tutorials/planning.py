# %% [markdown]
# # Planning a cluster you don't have
#
# How many GPUs does a model need, and what would a step take on them? The planner is arithmetic: it runs on a laptop, for clusters
# of any size. `shardembed plan` does the same on the command line.

# %%
from shardembed import planner
from shardembed.errors import PlanError
from shardembed.planner import charts, topology, workload
from shardembed.tables.table_config import TableConfig

# %% [markdown]
# ## The model
#
# A workload is the tables, and what a batch asks of them: how many ids a sample has, and how often ids repeat. Popularity by a
# power law is a guess; `Counts` takes the real counts of your data.

# %%
tables = [
    TableConfig("user", 400_000_000, 64, feature_names=["user"]),
    TableConfig("item", 60_000_000, 64, feature_names=["item", "history"]),
    TableConfig("word", 2_000_000, 64, feature_names=["query"]),
    *(TableConfig(f"context_{n}", 1000, 64, feature_names=[f"context_{n}"]) for n in range(10)),
]
ids = {"user": 1, "item": 1, "history": 50, "query": 6, **{f"context_{n}": 1 for n in range(10)}}
popularity = workload.Zipf(1.2)
model = workload.workload_of(tables, ids, global_batch_size=65_536, name="shop", skew=popularity)

# %% [markdown]
# ## The cluster
#
# Nodes of eight H100s come along, as do others; `shardembed calibrate` writes such a file for a machine that you have. On one GPU:

# %%
machine = topology.load("h100x8")
try:
    planner.plan(model, machine.scaled(1), seconds=1)
except PlanError as error:
    print(error)

# %% [markdown]
# It does not fit, and the message says why and what would help. On eight:

# %%
found = planner.plan(model, machine, seconds=1)
print(f"a step takes {1e3 * found.estimate.step_seconds:.1f} ms")
print(f"no plan takes less than {1e3 * found.lower_bound_seconds:.1f} ms: the gap is {found.gap:.2%}")
for table in found.plan.tables[:4]:
    print(f"{table.name}: {table.kind}, {table.packing}, {len(table.layout.shards)} shard(s)")

# %% [markdown]
# Who holds what, and who has how much to do:

# %%
charts.memory(found).savefig("memory.svg")

# %%
charts.time(found).savefig("time.svg")

# %% [markdown]
# ## More GPUs?
#
# The global batch stays the same. At some number of ranks what travels between nodes outweighs what is saved.

# %%
for ranks in (8, 16, 32, 64):
    point = planner.plan(model, machine.scaled(ranks), seconds=0.5)
    step, full = 1e3 * point.estimate.step_seconds, point.estimate.memory_bytes.max() / 2**30
    print(f"{ranks:3} ranks: {step:5.1f} ms a step, {full:5.1f} GiB on the fullest rank")

# %% [markdown]
# ## Use it
#
# The plan is a file. In the job, pass `plan=se.Plan.load("plan.json")`.

# %%
found.plan.save("plan.json")
print("hash", found.plan.hash == type(found.plan).load("plan.json").hash)

# %% [markdown]
# **Next**: [what the planner does](../planner.md), with its command line, pins, and reports; [calibration](../calibration.md).
