"""benchmarks/bench_model.py: every variant computes what its name says, and a tiny run writes what the README shows."""

import copy
import functools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from support.checks import same_bits
from support.packages import needs
from support.paths import BENCHMARKS

needs("transformers")
sys.path.insert(0, str(BENCHMARKS))
import bench_model  # noqa: E402
import models  # noqa: E402
import readme_table  # noqa: E402

PRESET = models.PRESETS["smoke"]
NAMES = [name for name in models.PROVIDERS if models.why_absent(name, "cpu") is None]
# fp32 rounding of two layers, each some tens of operations of 6e-8, against the largest logit.
TOLERANCE = 1e-5


@pytest.fixture
def base() -> nn.Module:
    """The tiny model with matrices ten times those of its initialisation, lest the branches vanish beside the residual
    stream, and with gains that are not 1."""
    model = models.make_base(PRESET, torch.float32, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2) if "norm" in name else 10)
    return model


def variant(name: str, base: nn.Module) -> nn.Module:
    return models.build(name, base, PRESET.length)


def tokens(length: int = PRESET.length, batch: int = PRESET.batch) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def logits_by_hand(name: str, base: nn.Module, ids: Tensor) -> Tensor:
    """The formulas in float64 around the attention and MLP of the unchanged model; SPEC.md sections 1 and 5."""
    body, config = base.model, base.config
    d = config.hidden_size

    def rms(x: Tensor, gain: Any = 1.0) -> Tensor:
        return gain * x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)

    def dyt(x: Tensor, gain: Tensor) -> Tensor:
        return gain * torch.tanh(x)

    def site(x: Tensor, variance: Tensor, gain: Tensor, lam: float) -> Tensor:
        return gain * torch.tanh(lam * x / (10 * torch.sqrt(variance + config.rms_norm_eps)))

    norm = dyt if name == "DyT" else rms
    x = body.embed_tokens(ids) * (math.sqrt(d) if name == "DyT" else 1)
    rotary = body.rotary_emb(x, position_ids=torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1],) * 2, float("-inf"), dtype=x.dtype).triu(1)[None, None]
    for index, layer in enumerate(body.layers, 1):
        gain1, gain2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        scale = 1 / math.sqrt(index) if name == "LNS" else 1
        v = x.square().mean(-1, keepdim=True)
        y = site(x, v, gain1, 2.0) if "BHyT" in name else norm(x, gain1) * scale
        branch = layer.self_attn(hidden_states=y, position_embeddings=rotary, attention_mask=mask)[0]
        x = x + (rms(branch) if name == "Peri-LN" else branch)
        if name == "BHyT exact":
            v = x.square().mean(-1, keepdim=True)
        elif "BHyT" in name:
            values = layer.self_attn.v_proj.weight.view(2, 8, d).repeat_interleave(2, 0).reshape(d, d)
            c = (layer.self_attn.o_proj.weight @ values).square().sum() / (PRESET.length * d)
            v = v + c.detach() * 2.0**2 / 10**2
        y = site(x, v, gain2, 1.0) if "BHyT" in name else norm(x, gain2) * scale
        branch = layer.mlp(y)
        x = x + (rms(branch) if name == "Peri-LN" else branch)
    return base.lm_head(norm(x, body.norm.weight))


@pytest.mark.filterwarnings("ignore:bhyt.hf.convert")
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, base: nn.Module) -> None:
    """Logits are those of the variant's formulas in float64, and not another variant's."""
    with torch.no_grad():
        actual = variant(name, base)(tokens()).logits.double()
        exact = copy.deepcopy(base).double()
        for other in NAMES:
            distance = (actual - logits_by_hand(other, exact, tokens())).abs().max() / actual.abs().max()
            same = {name, other} <= {"HF RMSNorm", "F.rms_norm"} or (
                "BHyT" in name and "BHyT" in other and ("exact" in name) == ("exact" in other)
            )
            assert distance <= TOLERANCE if name == other or same else distance > 100 * TOLERANCE, other


@pytest.mark.filterwarnings("ignore:bhyt.hf.convert")
@pytest.mark.parametrize("name", [name for name in NAMES if "train" in models.PROVIDERS[name].tasks])
def test_training_step(name: str, base: nn.Module) -> None:
    """A gradient for every parameter; the embeddings' is that of the next token's mean cross-entropy in float64."""
    step = bench_model.TrainingStep(variant(name, base), tokens(), compiled=False)
    names = [each for each, _ in step.model.named_parameters()]
    grads = dict(zip(names, step(0)))
    assert len(grads) == len(names) and all(grad.isfinite().all() for grad in grads.values())
    exact = copy.deepcopy(base).double()
    logits = logits_by_hand(name, exact, tokens())
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    (expected,) = torch.autograd.grad(loss, exact.model.embed_tokens.weight)
    assert (grads["model.embed_tokens.weight"] - expected).norm() <= 10 * TOLERANCE * expected.norm()


@pytest.mark.filterwarnings("ignore:bhyt.hf.convert")
@pytest.mark.parametrize("name", NAMES)
def test_decoding(name: str, base: nn.Module) -> None:
    """Tokens from the static cache are those of recomputing everything at each step, in every call anew."""
    model, prompt = variant(name, base), tokens(PRESET.prompt, 1)
    decoding = bench_model.Decoding(model, prompt, PRESET.steps, compiled=False)
    slow = prompt
    with torch.no_grad():
        for _ in range(PRESET.steps + 1):
            slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    for _ in range(2):
        assert torch.equal(decoding(0), slow[:, PRESET.prompt + 1 :])


