"""What users of comparable projects reported, and what held here when it was tried: rows 53 to 68 of docs/users.md, as
far as no other file covers them."""

import copy
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import bhyt
from cases import FORMS, make_call, make_upstream, run_with_gradients
from checks import same_bits
from processes import assert_same, processes, whole
from test_parallel import batch, llama, loss_of, shard_layers

EXAMPLE = Path(__file__).parent.parent / "examples" / "pretrain.py"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from test_hf import converted

    return converted().requires_grad_(False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tokens() -> Tensor:
    from test_hf import ids

    return ids() % 63 + 1  # 0 is padding


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def greedy(model: nn.Module, rows: Tensor, **options: object) -> Tensor:
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(rows)) | options
    return model.generate(rows, **options)


# Loading


@pytest.mark.parametrize("variant", (None, "half"))
def test_dtype_of_the_folder(model: nn.Module, variant: str, tmp_path: Path) -> None:
    """dtype="auto" takes the folder's dtype, of any file variant; offsets stay float32, and the logits are those of the
    saved model. USERS row 53."""
    from test_hf import transformers

    option = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(tmp_path, variant=variant)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant, **{option: "auto"})
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    state, expected = loaded.state_dict(), half.state_dict()
    assert state.keys() == expected.keys() and all(same_bits(state[name], t) for name, t in expected.items())
    assert {t.dtype for name, t in state.items() if "variance_offset" in name} == {torch.float32}
    loaded.model.rotary_emb = half.model.rotary_emb  # .to() rounded its frequencies, which no file has
    assert same_bits(logits(loaded), logits(half))


def test_quanto_weights(model: nn.Module) -> None:
    """8-bit weights of optimum-quanto: logits are those of a model with the matrices by which its linears multiply.
    USERS row 55."""
    quanto = pytest.importorskip("optimum.quanto")
    import bhyt.hf

    quantised, plain = copy.deepcopy(model), copy.deepcopy(model)
    quanto.quantize(quantised, weights=quanto.qint8)
    quanto.freeze(quantised)
    for name, linear in plain.named_modules():
        if isinstance(linear, nn.Linear):
            linear.weight = nn.Parameter(quantised.get_submodule(name).weight.dequantize(), requires_grad=False)
    bhyt.hf.refresh(plain)
    actual, expected = logits(quantised), logits(plain)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(expected, logits(model), rtol=1e-4)


# Generation and attention


def test_assisted_generation(model: nn.Module) -> None:
    """Another BHyT model proposes tokens, some of them refused: the text is that of greedy search. USERS row 56."""
    from test_hf import converted

    assistant, one = converted(exact_layers=2).requires_grad_(False), tokens()[:1]
    assistant.lm_head.weight.add_(0.02 * torch.randn_like(assistant.lm_head.weight))
    expected = greedy(model, one)
    assert not torch.equal(greedy(assistant, one), expected)
    assert torch.equal(greedy(model, one, assistant_model=assistant), expected)


