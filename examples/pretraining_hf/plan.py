"""What a run will be, before it starts: parameters, tokens, steps, and an estimate of the memory per device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

import bhyt
import bhyt.hf

NORMS = {"bhyt": "bhyt", "bhyt-exact": "bhytstar", "rmsnorm": None}  # norm -> norm_type of bhyt.hf.convert


def build_model(shape: dict[str, Any], norm: str, seq_len: int, exact_layers: int = 0, unit_gains: bool = False) -> Any:
    """A Llama with fresh float32 weights from torch's random state; its norms converted, unless they stay."""
    config = LlamaConfig(**shape, max_position_embeddings=seq_len)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if NORMS[norm]:
        bhyt.hf.convert(model, norm_type=NORMS[norm], seq_len=seq_len, exact_layers=exact_layers, unit_gains=unit_gains)
    return model


def checkpoint_activations(model: Any) -> None:
    """Layers keep their inputs, and are computed again in backward."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        shape: as LlamaConfig takes it.
        batch: sequences per optimiser step, of all devices.
        micro_batch: sequences per device at once.
        strategy: how the devices share the model: ddp, fsdp2, zero1, zero2 or zero3.
    """

    shape: dict[str, Any]
    norm: str
    exact_layers: int
    unit_gains: bool
    seq_len: int
    batch: int
    micro_batch: int
    steps: int
    devices: int
    strategy: str
    bf16: bool
    checkpointing: bool

    @property
    def accumulation(self) -> int:
        return self.batch // (self.devices * self.micro_batch)

    def lines(self) -> list[str]:
        shape, model = self.shape, self.without_storage()
        memory = self.memory(model)
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
        return [
            f"{sum(p.numel() for p in model.parameters()):,} parameters: {shape['num_hidden_layers']} layers, width "
            f"{shape['hidden_size']}, {shape['num_attention_heads']} heads ({shape['num_key_value_heads']} of keys and "
            f"values), MLP {shape['intermediate_size']}, vocabulary {shape['vocab_size']:,}, {self.norm}",
            f"{self.steps:,} steps of {self.batch} sequences of {self.seq_len} tokens: "
            f"{self.steps * self.batch * self.seq_len:,} tokens; a step is {self.devices} x {self.micro_batch} "
            f"sequences, accumulated {self.accumulation} times",
            f"memory per device, {self.strategy} in {'bf16' if self.bf16 else 'fp32'}, estimated in GiB: {parts}; "
            f"together {sum(memory.values()) / 2**30:.2f}, beside what the framework needs for itself",
        ]

    def without_storage(self) -> Any:
        with torch.device("meta"):
            return build_model(self.shape, self.norm, self.seq_len, self.exact_layers, self.unit_gains)

    def memory(self, model: Any) -> dict[str, float]:
        """Bytes per device. Activations are those that a forward saves; the rest follows from the number of weights."""
        n, share = sum(p.numel() for p in model.parameters()), 1 / self.devices
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        low = 2 if self.bf16 else 4  # bytes of a number that is computed with
        if self.strategy == "ddp":
            sizes = {"weights": 4 * n, "gradients": 4 * n, "AdamW": 8 * n}
            if self.devices > 1:
                sizes["DDP's buckets"] = 4 * n
        elif (
            self.strategy == "fsdp2"
        ):  # whole: two layers, since the next one is fetched in advance, and what is in none
            whole = low * (2 * layer + n - layer * len(model.model.layers))
            sizes = {"weights": 4 * n * share + whole, "gradients": 4 * n * share, "AdamW": 8 * n * share}
        else:  # the float32 weights are the optimiser's
            zero3, partitioned = self.strategy == "zero3", self.strategy in ("zero2", "zero3")
            sizes = {
                "weights": low * (n * share + 2 * layer) if zero3 else low * n,
                "gradients": low * n * (share if partitioned else 1),
                "AdamW": 12 * n * share,
            }
        return {**sizes, "activations": self.activations()}

    def activations(self) -> float:
        """Bytes that one micro-batch's forward saves for its backward, and the largest once more: its gradient.

        Counted on tensors without storage. Includes the bf16 copies of weights that autocast makes.
        """
        sizes = self.saved(checkpointing=False)
        total = sum(sizes)
        if self.checkpointing:  # beside what it saves, one layer at a time is as it would be without
            kept = self.saved(checkpointing=True)
            total = sum(kept) + (total - sum(kept)) / self.shape["num_hidden_layers"]
        return total + max(sizes)

    def saved(self, checkpointing: bool) -> list[int]:
        """The sizes of the tensors that a forward saves, parameters aside."""
        model, saved = self.without_storage(), {}
        if checkpointing:
            checkpoint_activations(model)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        for site in model.modules():
            if isinstance(site, bhyt.BHyTApprox):
                site.offset_is_set = True  # there is no value to look at
        with FakeTensorMode(allow_non_fake_inputs=True):
            tensors = {name: torch.empty_like(tensor, device="cpu").requires_grad_(tensor.requires_grad)
                       for name, tensor in (*model.named_parameters(), *model.named_buffers())}  # fmt: skip
            ids = torch.zeros(self.micro_batch, self.seq_len, dtype=torch.int64)
            with hooks, torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                arguments = {"input_ids": ids, "labels": ids, "use_cache": False}
                torch.func.functional_call(model.train(), tensors, kwargs=arguments)
            for name, _ in model.named_parameters():
                saved.pop(tensors[name].untyped_storage()._cdata, None)
        return [tensor.untyped_storage().nbytes() for tensor in saved.values()]
