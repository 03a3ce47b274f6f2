"""Jobs of test_torchtitan_models.py: each runs in a process of its own, as torchtitan's Trainer would find it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import titan
import torch
from titan_models import FAMILIES
from torch import Tensor

FLOAT32 = {"training.dtype": "float32"}


def save_config(folder: Path, family: str) -> None:
    """Beside exported weights, what transformers needs to load them."""
    import bhyt.torchtitan

    config = titan.small(folder, {**FLOAT32, "family": family}, exact_layers=1)
    bhyt.torchtitan.hf_config(config, FAMILIES[family].hf_config()).save_pretrained(folder)


def logits_of_export(folder: Path, results: Path) -> None:
    import safetensors.torch
    from transformers import AutoModelForCausalLM

    import bhyt.hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.model_type.startswith("bhyt_") and model.config.var_approx_exact_layers == 1
    assert [type(model).__name__] == model.config.architectures
    seen = {"logits": model.eval()(titan.TOKENS).logits}
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        seen.update((name, tensor) for name, tensor in tensors.items() if name.endswith(("lam", "offset")))
    torch.distributed.init_process_group("gloo")
    titan.write(seen, results)


def save_hf_model(folder: Path, results: Path) -> None:
    """A bhyt.hf model of the small shape, gains and lam not all alike, an offset that no refresh would give."""
    from transformers import LlamaForCausalLM

    import bhyt.hf

    torch.manual_seed(3)
    model = LlamaForCausalLM(FAMILIES["llama3"].hf_config())
    bhyt.hf.convert(model, seq_len=titan.LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bhyt.hf.refresh(model)
    model.model.layers[1].post_attention_layernorm.set_variance_offset(0.125)
    model.save_pretrained(folder)
    torch.distributed.init_process_group("gloo")
    titan.write({"logits": model.eval()(titan.TOKENS).logits}, results)


def load_hf_model(folder: Path, results: Path, arguments: titan.Arguments) -> None:
    """The model that torchtitan begins with."""
    trainer = titan.small(folder, {**initial(folder), **arguments}).build()
    trainer.checkpointer.load()
    seen = {name: titan.whole(t) for name, t in trainer.model_parts[0].state_dict().items() if "norm" in name}
    titan.write({**seen, "logits": trainer.model_parts[0](titan.TOKENS)}, results)
    trainer.close()


def initial(folder: Path) -> titan.Arguments:
    return {**FLOAT32, "checkpoint.initial_load_in_hf": True, "checkpoint.initial_load_path": str(folder)}


def refuse_other_folders(folder: Path) -> None:
    """A folder whose sites compute something else than this run's would is no initial checkpoint."""
    saved = json.loads((folder / "config.json").read_text())
    trainer = titan.small(folder, initial(folder)).build()
    changes = {
        "bhyt_kappa": 8.0, "bhyt_eps": 1e-6, "seq_len": 32, "var_approx_exact_layers": 1, "norm_type": "bhytstar",
        "last_layer_lam": 1.0, "learnable_lam": False, "use_gamma_var": True,
    }  # fmt: skip
    for name, value in changes.items():
        (folder / "config.json").write_text(json.dumps({**saved, name: value}))
        with pytest.raises(ValueError, match=f"its model has {name} {value!r} ") as error:
            trainer.checkpointer.load()
        assert "\n" not in str(error.value)
    (folder / "config.json").write_text(json.dumps(saved))
    trainer.close()


def export_rounded_weights(folder: Path) -> None:
    """`checkpoint.export_dtype`: offsets stay float32, and are those of the rounded weights."""
    import bhyt

    trainer = titan.small(folder, FLOAT32).build()
    trainer.checkpointer.load()
    for dtype in (torch.bfloat16, torch.float16):
        states = {name: t.to(dtype) for name, t in trainer.model_parts[0].state_dict().items()}
        exported = {name: titan.whole(t) for name, t in trainer.checkpointer.sd_adapter.to_hf(states).items()}
        for layer in (f"model.layers.{i}" for i in range(3)):
            v, o = (exported[f"{layer}.self_attn.{name}.weight"] for name in ("v_proj", "o_proj"))
            lam = exported[f"{layer}.input_layernorm.lam"].to(torch.float32)
            expected = bhyt.attention_gain(v, o, titan.LENGTH, 2, head_dim=8) * (lam / 10).square()
            offset = exported[f"{layer}.post_attention_layernorm.variance_offset"]
            assert offset.dtype == torch.float32 and offset.shape == (1,)
            assert torch.allclose(offset, expected, rtol=1e-6) and offset > 0
    trainer.close()


