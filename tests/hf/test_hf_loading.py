"""Saved models in fresh processes, by every Auto class: the bits that were saved, or an error. Never another model.

Also with transformers 4.51, see test_hf_versions.py.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Tuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from support.checks import same_bits
from load_saved import outputs
from support.hf_models import SIZES, converted, hf, ids, logits_by_hand, save_tokenizer, stock, transformers

HERE = Path(__file__).parent
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3") + (("Mixtral",) if transformers.__version__ >= "5" else ())
VARIANTS = {"plain": {}, "bf16": {"dtype": "bfloat16"}, "device_map": {"device_map": "cpu"}, "sharded": {}, "tied": {}}
KINDS = ("causal", "body", "classifier", "pipeline")
HOW = ("import", "trust")
ABOUT_KEYS = re.compile("keys?\\b|[Ww]eights|MISSING|UNEXPECTED|initialized|model of type")


def variants(family: str, kind: str) -> Tuple[str, ...]:
    """Three for every family and kind, so that each variant meets each family and each kind. A pipeline has no
    options."""
    if kind == "pipeline":
        return "plain", "sharded", "tied"
    others = list(VARIANTS)[1:]
    first = FAMILIES.index(family) + KINDS.index(kind)
    return "plain", others[first % 4], others[(first + 2) % 4]


OPTIONS = dict(exact_layers=1, last_layer_lam=1.5)  # both kinds of second site, an exact site at the end


def of_kind(family: str, kind: str, tied: bool) -> nn.Module:
    experts = dict(num_local_experts=4, num_experts_per_tok=2) if family == "Mixtral" else {}
    head = {"body": "Model", "classifier": "ForSequenceClassification"}.get(kind, "ForCausalLM")
    more = dict(num_labels=3, pad_token_id=0) if kind == "classifier" else {}
    return converted(family, head=head, tie_word_embeddings=tied, sizes=experts | more, **OPTIONS)


def cast(model: nn.Module) -> nn.Module:
    """Parameters in bfloat16; not the frequencies of the rotary embedding, which .to(bfloat16) would round."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.bfloat16()
    for module in twin.modules():  # that of the float32 weights, as a folder has it
        if hasattr(module, "set_variance_offset"):
            module.set_variance_offset(module.variance_offset)
    return twin


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Path, Dict[str, Any]]:
    """A folder with every model, and what each gives in the process that saved it."""
    folder = tmp_path_factory.mktemp("saved")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that load: sums of torch's own matrix products depend on it
    cases, expected = {}, {}
    for family in FAMILIES:
        for kind in KINDS:
            for variant in variants(family, kind):
                model = of_kind(family, kind, tied=variant == "tied")
                path = f"{family}-{kind}-{variant if variant in ('sharded', 'tied') else 'plain'}"
                if not (folder / path).exists():
                    model.save_pretrained(folder / path, max_shard_size="50KB" if variant == "sharded" else "5GB")
                    save_tokenizer(folder / path)
                case = f"{family} {kind} {variant}"
                cases[case] = dict(path=path, kind=kind, load={} if kind == "pipeline" else VARIANTS[variant])
                twin = cast(model) if variant == "bf16" else model
                if kind == "pipeline":
                    prompt = torch.tensor([[1, 2, 3]])
                    made = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
                    expected[case] = "".join(f"w{i}" for i in made[0].tolist())
                else:
                    expected[case] = type(model).__name__, outputs(twin, ids()), twin.state_dict()
    torch.save(ids(), folder / "ids.pt")
    (folder / "cases.json").write_text(json.dumps(cases))
    torch.set_num_threads(threads)
    sharded = list(folder.glob("*-sharded"))
    assert sharded and all(len(list(path.glob("*.safetensors"))) > 1 for path in sharded)
    return folder, expected


@pytest.fixture(scope="module")
def loaded(saved: Tuple[Path, Dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Dict[str, Any]]:
    """What each way to load gives."""
    folder, cache = saved[0], tmp_path_factory.mktemp("cache")
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(HERE / "load_saved.py"), str(folder)],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {how: torch.load(folder / f"{how}.pt", weights_only=False) for how in (*HOW, "neither")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", HOW)
def test_every_loader(saved: Any, loaded: Any, how: str, family: str, kind: str) -> None:
    """A fresh process gets the BHyT class and the bits of the saved model, of the cast one in bfloat16, in every tensor
    and in what it computes, and not one warning about keys."""
    results, expected = loaded[how], saved[1]
    for variant in variants(family, kind):
        case = f"{family} {kind} {variant}"
        result, wanted = results[case], expected[case]
        if kind == "pipeline":
            assert result.replace(" ", "") == wanted, (case, result)
        else:
            assert not isinstance(result, str), (case, result)
            assert result[0] == wanted[0] and same_bits(result[1], wanted[1]), case
            assert result[2].keys() == wanted[2].keys()
            assert all(same_bits(tensor, wanted[2][name]) for name, tensor in result[2].items()), case
        said = [text for text in results[f"{case} said"] if ABOUT_KEYS.search(text)]
        assert not said, (case, said)


def test_never_another_model(saved: Any, loaded: Any) -> None:
    """Without bhyt and without trust_remote_code: an error that says what to do, from every Auto class."""
    results = loaded["neither"]
    assert results["modules"] == []
    for case in saved[1]:
        assert isinstance(results[case], str) and "trust_remote_code=True" in results[case], (case, results[case])


@pytest.mark.parametrize("tied", (False, True))
def test_round_trips_keep_everything(tied: bool, tmp_path: Path) -> None:
    """Auto load -> save -> Auto load: the same files' tensors and config, no copied source code."""
    model = of_kind("Llama", "causal", tied)
    for number in range(3):
        model.save_pretrained(tmp_path / str(number))
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("0", "2"))
    assert first.keys() == last.keys() and all(same_bits(first[name], last[name]) for name in first)
    assert sum(name.endswith("variance_offset") for name in first) == SIZES["num_hidden_layers"] - 1
    texts = [(tmp_path / name / "config.json").read_text() for name in ("0", "2")]
    assert texts[0] == texts[1] and json.loads(texts[0])["model_type"] == "bhyt_llama"
    code = [path.read_text() for path in tmp_path.rglob("*.py")]
    assert len(code) == 3 and set(code) == {code[0]} and len(code[0].splitlines()) <= 4


