"""The held-out loss that eight bits cost: models of examples/pretrain.py, as trained and with a planted outlier.

    python examples/pretrain.py --norm bhyt rmsnorm --out build/pretrain
    python benchmarks/quantized_accuracy.py --checkpoints build/pretrain   into results/<device>/quantized-accuracy.json

    shape="--layers 24 --dim 128 --batch 2 --steps 800 --warmup 80 --seed 1 --text c4.jsonl --out build/pretrain-24"
    python examples/pretrain.py --norm bhyt --lr 1e-2 $shape               the study's models, each at its best rate
    python examples/pretrain.py --norm rmsnorm --lr 1e-3 $shape
    python benchmarks/quantized_accuracy.py --checkpoints build/pretrain-24 --text c4.jsonl --name quantized-accuracy-24

    python benchmarks/figures.py quantized-accuracy-24                     docs/figures/quantization-outliers.png

Models    one with BHyT and one with RMSNorm: the same text, the same matrices at the start
Eight bits    weights int8 per output channel everywhere; o_proj, down_proj and lm_head quantise their input per row.
          Scales for the inputs of the linears that read a norm:
    bound         1/127, `bhyt.quantization.quantize`; BHyT only
    finer m       tanh(m lam/kappa)/127: a value beyond m standard deviations saturates; BHyT only
    calibrated    per tensor, the largest magnitude over 8 training sequences
    per token     the largest of each row, as it runs
    RMSNorm's gains are folded as BHyT's are.
Outliers  one channel of the residual stream, that of least energy, times 100 or 1000 wherever something writes to it.
          Then the model trains for `--steps` more; without them its own loss is that of no model. Or the channel is
          scaled in the embedding of every 16th held-out token alone, unseen by the calibration and without training
Norms and cases run in `--processes`, one thread each. What the result has already is not measured again: start the same
command once more after an interruption.
"""

import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Callable, Optional

import common
import torch
from torch import Tensor, nn

from bhyt.quantization import QuantizedLinear, quantize

sys.path.insert(0, str(common.REPOSITORY / "examples"))
from pretraining.data import load_corpus  # noqa: E402
from pretraining.model import Decoder, ModelConfig  # noqa: E402
from pretraining.norms import BLOCKS  # noqa: E402

SITES = (("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj")),
         ("post_attention_layernorm", "mlp", ("gate_proj", "up_proj")))  # fmt: skip
OTHERS = (("self_attn", "o_proj"), ("mlp", "down_proj"))
BATCH = 8  # of what is not training
CASES = (("none", 1), ("every token", 100), ("every token", 1000), ("every 16th", 100), ("every 16th", 1000))
FINER = (3, 4, 5, 6)


def load(norm: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model, its head untied, and how it was trained."""
    state = torch.load(folder / f"{norm}.pt", map_location="cpu", weights_only=False)
    identity = state["identity"]
    config = ModelConfig(**{field.name: identity[field.name] for field in dataclasses.fields(ModelConfig)})
    model = Decoder(config, BLOCKS[norm])
    model.load_state_dict(state["model"])
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.detach().clone())
    trained = {key: identity[key] for key in ("lr", "batch", "seed", "text")}
    return model, {"step": state["step"], **trained}


@torch.no_grad()
def folded(model: nn.Module) -> nn.Module:
    """For inference, with gains of 1."""
    model.eval().requires_grad_(False)
    for layer in model.layers:
        for site, part, linears in SITES:
            gain = getattr(layer, site).weight
            for name in linears:
                getattr(getattr(layer, part), name).weight.mul_(gain)
            gain.fill_(1)
    return model


@torch.no_grad()
def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    total = 0.0
    for x, y in zip(inputs.split(BATCH), targets.split(BATCH)):
        total += nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / targets.numel()


@torch.no_grad()
def plant(model: nn.Module, channel: int, times: float) -> nn.Module:
    """A copy with the stream's channel scaled by whatever writes to it."""
    model = copy.deepcopy(model)
    model.embed_tokens.weight[:, channel] *= times
    for layer in model.layers:
        for part, name in OTHERS:
            getattr(getattr(layer, part), name).weight[channel] *= times
    return model


class RareOutlier(nn.Module):
    """An embedding whose channel is scaled at every 16th position."""

    def __init__(self, embedding: nn.Embedding, channel: int, times: float) -> None:
        super().__init__()
        self.embedding, self.channel, self.times = embedding, channel, times

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).clone()
        x[:, ::16, self.channel] *= self.times
        return x


def recover(model: nn.Module, corpus: Any, batch: int, steps: int) -> None:
    """Trains on, with data that the first training has not seen."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        if step % 10 == 0:
            model.refresh()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        inputs, targets = corpus.batch(step, batch, model.config.seq_len, 2)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.refresh()


def bound(model: nn.Module, deviations: Optional[float] = None) -> nn.Module:
    """The eight-bit BHyT model; with a finer scale, the largest of what so many deviations reach."""
    model = copy.deepcopy(model)
    quantize(model)
    if deviations is not None:
        for layer in model.layers:
            for site, part, linears in SITES:
                module = getattr(layer, site)
                reach = math.tanh(deviations * module.lam.abs().item() / module.kappa)
                module.scale *= reach
                for name in linears:
                    getattr(getattr(layer, part), name).weight_scale.mul_(reach)
    return model


class Calibrated(nn.Module):
    """A linear behind a static scale of its input, any norm's."""

    def __init__(self, linear: nn.Linear, largest: float) -> None:
        super().__init__()
        self.scale = largest / 127
        self.linear = QuantizedLinear(linear, torch.int8, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x / self.scale).round().clamp(-127, 127).to(torch.int8))