class Ops(TorchDispatchMode):
    """Counts the ops of bhyt that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bhyt":
            self.count[func._schema.name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.filterwarnings("ignore:bhyt.hf.convert")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_swapped_modules_are_the_converted_model(base: nn.Module, dtype: torch.dtype) -> None:
    """The same logits, bit for bit, by other ops: the adds are fused in one and not in the other. USERS row 14."""
    found, counts = [], []
    for name in ("BHyT", "BHyT, swapped modules"):
        with torch.no_grad(), Ops() as ops:
            found.append(variant(name, base.to(dtype))(tokens(), use_cache=False).logits)
        counts.append(ops.count)
    assert same_bits(*found)
    assert counts[0]["bhyt::add_forward_approx"] == counts[1]["bhyt::forward_approx"] == 2
    assert counts[0]["bhyt::forward_approx"] == counts[1]["bhyt::add_forward_approx"] == 0


@pytest.mark.filterwarnings("ignore:bhyt.hf.convert")
def test_variants_share_matrices_and_leave_the_base(base: nn.Module) -> None:
    """Every matrix of every variant is the base model's own, or has its values; the base model is not changed."""
    ids = tokens()
    with torch.no_grad():
        before = base(ids).logits
        for name in NAMES:
            own = dict(variant(name, base).named_parameters())
            matrices = {n.replace("_proj.0.", "_proj."): p for n, p in own.items() if p.dim() == 2}
            theirs = {n: p for n, p in base.named_parameters() if p.dim() == 2}
            assert matrices.keys() == theirs.keys()
            shared = [matrices[n] is p for n, p in theirs.items()]
            assert all(shared) if name != "BHyT, gain folded" else not any(shared)
        assert same_bits(base(ids).logits, before)


def test_sizes() -> None:
    """The presets have the parameters their names promise: 200M, 374M and Llama-3.2-1B's 1,235,814,400."""
    sizes = {}
    for name in ("200m", "374m", "1b"):
        model = models.make_base(models.PRESETS[name], torch.bfloat16, "meta")
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert round(sizes["200m"] / 1e7) == 20
    assert round(sizes["374m"] / 1e6) in (374, 375) and sizes["1b"] == 1_235_814_400


def test_guards(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant without its sites, and one whose loss is not finite, end the run."""
    provider = models.PROVIDERS["LNS"]
    monkeypatch.setitem(models.PROVIDERS, "LNS", models.Provider(lambda model, _: None, provider.is_site, (2, 0)))
    with pytest.raises(RuntimeError, match="LNS: expected 4 sites, found 0"):
        variant("LNS", base)
    with torch.no_grad():
        base.model.norm.weight[0] = float("nan")
    with pytest.raises(RuntimeError, match="the loss is nan"):
        bench_model.check("HF RMSNorm", base, PRESET)


def test_run_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager run of all providers has every field, and the README's table every provider and ratio."""
    results = tmp_path / "results"
    options = ["--preset", "smoke", "--modes", "eager", "--seconds", "0.01", "--out", str(results / "here/model.json")]
    monkeypatch.setattr(sys, "argv", ["bench_model.py", *options])
    for name, value in bench_model.common.FAULT_FREE.items():
        monkeypatch.setenv(name, value)  # or the script would start this process again
    bench_model.main()
    result = json.loads((results / "here/model.json").read_text())
    assert {"cpu", "torch", "transformers", "commit", "dirty", "date"} <= result["environment"].keys()
    assert result["absent"] == {"Liger RMSNorm": "runs on CUDA only"}
    assert [each["provider"] for each in result["models"]] == NAMES
    assert [each["sites"] for each in result["models"]] == [5, 5, 5, 9, 4, 4, 4, 4, 4, 4]
    train, decode = result["problems"]
    assert (train["task"], decode["task"]) == ("train", "decode") and {train["mode"], decode["mode"]} == {"eager"}
    eager = [name for name in NAMES if "eager" in models.PROVIDERS[name].modes]
    assert list(decode["providers"]) == eager and list(train["providers"]) == eager[:-1]
    for problem, count in ((train, PRESET.batch * PRESET.length), (decode, PRESET.steps)):
        for timing in problem["providers"].values():
            assert timing["samples"] >= 3
            assert timing["tokens_per_s"] == pytest.approx(1e6 * count / timing["us"], rel=1e-3)

    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:model -->\n<!-- /table:model -->\n")
    assert readme_table.main(["--pages", str(readme), "--results", str(results)]) == 0
    table = {line.split(" | ")[0]: line for line in readme.read_text().splitlines() if line.startswith("|")}
    speeds = [p["providers"] for p in (train, decode)]
    ratios = [f"{own['BHyT']['tokens_per_s'] / own['HF RMSNorm']['tokens_per_s']:.3f}" for own in speeds]
    assert table["| BHyT"] == f"| BHyT | {ratios[0]} | {ratios[1]} | 1.016 | 1.016 |"
    assert table["| BHyT, gain folded"].split(" | ")[1] == "-"
    assert {f"| {name}" for name in eager} <= table.keys()
    assert "Not measured: Liger RMSNorm (runs on CUDA only)." in readme.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:bhyt.hf.convert")
def test_compiled(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled (traced, not by Inductor), BHyT gives the eager gradients to fp32 rounding, and the same tokens."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    variants = {"BHyT": variant("BHyT", base)}
    for task in bench_model.TASKS:
        compiled, eager = (bench_model.calls_for(task, mode, variants, PRESET) for mode in ("compiled", "eager"))
        for name in variants:
            if task == "decode":
                assert torch.equal(compiled[name](0), eager[name](0))
            else:
                for actual, expected in zip(compiled[name](0), eager[name](0)):
                    assert (actual - expected).norm() <= 10 * TOLERANCE * expected.norm()