def refresh_and_decay(folder: Path) -> None:
    """Offsets are those of the weights before training and after every second step, and in between as they were; gains
    and lam of sites are in groups without decay, everything else in those it was in; the hook that was there runs
    first."""
    import bhyt.torchtitan

    config = titan.small(folder, {"training.steps": 5}, every=2)
    called = []
    hook = config.model_spec.post_optimizer_build_fn
    hook.keywords["before"] = lambda optimizers, *_: called.append([len(o.param_groups) for o in optimizers])
    trainer = config.build()
    assert called == [[1]]
    (optimizer,) = trainer.optimizers
    groups = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    without = {name for name, decay in groups.items() if decay == 0}
    norms = [f"layers.{i}.{norm}" for i in range(3) for norm in ("attention_norm", "ffn_norm")]
    assert without == {f"{norm}.{name}" for norm in norms for name in ("weight", "lam")}
    assert groups.keys() == dict(trainer.model_parts[0].named_parameters()).keys()
    assert len({g["lr"] for g in optimizer.param_groups}) == 1

    sites = [block.ffn_norm for block in trainer.model_parts[0].layers.values()]

    def offsets() -> Tensor:
        return torch.cat([site.variance_offset for site in sites]).clone()

    def computed() -> Tensor:
        before = offsets()
        assert bhyt.torchtitan.refresh(trainer.model_parts) == 3
        now = offsets()
        for site, value in zip(sites, before):
            site.put_offset(value)
        return now

    assert torch.equal(offsets(), computed()) and (offsets() > 0).all()
    trainer.checkpointer.load()
    data = trainer.batch_generator(trainer.dataloader)
    trainer.metrics_processor.log = lambda *_, **__: None
    for trainer.step in range(1, 6):
        before = offsets()
        trainer.train_step(data)
        if trainer.step % 2:
            assert torch.equal(offsets(), before) and not torch.equal(offsets(), computed())
        else:
            assert torch.equal(offsets(), computed()) and not torch.equal(offsets(), before)
    trainer.close()


def against_hf_offsets(folder: Path) -> None:
    """W_V out of the fused projection, T, and gains where they count: the offsets are those that bhyt.hf computes of
    the exported weights."""
    import transformers

    import bhyt.hf

    for unit in (False, True):
        trainer = titan.small(folder, FLOAT32 | {"checkpoint.initial_load_path": None}, unit_gains=unit).build()
        exported = trainer.checkpointer.sd_adapter.to_hf(trainer.model_parts[0].state_dict())
        exported = {name: titan.whole(tensor) for name, tensor in exported.items()}
        model = transformers.LlamaForCausalLM(FAMILIES["llama3"].hf_config())
        bhyt.hf.convert(model, seq_len=titan.LENGTH, unit_gains=unit)
        assert not model.load_state_dict(exported, strict=False).missing_keys
        loaded = [layer.post_attention_layernorm.variance_offset.clone() for layer in model.model.layers]
        bhyt.hf.refresh(model)
        for before, layer in zip(loaded, model.model.layers):
            assert torch.allclose(before, layer.post_attention_layernorm.variance_offset, rtol=1e-6)
        trainer.close()
        torch.distributed.destroy_process_group()


def config_functions() -> None:
    """`--module bhyt.torchtitan` finds every config function of Llama 3 and Qwen3, and what it returns is converted;
    those whose linears have adapters are refused."""
    from torchtitan.components.quantization import float8, mx, nvfp4
    from torchtitan.config import ConfigManager

    from bhyt.torchtitan import config_registry
    from bhyt.torchtitan.block import ConvertedBlock

    for module in (float8, mx, nvfp4):  # as if there were a GPU
        if hasattr(module, "has_cuda_capability"):
            module.has_cuda_capability = lambda *_: True
    names = dir(config_registry)
    assert {"llama3_debugmodel", "llama3_8b", "qwen3_0_6b", "qwen3_moe_debug", "sft_debugmodel"} <= set(names)
    converted = 0
    for name in names:
        try:
            config, rest = ConfigManager()._load_config(["--module", "bhyt.torchtitan", "--config", name])
        except ImportError as error:
            assert "torchao" in str(error), name  # quantised linears need it
            continue
        except ValueError as error:
            assert "lora" in name and "(adapters)" in str(error), name
            continue
        owners = [type(block)._owner for block in config.model_spec.model.layers]
        assert not rest and owners and all(issubclass(owner, ConvertedBlock) for owner in owners), name
        converted += 1
    assert converted > 15
    with pytest.raises(ValueError, match="llama3_debugmodel"):  # the launcher lists what there is
        ConfigManager()._load_config(["--module", "bhyt.torchtitan", "--config", "nothing"])