def every_linear(model: nn.Module, of_norms: Callable[[int, str, str], nn.Module]) -> nn.Module:
    """A copy: of_norms(layer, part, name) where a norm is read, a scale per row elsewhere."""
    model = copy.deepcopy(model)
    for index, layer in enumerate(model.layers):
        for _, part, linears in SITES:
            for name in linears:
                setattr(getattr(layer, part), name, of_norms(index, part, name))
        for part, name in OTHERS:
            setattr(getattr(layer, part), name, QuantizedLinear(getattr(getattr(layer, part), name), torch.int8))
    model.lm_head = QuantizedLinear(model.lm_head, torch.int8)
    return model


def linear_of(model: nn.Module, index: int, part: str, name: str) -> nn.Linear:
    return getattr(getattr(model.layers[index], part), name)


def per_token(model: nn.Module) -> nn.Module:
    return every_linear(model, lambda *at: QuantizedLinear(linear_of(model, *at), torch.int8))


@torch.no_grad()
def magnitudes(model: nn.Module, inputs: Tensor) -> dict[tuple[int, str], float]:
    """The largest input of each part's linears."""
    found: dict[tuple[int, str], float] = {}

    def watch(key: tuple[int, str]) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[key] = max(found.get(key, 0.0), given[0].abs().max().item())

        return hook

    handles = [getattr(getattr(layer, part), linears[0]).register_forward_pre_hook(watch((index, part)))
               for index, layer in enumerate(model.layers) for _, part, linears in SITES]  # fmt: skip
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


def calibrated(model: nn.Module, largest: dict[tuple[int, str], float]) -> nn.Module:
    return every_linear(model, lambda *at: Calibrated(linear_of(model, *at), largest[at[:2]]))


@torch.no_grad()
def channel_of_least_energy(model: nn.Module, inputs: Tensor) -> int:
    branch, stream, rotary = None, model.embed_tokens(inputs), model.rotary(model.embed_tokens(inputs))
    for layer in model.layers:
        branch, stream = layer(branch, stream, rotary)
    return int((stream + branch).square().mean((0, 1)).argmin())


def measure(norm: str, where: str, times: float, given: argparse.Namespace) -> dict[str, Any]:
    """The losses of one case."""
    torch.set_num_threads(1)
    model, trained = load(norm, given.checkpoints)
    seq_len = model.config.seq_len
    corpus = load_corpus(given.text, seq_len)
    held_out = corpus.validation(given.windows, seq_len)
    calibration, _ = corpus.batch(10**6, 8, seq_len, 1)
    channel = channel_of_least_energy(model, calibration)
    if where == "every token":
        model = plant(model, channel, times)
        recover(model, corpus, trained["batch"], given.steps)
    model = folded(model)
    largest = magnitudes(model, calibration)
    if where == "every 16th":
        model.embed_tokens = RareOutlier(model.embed_tokens, channel, times)
    ways: dict[str, Callable[[], nn.Module]] = {"float": lambda: model, "per token": lambda: per_token(model)}
    ways["calibrated"] = lambda: calibrated(model, largest)
    if norm == "bhyt":
        ways["bound"] = lambda: bound(model)
        ways |= {f"finer {m}": lambda m=m: bound(model, m) for m in given.finer}
    losses = {way: round(loss(make(), *held_out), 5) for way, make in ways.items()}
    return {"norm": norm, "where": where, "times": times, "channel": channel, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=common.REPOSITORY / "build" / "pretrain")
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="as given to pretrain.py")
    parser.add_argument("--windows", type=int, default=128, help="held-out sequences")
    parser.add_argument("--steps", type=int, default=200, help="of training behind a planted outlier")
    parser.add_argument("--finer", nargs="*", type=int, default=FINER, help="the values of m")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--name", default="quantized-accuracy", help="of the result")
    parser.add_argument("--out", help="write the JSON here instead")
    args = parser.parse_args()
    models = {norm: load(norm, args.checkpoints) for norm in ("bhyt", "rmsnorm")}
    config = models["bhyt"][0].config
    payload: dict[str, Any] = {
        "benchmark": "quantized-accuracy", "environment": common.environment(), "model": dataclasses.asdict(config),
        "text": load_corpus(args.text, config.seq_len).name,
        "tokens": args.windows * config.seq_len, "steps": args.steps,
        "trained": {norm: trained for norm, (_, trained) in models.items()},
    }  # fmt: skip
    path = common.result_path(args.name, out=args.out)
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(key) != payload[key] for key in ("model", "text", "tokens", "steps", "trained")):
        before = {}  # of other settings
    records = {(r["norm"], r["where"], r["times"]): r for r in before.get("records", [])}
    cases = [(norm, *case) for norm in models for case in CASES]
    missing = sorted((case for case in cases if case not in records), key=lambda case: case[1] == "every token")
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(measure, *case, args): case for case in missing}  # those that train come last
        for future in as_completed(pending):
            case = pending[future]
            records[case] = record = future.result()
            own = record["losses"]["float"]
            print(*case, own, {way: round(value - own, 5) for way, value in record["losses"].items()}, flush=True)
            payload["records"] = [records[case] for case in cases if case in records]
            common.write_json(args.name, payload, out=args.out)
    print("written to", path)


if __name__ == "__main__":
    main()
