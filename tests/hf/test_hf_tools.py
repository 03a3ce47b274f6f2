"""A saved or converted model in the tools that people use: lm-eval, TRL, PEFT, accelerate, DCP, Trainer, torchao."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.checks import same_bits
from load_saved import outputs
from support.hf_models import (
    SIZES, close, converted, hf, ids, offsets, offsets_by_hand, save_tokenizer, stock, transformers,
)
from support.packages import needs


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return converted()


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def computes_the_same(actual: nn.Module, expected: nn.Module) -> bool:
    return same_bits(outputs(actual.eval(), ids()), outputs(expected.eval(), ids()))


# accelerate


def test_accelerate_state(model: nn.Module, tmp_path: Path) -> None:
    """save_state, other weights, load_state: the offsets are those of the state, not what they were."""
    accelerate = needs("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(copy.deepcopy(model))
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.mul_(1.5)
    hf.refresh(prepared)
    assert not computes_the_same(prepared, model)
    accelerator.load_state(str(tmp_path))
    assert computes_the_same(prepared, model)


@pytest.mark.parametrize("how", ("cpu_offload", "disk_offload"))
def test_offload(how: str, model: nn.Module, tmp_path: Path) -> None:
    """Weights that are there only while a module's forward, or a refresh, runs."""
    accelerate = needs("accelerate")
    where = {"offload_dir": str(tmp_path)} if how == "disk_offload" else {}
    offloaded = getattr(accelerate, how)(copy.deepcopy(model), execution_device="cpu", **where)
    assert next(offloaded.parameters()).is_meta
    assert computes_the_same(offloaded, model)
    for layer in offloaded.model.layers:
        layer.post_attention_layernorm.set_variance_offset(7.0)
    assert hf.refresh(offloaded) == 3 and same_bits(offsets(offloaded), offsets(model))
    assert next(offloaded.parameters()).is_meta


ON_DISK = {"model.layers": "disk", "lm_head": "disk"} | {
    f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")
}


@pytest.mark.parametrize("device_map", ({"": "cpu"}, ON_DISK), ids=("cpu", "disk"))
@pytest.mark.parametrize("include_buffers", (False, True))
def test_load_checkpoint_and_dispatch(
    device_map: dict, include_buffers: bool, folder: Path, model: nn.Module, tmp_path: Path
) -> None:
    """init_empty_weights, convert, then weights from the folder."""
    accelerate = needs("accelerate")
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        empty = stock()
        hf.convert(empty, seq_len=32)
    empty.model.rotary_emb = model.model.rotary_emb
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(folder), device_map=device_map, offload_folder=str(tmp_path), offload_buffers=True
    )
    assert computes_the_same(loaded, model)


def test_device_map_with_disk(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    """from_pretrained with layers on disk."""
    needs("accelerate")
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(SIZES["num_hidden_layers"])}
    rest = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=layers | rest, offload_folder=str(tmp_path)
    )
    assert computes_the_same(loaded, model)


def test_distributed_checkpoint(model: nn.Module, tmp_path: Path) -> None:
    """torch.distributed.checkpoint of the model's state dict, loaded into a model with other weights."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    checkpoint.save(get_model_state_dict(model), checkpoint_id=str(tmp_path))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    hf.refresh(other)
    state = get_model_state_dict(other)
    checkpoint.load(state, checkpoint_id=str(tmp_path))
    set_model_state_dict(other, state)
    assert computes_the_same(other, model)


def test_state_dict_without_offsets(model: nn.Module) -> None:
    """The authors' names: strict loading accepts it, and each layer computes its offset from the weights it got."""
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("variance_offset")}
    other = converted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    hf.refresh(other)
    other.load_state_dict(state, strict=True)
    assert not any(layer.post_attention_layernorm.offset_is_set for layer in other.model.layers)
    assert computes_the_same(other, model)


def arguments(path: Path, **options: Any) -> Any:
    return dict(
        output_dir=str(path), per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        logging_strategy="no", disable_tqdm=True, seed=1,
    ) | options  # fmt: skip


