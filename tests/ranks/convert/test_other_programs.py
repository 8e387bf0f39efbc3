"""Programs that others wrote, as docs/in-other-programs.md has them: sharded, on one rank and on two, each ends with the weights of
its plain twin in one process. What they ask for in vain is refused by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardembed as se
from shardembed.errors import ConfigError, MissedStepWarning, PickleError, UnsupportedError
from tests.amount import exhaustive, sampled
from tests.harness import run_ranks
from tests.ranks.convert.test_other_loops import importable, train


@dataclass(frozen=True)
class Program:
    """package: what it needs. dtype: float32 where the program itself casts to that. fresh: it leaves traces in its process."""

    package: str
    install: str
    dtype: torch.dtype = torch.float32
    fresh: bool = False


OLD = "recbole, which needs NumPy 1 (it says np.float_)"
PROGRAMS = {
    "deepctr_loop": Program("deepctr_torch", "deepctr-torch"),
    "rechub_loop": Program("torch_rechub", "torch-rechub"),
    "recbole_loop": Program("recbole", OLD),
    "transformers_loop": Program("transformers", "transformers", torch.float64, fresh=True),
    "pyg_loop": Program("torch_geometric", "torch_geometric", torch.float64),
}
BOTH = ("deepctr_loop", "rechub_loop")  # with a torch optimizer and penalties too
ONE_RANK = ("recbole_loop",)  # its own wrapping in DistributedDataParallel wants a GPU a rank
SLOW = ("transformers_loop",)  # to import
NAMES = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}  # that NumPy 2 has no more, and RecBole asks for


def needed(example: str) -> Program:
    program = PROGRAMS[example]
    if not importlib.util.find_spec(program.package):
        pytest.skip(f"{program.package} is not installed: pip install --no-deps {program.install}")
    return program


@contextmanager
def ready(dtype: torch.dtype) -> Iterator[None]:
    """The examples can be imported, and nothing that they import asks the network for newer versions of itself."""
    with importable(dtype), mock.patch("requests.get", side_effect=OSError("tests ask nobody")):
        before = set(threading.enumerate())
        importlib.import_module("requests")
        with mock.patch.multiple(np, create=True, **{name: kind for name, kind in NAMES.items() if not hasattr(np, name)}):
            yield
        for thread in set(threading.enumerate()) - before:
            if not thread.daemon:
                thread.join(5)


def run(rank: int, world_size: int, example: str, folder: str, function: str) -> None:
    with ready(PROGRAMS[example].dtype):
        if dist.is_initialized():
            train(rank, world_size, example, folder, function, PROGRAMS[example].dtype)
        else:  # one rank, in this process, that is part of no job
            getattr(importlib.import_module(example), function)(folder)


def plain_twin(module: Any, example: str, folder: Path, function: str, world_size: int) -> nn.Module:
    if function == "penalised":
        return module.train_plain(module.L2)
    arguments: dict[str, tuple[Any, ...]] = {"transformers_loop": (str(folder / "plain"),), "pyg_loop": (world_size,)}
    return module.train_plain(*arguments.get(example, ()))


CASES = [(example, "main", ranks) for example in PROGRAMS for ranks in (1, 2) if ranks == 1 or example not in ONE_RANK]
CASES += [(example, "penalised", 2) for example in BOTH]


@pytest.mark.parametrize(
    ("example", "function", "world_size"),
    [*sampled(case for case in CASES if case[0] not in SLOW), *(exhaustive(*case) for case in CASES if case[0] in SLOW)],
)
def test_a_program_ends_with_the_weights_of_its_plain_twin(
    example: str, function: str, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = needed(example)
    monkeypatch.chdir(tmp_path)  # RecBole leaves a folder where it runs
    saved = tmp_path / "saved"
    run_ranks(world_size, run, example, str(saved), function, fresh_ranks=program.fresh)
    with ready(program.dtype):
        module = importlib.import_module(example)
        plain = plain_twin(module, example, tmp_path, function, world_size)
        trained, untrained = module.build(), module.build().state_dict()
    se.load_plain(saved, trained)
    close = {"rtol": 1e-9, "atol": 1e-10} if program.dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    tables = [f"{name}.weight" for name, part in plain.named_modules() if isinstance(part, nn.Embedding)]
    for name, weights in plain.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], weights, **close, msg=lambda text, name=name: f"{name}: {text}")
    for name in tables:
        assert not torch.allclose(plain.state_dict()[name], untrained[name], atol=1e-3), f"{name} was not trained"


def test_deepctr_evaluates_a_sharded_model_as_a_plain_one() -> None:
    needed("deepctr_loop")
    with ready(torch.float32):
        module = importlib.import_module("deepctr_loop")
        inputs, labels = module.data()
        model = module.train_plain()
        model.compile("sgd", "binary_crossentropy", metrics=["auc"])
        wanted, expected = model.evaluate(dict(inputs), labels)["auc"], model.predict(dict(inputs))
        model.regularization_weight.clear()
        model.optim = None
        se.shard(model, optimizer=se.optim.SGD(lr=0.1), verbose=False)
        assert model.evaluate(dict(inputs), labels)["auc"] == wanted > 0.6
        np.testing.assert_array_equal(model.predict(dict(inputs)), expected)


def test_fit_of_rechub_ends_in_an_error_that_says_how_to_save(tmp_path: Path) -> None:
    needed("rechub_loop")
    with ready(torch.float32):
        module = importlib.import_module("rechub_loop")
        model = module.sharded(None)
        trainer = module.CTRTrainer(model, optimizer_params={"lr": 0.1}, n_epoch=1, model_path=str(tmp_path))
        with pytest.raises(PickleError, match=r"embed_dict.user' lies cut over the ranks.*se.save_checkpoint\(folder, model\)"):
            trainer.fit(module.DataLoader(module.data(), 256))


@pytest.mark.exhaustive
def test_tables_that_transformers_ties_to_the_output_stay_plain() -> None:
    needed("transformers_loop")
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"vocab_size": 50, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**small))
    with pytest.raises(ConfigError, match=r"transformer.wte: its weight is also 'lm_head.weight'.*skip=\['transformer.wte'\]"):
        se.shard(model, verbose=False)
    words = torch.arange(6)[None]
    model.eval()  # no dropout
    expected = model(words, labels=words).loss
    se.shard(model, skip=["transformer.wte"], verbose=False)
    torch.testing.assert_close(model(words, labels=words).loss, expected)
    assert isinstance(model.transformer.wte, nn.Embedding)
    untied = GPT2LMHeadModel(GPT2Config(**small, tie_word_embeddings=False)).eval()
    expected = untied.generate(words, max_new_tokens=2, do_sample=False)
    assert torch.equal(se.shard(untied, verbose=False).generate(words, max_new_tokens=2, do_sample=False), expected)


def test_a_graph_model_that_computes_with_the_whole_table_is_refused() -> None:
    needed("pyg_loop")
    from torch_geometric.nn import LightGCN

    edges = torch.tensor([[0, 1, 4, 5], [4, 5, 0, 1]])
    model = se.shard(LightGCN(6, 4, 2), optimizer=se.optim.SGD(lr=0.1), verbose=False)
    with pytest.raises(UnsupportedError, match=r"table 'embedding' lies cut over the ranks, so there is no weight tensor"):
        model(edges)


def test_a_model_of_a_knowledge_graph_is_sharded_as_it_is() -> None:
    needed("pyg_loop")
    from torch_geometric.nn import TransE

    def losses(optimizer: str) -> list[float]:
        torch.manual_seed(0)
        model = TransE(num_nodes=20, num_relations=3, hidden_channels=8, sparse=optimizer == "torch's, sparse")
        if optimizer == "ours":
            steps: torch.optim.Optimizer = se.Optimizer(se.shard(model, optimizer=se.optim.Adagrad(lr=0.1), verbose=False))
        else:
            model = model if optimizer == "plain" else se.shard(model, verbose=False)
            steps = torch.optim.Adagrad(model.parameters(), lr=0.1)
        found = []
        for _ in range(3):
            torch.manual_seed(1)  # of the negatives that loss() draws, too
            loss = model.loss(torch.randint(20, (16,)), torch.randint(3, (16,)), torch.randint(20, (16,)))
            steps.zero_grad()
            loss.backward()
            steps.step()
            found.append(loss.item())
        return found

    expected = losses("plain")
    assert expected[2] < expected[0]
    for optimizer in ("ours", "torch's", "torch's, sparse"):
        torch.testing.assert_close(losses(optimizer), expected)


def test_an_optimizer_that_deepctr_makes_itself_warns_of_tables_that_do_not_learn() -> None:
    needed("deepctr_loop")
    with ready(torch.float32):
        module = importlib.import_module("deepctr_loop")
        model = module.build()
        model.regularization_weight.clear()
        se.shard(model, optimizer=se.optim.Adagrad(lr=0.1), verbose=False)
        with pytest.warns(MissedStepWarning, match=r"backward passes are waiting for Optimizer.step\(\)"):
            module.fit(model, "adagrad")
