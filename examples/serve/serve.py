"""Score items for users on one CPU box, with torch and nothing else: no shardembed, no NumPy, no process group.

    python serve.py build served    makes served/scorer.pt2 from the exported tables and the small model
    python serve.py score served 7  prints the five best items for user 7

Tables stay in the files that `shardembed export --format npy --dtype int8` has written. They are mapped into memory, so that the
system reads the pages that are asked for and processes share them; a table may be larger than memory.
"""

import json
import sys
from pathlib import Path

import torch

MOST = 4096  # candidates of one call


def mapped(path: Path) -> torch.Tensor:
    """A .npy file as a tensor that is read when it is used. Bytes: magic, version, length of the header, header, data."""
    with path.open("rb") as file:
        start = file.read(10)
        if start[:7] != b"\x93NUMPY\x01":
            raise ValueError(f"{path} is not a .npy file of version 1")
        header = file.read(int.from_bytes(start[8:], "little")).decode("latin1")
    dtypes = {"|i1": torch.int8, "<f4": torch.float32, "<f2": torch.float16, "<i8": torch.int64}
    dtype = dtypes[header.split("'descr': '")[1].split("'")[0]]
    shape = [int(size) for size in header.split("'shape': (")[1].split(")")[0].split(",") if size.strip()]
    raw = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return raw[10 + len(header) :].view(dtype).view(shape)


class Table:
    """An exported table: int8 rows and a scale for each."""

    def __init__(self, folder: Path, name: str) -> None:
        index = json.loads((folder / "tables" / "export.json").read_text())
        weight, scale = index["tables"][name]["files"]
        self.weight, self.scale = mapped(folder / "tables" / weight), mapped(folder / "tables" / scale)

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and their scales, as they are stored: the model makes floats of them."""
        return self.weight[ids], self.scale[ids]


class Scorer(torch.nn.Module):
    """The dense part of the model that was trained: its parameters are in dense.pt."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.tower = torch.nn.Linear(columns, columns)

    def forward(self, user: torch.Tensor, user_scale: torch.Tensor, items: torch.Tensor, item_scales: torch.Tensor) -> torch.Tensor:
        vector = self.tower(user.float() * user_scale.unsqueeze(1))
        return (items.float() * item_scales.unsqueeze(1)) @ vector.squeeze(0)


def build(folder: Path) -> None:
    """Export the model for any number of candidates, and save it."""
    users, items = Table(folder, "user"), Table(folder, "item")
    model = Scorer(users.weight.shape[1]).eval()
    model.load_state_dict(torch.load(folder / "dense.pt", weights_only=True))
    example = (*users[torch.tensor([0])], *items[torch.arange(2)])
    candidates = torch.export.Dim("candidates", min=1, max=MOST)
    shapes = ({}, {}, {0: candidates}, {0: candidates})
    program = torch.export.export(model, example, dynamic_shapes=shapes)
    torch.export.save(program, folder / "scorer.pt2")


def score(folder: Path, user: int, k: int = 5) -> list[tuple[int, float]]:
    """The `k` best items for a user."""
    users, items = Table(folder, "user"), Table(folder, "item")
    scorer = torch.export.load(folder / "scorer.pt2").module()
    with torch.no_grad():
        row = users[torch.tensor([user])]
        scores = torch.cat([scorer(*row, *items[part]) for part in torch.arange(len(items)).split(MOST)])
    best = scores.topk(min(k, len(scores)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


if __name__ == "__main__":
    command, served = sys.argv[1], Path(sys.argv[2])
    if command == "build":
        build(served)
    else:
        for item, value in score(served, int(sys.argv[3])):
            print(f"item {item}: {value:.4f}")