def test_trainer_resumes_to_the_bit(tmp_path: Path) -> None:
    """12 steps at once, and 7 steps, a stop, a fresh model and the rest: the same weights, offsets and optimizer's
    choice of what decays."""
    needs("accelerate")
    rows = [dict(input_ids=row, labels=row) for row in ids(batch=24)]

    def trainer(path: Path, model: nn.Module, **options: Any) -> Any:
        args = transformers.TrainingArguments(
            **arguments(path, max_steps=12, save_strategy="steps", save_steps=7, weight_decay=0.1, **options)
        )
        return transformers.Trainer(
            model=model, args=args, train_dataset=rows, callbacks=[hf.refresh_callback(every=5)]
        )

    whole = trainer(tmp_path / "run", converted())
    whole.train()
    kept = [id(p) for group in whole.optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    assert {n for n, p in whole.model.named_parameters() if "norm" in n} == {
        n for n, p in whole.model.named_parameters() if id(p) in kept
    }
    path = tmp_path / "run" / "checkpoint-7"
    resumed = trainer(tmp_path / "again", transformers.AutoModelForCausalLM.from_pretrained(path))
    resumed.train(resume_from_checkpoint=str(path))
    for (name, tensor), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert same_bits(tensor, other), name


def test_sft_trainer(folder: Path, tmp_path: Path) -> None:
    """TRL's SFTTrainer given a path trains the BHyT model, and saves one."""
    trl, datasets = needs("trl"), needs("datasets")
    texts = datasets.Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row.tolist()) for row in ids(batch=4)]})
    trainer = trl.SFTTrainer(
        model=str(folder), train_dataset=texts, callbacks=[hf.refresh_callback(every=1)],
        args=trl.SFTConfig(**arguments(tmp_path, max_steps=2, max_length=16, save_strategy="no", bf16=False)),
    )
    assert type(trainer.model) is hf.BHyTLlamaForCausalLM
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    assert computes_the_same(loaded, trainer.model)
    assert close(offsets(loaded), offsets_by_hand(loaded.model.layers))


def test_lm_eval(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    """lm-eval's HFLM, in a process that imports nothing of bhyt, on a task from a local file: its log-likelihoods are
    the model's own."""
    needs("lm_eval")
    rows = ids(batch=6)
    lines = [
        {"prompt": " ".join(f"w{i}" for i in row[:8].tolist()), "answer": " ".join(f"w{i}" for i in row[8:].tolist())}
        for row in rows
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{prompt}}'\ndoc_to_target: ' {{answer}}'\n"
        "metric_list:\n  - metric: perplexity\n"
    )
    code = (
        "import sys, json, lm_eval, lm_eval.tasks as t\n"
        "folder, tasks = sys.argv[1:]\n"
        "result = lm_eval.simple_evaluate(model='hf', tasks=['tiny'], device='cpu', batch_size=2, bootstrap_iters=0,\n"
        "    model_args=f'pretrained={folder},trust_remote_code=True,dtype=float32',\n"
        "    task_manager=t.TaskManager(include_path=tasks, include_defaults=False))\n"
        "print('RESULT', json.dumps([s['resps'][0][0][0] for s in result['samples']['tiny']]))\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path)],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    actual = json.loads(run.stdout.split("RESULT", 1)[1])
    log_probabilities = outputs(model, rows).double().log_softmax(-1)
    expected = log_probabilities[:, 7:-1].gather(-1, rows[:, 8:, None]).sum((1, 2))
    assert torch.allclose(torch.tensor(actual, dtype=torch.float64), expected, rtol=1e-5)


def test_torchao_weights() -> None:
    """int8 weights of W_V and W_O: c is that of the matrices the linears multiply by."""
    quantization = needs("torchao.quantization")
    model = converted()
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith(("v_proj", "o_proj"))
    )
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        for name in ("v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            linear.weight = nn.Parameter(linear.weight.dequantize(), requires_grad=False)
    before = offsets(model)
    assert hf.refresh(model) == 3
    assert close(offsets(model), offsets_by_hand(plain.model.layers)) and not same_bits(offsets(model), before)