def test_from_scratch(tmp_path: Path) -> None:
    """A config of its own and AutoModelForCausalLM.from_config: sites from the beginning, saved as any."""
    config = hf.BHyTLlamaConfig(**SIZES, seq_len=32, input_layer_lam=3.0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert type(model) is hf.BHyTLlamaForCausalLM and model.model.layers[0].input_layernorm.lam.item() == 3.0
    expected = outputs(model, ids())
    assert hf.refresh(model) == 3 and same_bits(outputs(model, ids()), expected)
    model.save_pretrained(tmp_path)
    assert same_bits(outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ids()), expected)
    with pytest.raises(ValueError, match="seq_len: approximate sites need"):
        transformers.AutoModelForCausalLM.from_config(hf.BHyTLlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="norm_type.*'rms'"):
        transformers.AutoModelForCausalLM.from_config(hf.BHyTLlamaConfig(**SIZES, norm_type="rms"))
    with pytest.raises(TypeError, match="config: expected a BHyTLlamaConfig, got LlamaConfig"):
        hf.BHyTLlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def test_stock_checkpoints_are_no_bhyt_models(tmp_path: Path) -> None:
    """A BHyT class asked to load a plain Llama's folder refuses it."""
    stock().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected model_type bhyt_llama, got llama"):
        hf.BHyTLlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.norm_type: expected one of bhyt"):
        hf.from_pretrained(tmp_path)


def old_folder(model: nn.Module, path: Path) -> None:
    """What earlier releases wrote: model_type llama, the fields beside it, no offsets."""
    model.save_pretrained(path)
    (path / "modeling_bhyt.py").unlink()
    config = json.loads((path / "config.json").read_text())
    del config["auto_map"]
    config |= dict(model_type="llama", architectures=["LlamaForCausalLM"])
    (path / "config.json").write_text(json.dumps(config))
    weights = {n: t for n, t in load_file(path / "model.safetensors").items() if not n.endswith("variance_offset")}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_folders_of_earlier_releases(tmp_path: Path) -> None:
    """bhyt.hf.from_pretrained loads them, offsets computed from the weights; what it saves every tool loads; and
    convert refuses the Llama that an Auto class makes of them."""
    model = converted(**OPTIONS)
    old_folder(model, tmp_path / "old")
    loaded = hf.from_pretrained(tmp_path / "old")
    assert same_bits(outputs(loaded, ids()), outputs(model, ids()))
    loaded.save_pretrained(tmp_path / "new")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert same_bits(outputs(again, ids()), outputs(model, ids()))
    with pytest.raises(ValueError, match="its config says norm_type 'bhyt'.*bhyt.hf.from_pretrained"):
        hf.convert(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "old"), seq_len=32)
    weights = tmp_path / "old" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.post_attention_layernorm.lam"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="lack model.layers.1.post_attention_layernorm.lam"):
        hf.from_pretrained(tmp_path / "old")


@pytest.mark.parametrize(
    "options", ({}, {"norm_type": "bhytstar"}, {"last_layer_lam": 1.5}, {"exact_layers": 1}), ids=str
)
def test_save_and_load(options: dict, tmp_path: Path) -> None:
    """save_pretrained, then from_pretrained: the config carries every field and the logits have the same bits."""
    model = converted(**options)
    model.save_pretrained(tmp_path)
    loaded = hf.from_pretrained(tmp_path)
    assert loaded.config.norm_type == model.config.norm_type and loaded.config.seq_len == 32
    with torch.no_grad():
        assert same_bits(loaded(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize(
    "options", ({}, {"use_gamma_var": True}, {"learnable_lam": False}, {"exact_layers": 1}), ids=str
)
def test_authors_checkpoint(options: dict, tmp_path: Path) -> None:
    """Their key names, config fields and shapes load and compute the formulas: kappa and eps of the sites are not in
    the config (10, 1e-6), a frozen lam has no dimension; unknown schedules are refused."""
    model = converted(seq_len=2, **options)
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    if not model.config.learnable_lam:
        weights |= {name: t[0].clone() for name, t in weights.items() if name.endswith(".lam")}
    save_file(weights, tmp_path / "model.safetensors")
    fields = dict(
        norm_type="bhyt", input_layer_lam=2.0, post_layer_lam=1.0, last_layer_lam=0.0, learnable_lam=True, seq_len=2,
        var_approx_exact_layers=options.get("exact_layers", 0),
    ) | options
    theirs = stock(rms_norm_eps=1e-5).config.to_dict() | fields
    (tmp_path / "config.json").write_text(json.dumps(theirs, default=str))
    loaded = hf.load_authors_checkpoint(tmp_path)
    model.model.norm.variance_epsilon = 1e-5
    with torch.no_grad():
        expected = logits_by_hand(copy.deepcopy(model).double(), ids())
        assert (loaded(ids()).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    (tmp_path / "config.json").write_text(json.dumps(theirs | {"bhyt_kappa_schedule": "decay"}, default=str))
    with pytest.raises(NotImplementedError, match="bhyt_kappa_schedule"):
        hf.load_authors_checkpoint(tmp_path)
