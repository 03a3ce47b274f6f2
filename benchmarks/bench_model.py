"""Training and decoding of Llama-like models that differ in their normalisation, eager and compiled.

    python benchmarks/bench_model.py                                          into results/<device>/model.json
    python benchmarks/bench_model.py --device cuda --preset 374m,1b           the paper's 374M model and Llama-3.2-1B

Presets (models.py)     cpu, 200m, 374m, 1b; smoke is for tests
Providers (models.py)   variants of one model of `transformers`, with the same matrices
    HF RMSNorm          as it is: what the ratios refer to, eager for eager and compiled for compiled
    F.rms_norm, Liger RMSNorm      another RMSNorm in its place
    DyT, Peri-LN, LNS   Peri-LN and LNS from the model's own RMSNorm; DyT as its formula, and a scale of the embeddings
    BHyT exact, BHyT    `bhyt.hf.convert`: the residual add behind the attention fused into the second site
    BHyT, swapped modules          the same sites and the variance handed on, every residual add an op of its own
    BHyT, gain folded   decoding only
    BHyT, formulas      compiled only, under `bhyt.decompose_when_compiling("all")`
Tasks
    train     forward, loss and backward of one fixed batch: gradients of all parameters, no optimiser
    decode    greedy steps one token at a time, batch 1, behind a prompt in a static cache; the prompt is not timed
Wall time, host included, since decoding eagerly consists of it; on a GPU up to the end of the work on the device. A
compiled forward is one graph for the whole model; on a GPU, when decoding, replayed as a CUDA graph
("reduce-overhead"). The first run compiles for minutes; Inductor's cache keeps it.
"""

import argparse
from dataclasses import asdict
from math import isfinite
from types import FunctionType, MethodType
from typing import Any, Callable, Mapping

import common
import models
import torch
import transformers
from bench_compile import synchronised
from torch import Tensor, nn

import bhyt

TASKS, MODES = ("train", "decode"), ("eager", "compiled")

# Ratios to RMSNorm in arXiv 2601.09719.
PAPER = {
    "train": {"BHyT": round(83.0 / 81.7, 4), "BHyT exact": round(0.335 / 0.346, 4)},
    "decode": {"BHyT": round(1199.9 / 1181, 4), "DyT": round(1352.0 / 1181, 4), "Peri-LN": round(1017 / 1181, 4)},
}
PAPER_NOTE = (
    "Paper: Llama-1B on GPUs (arXiv 2601.09719), 83.0K training tokens/s against RMSNorm's 81.7K, decoding 1199.9"
    " against 1181, DyT 1352.0, Peri-LN 1017; exact sites from its ablation, 0.335 against 0.346 steps/s, where BHyT"
    " has 0.381."
)


