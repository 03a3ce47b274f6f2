"""A decoder with both kinds of site, what a step of training makes of it, and processes that know the op library
alone."""

import sys
from typing import Dict

import torch
from torch import Tensor, nn

import bhyt
from support.fresh import run_fresh
from support.paths import EXAMPLES, TESTS

sys.path.insert(0, str(EXAMPLES))
from pretraining.model import Decoder, ModelConfig  # noqa: E402
from pretraining.norms import BLOCKS  # noqa: E402

CONFIG = ModelConfig(vocab=50, layers=3, dim=64, heads=4, kv_heads=2, seq_len=32)


def decoder() -> nn.Module:
    """A Llama-like model with grouped-query attention, exact and approximate sites."""
    torch.manual_seed(0)
    return Decoder(CONFIG, BLOCKS["bhyt"])


def tokens(length: int = 17) -> Tensor:
    return torch.randint(0, CONFIG.vocab, (2, length), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def one_step(model: nn.Module, ids: Tensor) -> Dict[str, Tensor]:
    """What train_scripted.cpp writes."""
    results = {"logits": model(ids[:, :-1]).detach()}
    loss = loss_of(model, ids)
    loss.backward()
    results["loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        results[f"grad.{name}"] = parameter.grad.clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return results | {name: parameter.detach() for name, parameter in model.named_parameters()}


def fresh_process(code: str, *arguments: object, library: str = "") -> None:
    """Runs code in a Python that knows the op library, or this copy of it, and nothing else of bhyt."""
    prologue = "import sys, torch; torch.ops.load_library(sys.argv[1]); a = sys.argv[2:]\n"
    # Not in the repository's root, where an installed bhyt is hidden.
    run = run_fresh(prologue + code, library or bhyt.library_path(), *arguments, cwd=TESTS)
    assert run.returncode == 0, run.stderr


def assert_same_results(actual: Tensor, expected: Tensor) -> None:
    """Compilers fuse what is around the ops: 1e-5, a few float32 roundings per layer."""
    assert actual.shape == expected.shape and (actual - expected).norm() <= 1e-5 * expected.norm()
