"""`load_checkpoint(anew=True)`: another training begins with what one has learned, under settings of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed.errors import CheckpointError
from tests.harness import run_ranks
from tests.ranks.checkpoint.test_checkpoint_load import made, saved, step, weights


def loaded(folder: str, lr: float, anew: bool = True, third: bool = False) -> Any:
    model, optimizer = made(se.optim.Adam(lr=lr), plan={"user": se.table_wise(0)}, third=third)
    torch.manual_seed(5)
    new = ["city"] if third else []
    restored = se.load_checkpoint(folder, model, optimizer=optimizer, anew=anew, new=new)
    return model, optimizer, restored


def begun(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    torch.manual_seed(5)
    draw = torch.rand(2)
    moved = {}
    for name, lr, anew in (("resumed", 0.1, False), ("anew", 0.1, True), ("slower", 0.05, True)):
        model, optimizer, restored = loaded(folder, lr, anew)
        if name == "slower":
            found["rates"] = [group["lr"] for group in optimizer.param_groups]
            found["random"] = (restored.random, torch.equal(torch.rand(2), draw))
        before = weights(model)
        found.setdefault("weights", before)
        step(model, optimizer, 3)
        moved[name] = {key: value - before[key] for key, value in weights(model).items()}
    found["moved"] = moved
    model, optimizer, _ = loaded(folder, 0.1, third=True)
    before = weights(model)["city"]
    step(model, optimizer, 3)
    found["city"] = weights(model)["city"] - before
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_was_learned_comes_along_and_what_was_set_does_not(tmp_path: Path, world_size: int) -> None:
    expected = run_ranks(2, saved, str(tmp_path))[0]
    found = run_ranks(world_size, begun, str(tmp_path))[0]
    torch.testing.assert_close(found["weights"], expected, rtol=0, atol=0)
    assert found["rates"][-1] == 0.05, "0.1 when it was saved"
    assert found["random"] == (None, True), "the next draw is the one that would have come without"
    moved = found["moved"]
    torch.testing.assert_close(moved["anew"], moved["resumed"], rtol=0, atol=0)  # means of Adam's, and how many steps they are of
    for table in ("user", "item"):
        torch.testing.assert_close(moved["slower"][table], moved["resumed"][table] / 2)
    touched = found["city"] != 0
    assert touched.any()
    # Adam's first step is as long as its rate, whatever the gradient; the fourth, with means that begin now, would be shorter.
    torch.testing.assert_close(found["city"][touched].abs(), torch.full_like(found["city"][touched], 0.1), rtol=1e-3, atol=0)


def test_a_checkpoint_of_another_model_is_refused_all_the_same(tmp_path: Path) -> None:
    run_ranks(1, saved, str(tmp_path))
    model, optimizer = made(third=True)
    with pytest.raises(CheckpointError, match=r"they differ in\n.*city"):
        se.load_checkpoint(tmp_path, model, optimizer=optimizer, anew=True)
    model, optimizer = made(se.optim.RowwiseAdagrad(lr=0.1))
    with pytest.raises(CheckpointError, match="has the optimizer RowwiseAdagrad, in the checkpoint Adam"):
        se.load_checkpoint(tmp_path, model, optimizer=optimizer, anew=True)
