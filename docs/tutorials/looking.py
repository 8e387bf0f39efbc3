# %% [markdown]
# # Looking at embeddings
#
# What has a table learnt? All of this works on a checkpoint, in one process, without the job, also on tables larger than
# memory.

# %%
import torch

import shardembed as se

se.init()
torch.manual_seed(0)

# %% [markdown]
# First something to look at: 600 films of three genres. Viewers watch films of one genre, and a film is trained to lie near another
# that the same viewer watched, and away from the other films of the batch.

# %%
FILMS, GENRES = 600, ("comedy", "drama", "western")
films = se.EmbeddingCollection(
    [se.TableConfig("film", FILMS, 16, pooling=None, init=se.Normal(std=0.1))],
    optimizer=se.optim.Adagrad(lr=0.3),
)
optimizer = se.Optimizer(films)
for _ in range(200):
    first = torch.randint(FILMS, (256,))
    same = (first + 3 * torch.randint(FILMS // 3, (256,))) % FILMS  # equal modulo 3: one genre
    vectors = torch.nn.functional.normalize(films({"film": torch.stack([first, same])})["film"], dim=-1)
    scores = 10 * vectors[0] @ vectors[1].T
    torch.nn.functional.cross_entropy(scores, torch.arange(256)).backward()
    optimizer.step()
    optimizer.zero_grad()
se.save_checkpoint("ckpt", films, optimizer=optimizer)
with open("names.txt", "w") as names:  # line 1 names id 0
    names.writelines(f"{GENRES[film % 3]} {film // 3}\n" for film in range(FILMS))

# %% [markdown]
# ## What is near?
#
# `shardembed neighbors ckpt --table film --id 42 --names names.txt`, or:

# %%
(near,) = se.neighbors("ckpt", "film", [42], k=5)
with open("names.txt") as lines:
    names = lines.read().splitlines()
print(names[42], "is near to", [names[row] for row in near.ids])

# %% [markdown]
# ## A map
#
# Rows on the first two principal components. Rings are the rows that were asked for. What is apart here is apart in the table; what
# is near here may be apart along the other components.

# %%
drawn = se.table_map("ckpt", "film", "films.svg", ids=[42, 43, 44], names="names.txt", labels=8)
print(f"{drawn.drawn} of {drawn.rows} rows; the axes show {sum(drawn.shares):.0%} of the variance")

# %% [markdown]
# ## Numbers
#
# An export is plain files: NumPy maps them into memory, others read safetensors or Parquet.

# %%
done = se.export_tables("ckpt", "films", format="npy", dtype="int8")
print([file for table in done.tables for file in table.files])

# %% [markdown]
# **Next**: [all of exports, neighbours, maps, and serving](../using-embeddings.md).