def compile_alone(method: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile of a bound method, with a code object of its own: what was compiled for one is tried in turn."""
    function = method.__func__
    twin = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return torch.compile(MethodType(twin, method.__self__), fullgraph=True, dynamic=False, **options)


def under(setting: str, call: common.Call) -> common.Call:
    """The call under a setting of `bhyt.decompose_when_compiling`, which holds for the process."""

    def chosen(i: int) -> Any:
        bhyt.decompose_when_compiling(setting)
        return call(i)

    return chosen


class TrainingStep:
    """Forward, loss and backward; returns the gradients of all parameters."""

    def __init__(self, model: nn.Module, tokens: Tensor, compiled: bool) -> None:
        self.model, self.tokens = model, tokens
        self.parameters = tuple(model.parameters())
        self.run = compile_alone(self.loss) if compiled else self.loss
        self(0)

    def loss(self) -> Tensor:
        return self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss

    def __call__(self, _: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.run(), self.parameters)


class Decoding:
    """`steps` greedy tokens behind a prompt [B, T] in a static cache; returns them, [B, steps]."""

    def __init__(self, model: nn.Module, prompt: Tensor, steps: int, compiled: bool) -> None:
        self.model, self.steps, self.length = model, steps, prompt.shape[1]
        self.cache = transformers.StaticCache(model.config, max_cache_len=self.length + steps)
        self.run = self.logits
        if compiled:
            mode = "reduce-overhead" if prompt.is_cuda else None
            self.run = compile_alone(self.logits, mode=mode)
        with torch.no_grad():
            self.first = self.logits(prompt)[:, -1:].argmax(-1)
        self(0)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True).logits

    @torch.no_grad()
    def __call__(self, _: int) -> Tensor:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)
        tokens = [self.first]
        for _ in range(self.steps):
            tokens.append(self.run(tokens[-1])[:, -1:].argmax(-1))
        return torch.cat(tokens[1:], 1)


def calls_for(
    task: str, mode: str, variants: Mapping[str, nn.Module], preset: models.Preset
) -> dict[str, common.Call]:
    """What is timed, by provider: warm, and compiled where asked."""
    size = (preset.batch, preset.length) if task == "train" else (1, preset.prompt)
    compiled = mode == "compiled"
    torch._dynamo.reset()
    calls: dict[str, common.Call] = {}
    for name, model in variants.items():
        provider = models.PROVIDERS[name]
        if task not in provider.tasks or mode not in provider.modes:
            continue
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, model.config.vocab_size, size, generator=generator).to(model.device)
        bhyt.decompose_when_compiling(provider.decompose)
        if task == "train":
            call: common.Call = TrainingStep(model, tokens, compiled)
        else:
            call = Decoding(model, tokens, preset.steps, compiled)
        if tokens.is_cuda:
            call = synchronised(call)
        calls[name] = under(provider.decompose, call) if compiled else call
    bhyt.decompose_when_compiling("none")
    return calls


def check(name: str, model: nn.Module, preset: models.Preset) -> dict[str, Any]:
    """Facts about a variant.

    Raises:
        RuntimeError: its loss is not finite.
    """
    tokens = torch.arange(preset.length, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
    if not isfinite(loss):
        raise RuntimeError(f"{name}: the loss is {loss}")
    parameters = sum(p.numel() for p in model.parameters())
    return {"sites": models.count_sites(name, model), "parameters": parameters, "loss": round(loss, 4)}


def measure(
    task: str, mode: str, variants: Mapping[str, nn.Module], preset: models.Preset, seconds: float
) -> dict[str, Any]:
    """One problem: every provider's time and tokens/s."""
    calls = calls_for(task, mode, variants, preset)
    tokens = preset.batch * preset.length if task == "train" else preset.steps
    providers = common.timings_record(common.interleave(calls, seconds=seconds))
    for timing in providers.values():
        timing["tokens_per_s"] = round(1e6 * tokens / timing["us"], 2)
    return {"task": task, "mode": mode, "tokens": tokens, "providers": providers}


def report(record: Mapping[str, Any]) -> None:
    """Print a problem: tokens/s, ratio to the baseline, the paper's ratio."""
    base = record["providers"][models.BASELINE]["tokens_per_s"]
    for name, timing in record["providers"].items():
        paper = PAPER[record["task"]].get(name)
        line = f"{record['preset']:6}{record['dtype']:6}{record['task']:7}{record['mode']:9} {name:22}"
        line += f"{timing['tokens_per_s']:12.1f} tokens/s {timing['tokens_per_s'] / base:7.3f}"
        print(line + (f"   paper, Llama-1B on GPUs: {paper:.3f}" if paper else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", help="comma list of " + ", ".join(models.PRESETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", help="comma list instead of the preset's, eager and compiled")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--providers", help="semicolon list; the baseline is always there")
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing per problem")
    parser.add_argument("--out", help="write the JSON here instead")
    args = parser.parse_args()
    common.reexecute()

    wanted = args.providers.split(";") if args.providers else list(models.PROVIDERS)
    names = [name for name in models.PROVIDERS if name in wanted or name == models.BASELINE]
    absent = {name: reason for name in names if (reason := models.why_absent(name, args.device))}
    names = [name for name in names if name not in absent]
    environment, device = common.environment(), None
    if args.device != "cpu":
        import common_cuda

        environment, device = common_cuda.environment(), common.slug(torch.cuda.get_device_name())
    environment["transformers"] = transformers.__version__
    payload: dict[str, Any] = {
        "benchmark": "model", "environment": environment, "baseline": models.BASELINE, "paper": PAPER,
        "paper_note": PAPER_NOTE, "absent": absent, "presets": {}, "models": [], "problems": [],
    }  # fmt: skip
    for preset_name in args.preset.split(","):
        preset = models.PRESETS[preset_name]
        payload["presets"][preset_name] = asdict(preset)
        for dtype in (args.dtypes or preset.dtypes).split(","):
            base = models.make_base(preset, common.DTYPES[dtype], args.device)
            variants = {name: models.build(name, base, preset.length) for name in names}
            key = {"preset": preset_name, "dtype": dtype}
            payload["models"] += [
                {**key, "provider": name, **check(name, model, preset)} for name, model in variants.items()
            ]
            # Here and below: a run that is cut short leaves what it has.
            path = common.write_json("model", payload, device=device, out=args.out)
            compiled = dtype in (args.dtypes or preset.compiled).split(",")
            for mode in args.modes.split(","):
                if mode == "compiled" and not compiled:
                    continue
                for task in args.tasks.split(","):
                    record = {**key, **measure(task, mode, variants, preset, args.seconds)}
                    report(record)
                    payload["problems"].append(record)
                    path = common.write_json("model", payload, device=device, out=args.out)
    for name, reason in absent.items():
        print(f"absent: {name}, {reason}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