def test_continuous_batching(model: nn.Module) -> None:
    """Prompts of several lengths in one paged cache: the tokens of each alone. USERS row 56."""
    from test_hf import transformers

    if not hasattr(model, "generate_batch"):
        pytest.skip("transformers has no generate_batch")
    model = copy.deepcopy(model)
    prompts = [tokens()[0, :3].tolist(), tokens()[1].tolist(), tokens()[0, 2:7].tolist()]
    expected = [greedy(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    cache = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # else most of the memory
    made = model.generate_batch(prompts, generation_config=config, continuous_batching_config=cache)
    assert [list(output.generated_tokens) for output in made.values()] == expected


@pytest.mark.parametrize("kind", ("sdpa", "flex_attention"))
def test_attention_kinds(model: nn.Module, kind: str) -> None:
    """Both give the logits of plain attention. USERS row 57."""
    other = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    other.set_attn_implementation(kind)
    with torch.compiler.set_stance("force_eager"):  # transformers compiles flex attention: half a minute
        actual, expected = logits(other), logits(model)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dynamo_exporter(model: nn.Module) -> None:
    """transformers' exporter, with dynamic sizes: the program has the ops, and the model's logits at other sizes. USERS
    row 59."""
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    inputs = {"input_ids": tokens(), "use_cache": False}
    sizes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    config = exporters.DynamoConfig(dynamic=True, dynamic_shapes=sizes)
    exported = exporters.DynamoExporter().export(model, inputs, config=config)
    program = getattr(exported, "program", exported)
    assert "bhyt." in str(program.graph)
    longer = torch.cat((tokens(), tokens()[:, :5]), 1)[[0, 1, 0]]
    actual = program.module()(input_ids=longer)
    assert same_bits(getattr(actual, "logits", actual[0]), model(longer).logits)


# Checkpoints and restarts


@processes(2)
def test_async_save() -> None:
    """Weights and offsets change while a distributed checkpoint is written: the file has those of the call. USERS row
    61."""
    model = shard_layers(llama())
    before = {name: whole(t).clone() for name, t in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as mine:
        folders = [mine]
        dist.broadcast_object_list(folders)
        written = checkpoint.async_save(get_model_state_dict(model), checkpoint_id=folders[0])
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.mul_(2)
        written.result()
        state = get_model_state_dict(model)
        checkpoint.load(state, checkpoint_id=folders[0])
        dist.barrier()
    set_model_state_dict(model, state)
    assert any("variance_offset" in name for name in before)
    for name, tensor in model.state_dict().items():
        assert same_bits(whole(tensor), before[name]), name


@processes(2)
def test_weights_of_the_first_process() -> None:
    """A state dict of one process, for all (broadcast_from_rank0): the loss is that of its model, so every process has
    its offsets. USERS row 62."""
    reference = llama()
    expected = loss_of(reference, batch())
    model = shard_layers(llama())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.mul_(2)
    state = reference.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    assert_same(loss_of(model, batch()), expected, "loss")


@pytest.mark.slow
def test_elastic_restart(tmp_path: Path) -> None:
    """torchrun starts a killed process again: with --resume it goes on from its checkpoint, and ends with the bits of a
    run without a pause. USERS row 60."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    (tmp_path / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(500)))
    (tmp_path / "once.py").write_text(
        "import os, runpy, signal, sys\n"
        "first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "sys.argv = sys.argv[1:] + (['--stop-at', '4'] if first else [])\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    first and os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    tiny = (
        "--layers 2 --dim 32 --heads 4 --kv-heads 2 --seq-len 16 --batch 4 --steps 8 --warmup 2 --eval-every 50"
        " --device cpu --samples 0 --norm bhyt --text text.txt --out"
    ).split()
    torchrun = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --max-restarts 1 once.py".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    saved = []
    for out, launcher, more in (("whole", [], []), ("restarted", torchrun, ["--resume"])):
        command = [sys.executable, *launcher, str(EXAMPLE), *tiny, out, *more]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
        assert bool(launcher) == ("exitcode: -9" in run.stderr), run.stderr
        saved.append(torch.load(tmp_path / out / "bhyt.pt", weights_only=True))
    assert saved[0]["step"] == saved[1]["step"] == 8
    assert all(same_bits(saved[1]["model"][name], tensor) for name, tensor in saved[0]["model"].items())


# torch


def block(x: Tensor, site: nn.Module, last: nn.Module) -> Tensor:
    y, stream = last.forward_add(site(x), x)
    return y * stream


@pytest.mark.slow
def test_cpp_wrapper() -> None:
    """Inductor's C++ calls the ops, whose optional tensors are left out: the bits of eager mode. USERS row 63."""
    x, modules = torch.randn(6, 16), (bhyt.BHyT(16), bhyt.BHyT(16))
    expected = block(x, *modules)
    with torch._inductor.config.patch(cpp_wrapper=True, fx_graph_cache=False):
        compiled = torch.compile(block, fullgraph=True)(x, *modules)
    assert same_bits(compiled, expected)
    grads = [torch.autograd.grad(y.sum(), modules[0].weight)[0] for y in (compiled, expected)]
    assert same_bits(*grads)


def test_sizes_that_data_decides() -> None:
    """A number of rows that only the data tells, in one graph: outputs and gradients of eager mode. USERS row 64."""
    modules = bhyt.BHyT(16), bhyt.BHyT(16)

    def chosen(x: Tensor, mask: Tensor) -> Tensor:
        return block(x[mask], *modules)

    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for rows in (5, 0, 1, 8):
            x, mask = torch.randn(8, 16, requires_grad=True), torch.arange(8) < rows
            actual, expected = compiled(x, mask), chosen(x, mask)
            assert same_bits(actual, expected)
            (grad,), (expected_grad,) = (torch.autograd.grad(y.square().sum(), x) for y in (actual, expected))
            assert same_bits(grad, expected_grad)


def test_vmap_over_stacked_modules() -> None:
    """An ensemble by stack_module_state: each member's outputs and gradients. USERS row 66."""
    members = [bhyt.BHyT(16, dtype=torch.float64) for _ in range(3)]
    for member in members:
        nn.init.uniform_(member.weight, 0.5, 1.5)
        nn.init.uniform_(member.lam, 0.5, 2)
    x = torch.randn(4, 16, dtype=torch.float64)
    parameters, buffers = torch.func.stack_module_state(members)

    def loss(parameters: dict, buffers: dict) -> Tensor:
        return torch.func.functional_call(members[0], (parameters, buffers), (x,)).square().sum()

    grads, losses = torch.vmap(torch.func.grad_and_value(loss))(parameters, buffers)
    for i, member in enumerate(members):
        expected = member(x).square().sum()
        expected.backward()
        assert torch.allclose(losses[i], expected, rtol=1e-12)
        for name, parameter in member.named_parameters():
            assert torch.allclose(grads[name][i], parameter.grad, rtol=1e-10), name


@pytest.mark.parametrize("form", FORMS)
def test_flushed_denormals(form: str) -> None:
    """torch.set_flush_denormal changes no bit of ordinary rows; subnormal ones become zeros, not NaN. USERS row 68."""
    call = make_call(form, (4, 60))
    residual = None if call.residual is None else call.residual * 1e-40
    tiny = replace(call, x=call.x * 1e-40, residual=residual)
    upstream = make_upstream(call)
    expected, expected_grads = run_with_gradients(call, *upstream)
    torch.set_num_threads(1)  # the setting is one of a thread
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such setting")
    try:
        out, grads = run_with_gradients(call, *upstream)
        small, small_grads = run_with_gradients(tiny, *upstream)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(out.y, expected.y)
    assert all(same_bits(grads[name], grad) for name, grad in expected_grads.items())
    assert (small.y.abs() <= 1e-36).all() and all(grad.isfinite().all() for grad in small_grads.values())
