# %% [markdown]
# # A first sharded model
#
# Films and the people who watch them: two embedding tables, cut over the ranks of a job, trained to say who likes what.
# `python first_model.py` runs this page on one rank, `torchrun --nproc-per-node 2 first_model.py` on two, without a change.

# %%
import torch
from torch import nn

import shardembed as se

se.init()  # joins the job that torchrun started; alone it is a job of one rank
torch.manual_seed(0)

# %% [markdown]
# ## The model is plain PyTorch
#
# Nothing in it knows of ranks. Where tables are too large for one device, build it `with torch.device("meta")`.

# %%
PEOPLE, FILMS, TASTES = 1000, 500, 5


class Likes(nn.Module):
    def __init__(self):
        super().__init__()
        self.person = nn.Embedding(PEOPLE, 16)
        self.film = nn.Embedding(FILMS, 16)
        nn.init.normal_(self.person.weight, std=0.3)
        nn.init.normal_(self.film.weight, std=0.3)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, person, film):
        return (self.person(person) * self.film(film)).sum(-1) + self.bias


# %% [markdown]
# ## Shard it
#
# `se.shard` puts a sharded table in the place of each `nn.Embedding`. Films are asked for by everybody, people are many: here both
# are dealt out by rows, and each could have another plan. `inputs=` says what a batch will look up, so both tables share one
# exchange.

# %%
model = se.shard(
    Likes(),
    optimizer=se.optim.Adagrad(lr=0.5),
    plan={"person": se.row_wise(), "film": se.row_wise()},
    inputs=lambda person, film: {"person": person, "film": film},
    verbose=False,
)
print(model)
print("left to a dense optimizer:", [name for name, _ in model.named_parameters()])

# %% [markdown]
# ## Train it
#
# A person likes the films of one taste. Each rank draws batches of its own, as it would read its part of the data.
# `se.Optimizer` steps tables and the dense part together.

# %%
draw = torch.Generator().manual_seed(se.rank())


def batches(count, size=1024):
    for _ in range(count):
        person = torch.randint(PEOPLE, (size,), generator=draw)
        film = torch.randint(FILMS, (size,), generator=draw)
        yield person, film, (person % TASTES == film % TASTES).float()


optimizer = se.Optimizer(model, dense=torch.optim.SGD(model.parameters(), lr=0.1))
with se.profile(model) as seen:
    # Ranks agree on the end of data.
    for step, (person, film, liked) in enumerate(se.synced(batches(201))):
        loss = nn.functional.binary_cross_entropy_with_logits(model(person, film), liked)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 and se.rank() == 0:
            print(f"step {step:3}: loss {loss.item():.2f}")

# %% [markdown]
# Where did the time go? Of each stage, the mean of the ranks and the slowest of them:

# %%
print(seen.table())

# %% [markdown]
# ## Read rows, save, and go on elsewhere
#
# No rank has a whole table. Rows are read by id, on all ranks; a checkpoint has everything, and loads on any number of
# ranks under any plan; `load_plain` fills a plain model, in a process without a job.

# %%
rows = model.person.rows("person", torch.tensor([7, 12, 8]))  # the first two share a taste
print([round(torch.cosine_similarity(rows[0], row, dim=0).item(), 1) for row in rows])
se.save_checkpoint("ckpt", model, optimizer=optimizer)

plain = Likes()
se.load_plain("ckpt", plain)
with torch.no_grad():
    print("person 7 likes films 17 and 18:", (plain(torch.tensor([7, 7]), torch.tensor([17, 18])) > 0).tolist())

# %% [markdown]
# **Next**: [your own model](../from-nn-embedding.md), [checkpoints](../checkpoints.md), [looking at embeddings](looking.py).