def refusals(folder: Path) -> None:
    """What is not computed as it would be said is refused, in one line, and the config stays as it is."""
    from torchtitan.models.common.nn_modules import LayerNorm
    from torchtitan.models.deepseek_v3 import config_registry as deepseek
    from torchtitan.models.gpt_oss import config_registry as gpt_oss
    from torchtitan.models.llama3 import Llama3Model, config_registry
    from torchtitan.models.llama3.model import Llama3TransformerBlock

    from bhyt.torchtitan import convert, refresh

    class Scaled(Llama3TransformerBlock):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(Llama3TransformerBlock.Config):
            pass

        def forward(self, x: Tensor, attention_masks: Any, positions: Any = None) -> Tensor:
            return x + 0.5 * (super().forward(x, attention_masks, positions) - x)

    def with_first(**changes: Any) -> Any:
        config = config_registry.llama3_debugmodel()
        config.model_spec.model.layers[0] = dataclasses.replace(config.model_spec.model.layers[0], **changes)
        return config

    def scaled() -> Any:
        config = config_registry.llama3_debugmodel()
        first = config.model_spec.model.layers[0]
        values = {field.name: getattr(first, field.name) for field in dataclasses.fields(first)}
        config.model_spec.model.layers[0] = Scaled.Config(**values)
        return config

    plain = config_registry.llama3_debugmodel()
    without_gain = dataclasses.replace(plain.model_spec.model.layers[0].ffn_norm, elementwise_affine=False)
    cases = (
        (deepseek.deepseek_v3_debugmodel(), "config: "),
        (gpt_oss.gpt_oss_debugmodel(), "config: "),
        (scaled(), "config: Scaled "),
        (with_first(ffn_norm=LayerNorm.Config(normalized_shape=256)), "config: ffn_norm is LayerNorm"),
        (with_first(ffn_norm=without_gain), "config: ffn_norm is RMSNorm; only an RMSNorm with a gain"),
        (convert(plain), "config: has been converted already"),
        (Llama3Model, "config: expected a torchtitan Trainer.Config"),
        (dataclasses.replace(plain, model_spec=None), "config: expected a torchtitan Trainer.Config with a model_spec"),
    )
    for config, message in cases:
        with pytest.raises(ValueError) as error:
            convert(config)
        assert str(error.value).startswith(message) and "\n" not in str(error.value), error.value
    numbers = {"kappa": 0, "input_layer_lam": -1.0, "post_layer_lam": True, "every": 0, "exact_layers": -1}
    for name, value in numbers.items():
        with pytest.raises(ValueError, match=f"{name}: expected "):
            convert(plain, **{name: value})
    assert not any("BHyT" in type(layer).__qualname__ for layer in plain.model_spec.model.layers)
    with pytest.raises(ValueError, match="model_parts: no block has been converted"):
        refresh(torch.nn.Linear(2, 2))
    model = titan.small(folder, {}).model_spec.model
    with torch.device("meta"), pytest.raises(RuntimeError, match="is not loaded"):
        refresh(model.build())


def gains_at_the_start(folder: Path) -> None:
    """unit_gains: each gain begins at kappa / lam, so that for small arguments a site is the RMSNorm it replaces; and
    lam where it was asked for."""
    arguments = {"checkpoint.initial_load_path": None}
    for unit, expected in ((False, (1.0, 1.0)), (True, (8 / 3, 8 / 1.5))):
        config = titan.small(folder, arguments, unit_gains=unit, kappa=8.0, input_layer_lam=3.0, post_layer_lam=1.5)
        trainer = config.build()
        for block in trainer.model_parts[0].layers.values():
            for site, gain, lam in zip((block.attention_norm, block.ffn_norm), expected, (3.0, 1.5)):
                assert (titan.whole(site.weight) == gain).all() and titan.whole(site.lam) == lam and site.kappa == 8.0
        trainer.close()
        torch.distributed.destroy_process_group()
