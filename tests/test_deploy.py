"""Models outside the Python that made them: fresh processes, C++, AOTInductor packages, ONNX. See
docs/deploy.md."""

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor, nn

import bhyt
from checks import same_bits
from pages import blocks, run_page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
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
    run = subprocess.run(
        [sys.executable, "-c", prologue + code, library or bhyt.library_path(), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,  # not the repository's root, where an installed bhyt is hidden
    )
    assert run.returncode == 0, run.stderr


# ---- TorchScript


def test_torchscript_in_a_fresh_process(tmp_path: Path) -> None:
    """Scripted, traced and frozen: saved here, the same bits where `bhyt` was never imported. Gradients of the script are
    those of eager: autograd lives in the library. USERS row 23."""
    ids = tokens()
    expected = one_step(decoder(), ids)
    scripts = {
        "script": torch.jit.script(decoder()),
        "trace": torch.jit.trace(decoder(), (ids[:, :-1],)),
        "freeze": torch.jit.freeze(torch.jit.script(decoder()).eval()),
    }
    for how, script in scripts.items():
        torch.jit.save(script, str(tmp_path / f"{how}.pt"))
    torch.save(ids, tmp_path / "ids.pt")
    fresh_process(
        "import os; os.chdir(a[0]); assert 'bhyt' not in sys.modules\n"
        "ids, results = torch.load('ids.pt'), {}\n"
        "for how in a[1:]:\n"
        "    m = torch.jit.load(f'{how}.pt')\n"
        "    results[how] = logits = m(ids[:, :-1])\n"
        "    if how == 'script':\n"
        "        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()\n"
        "        results['grads'] = {n: p.grad for n, p in m.named_parameters()}\n"
        "torch.save(results, 'results.pt')",
        tmp_path,
        *scripts,
    )
    results = torch.load(tmp_path / "results.pt")
    for how in scripts:
        assert same_bits(results[how].detach(), expected["logits"]), how
    assert results["grads"].keys() == dict(decoder().named_parameters()).keys()
    for name, grad in results["grads"].items():
        assert same_bits(grad, expected[f"grad.{name}"]), name


def test_freezing_keeps_the_offset() -> None:
    """A frozen graph holds the offset that was set; one that was not set still refuses to run. USERS row 23."""
    site = bhyt.BHyTApprox(8)
    x, v = torch.randn(3, 8), torch.ones(3, 1)
    with pytest.raises(torch.jit.Error, match="offset has not been set"):
        torch.jit.freeze(torch.jit.script(site.eval()))(x, v)
    site.set_variance_offset(0.5)
    with torch.no_grad():
        assert same_bits(torch.jit.freeze(torch.jit.script(site))(x, v), site(x, v))


# ---- C++


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/cpp, built in the folder `build-cpp` against the installed op library, as docs/deploy.md does it."""
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "examples").symlink_to(ROOT / "examples")
    configure = ["cmake", "-S", "examples/cpp", "-B", "build-cpp"]
    configure += [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", f"-DBHYT_OPS={bhyt.library_path()}"]
    for command in (configure, ["cmake", "--build", "build-cpp", "--parallel", "2"]):
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    return folder / "build-cpp"


def run_program(program: Path, *arguments: Path) -> None:
    run = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def from_cpp(path: Path) -> Any:
    """What torch::pickle_save wrote: its containers carry a type tag that weights_only refuses."""
    return torch.load(path, weights_only=False)


@pytest.mark.slow
def test_cpp_trains_a_scripted_model(programs: Path, tmp_path: Path) -> None:
    """The same bits in C++ as in Python: logits, loss, every gradient, every parameter after a step. USERS row
    23."""
    expected = one_step(decoder(), tokens())
    torch.jit.save(torch.jit.script(decoder()), str(tmp_path / "model.pt"))
    torch.save({"tokens": tokens()}, tmp_path / "tokens.pt")
    run_program(
        programs / "train_scripted", *(tmp_path / name for name in ("model.pt", "tokens.pt", "results.pt"))
    )
    results = from_cpp(tmp_path / "results.pt")
    assert results.keys() == expected.keys()
    for name, t in results.items():
        assert same_bits(t, expected[name]), name


# ---- ONNX


def assert_same_results(actual: Tensor, expected: Tensor) -> None:
    """Compilers fuse what is around the ops: 1e-5, a few float32 roundings per layer."""
    assert actual.shape == expected.shape and (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    """The model as ONNX ops, without further ado, run by onnxruntime at two lengths. USERS row 23."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    length = torch.export.Dim("length", min=2, max=CONFIG.seq_len)
    path = tmp_path / "model.onnx"
    program = torch.onnx.export(decoder().eval(), (tokens(),), dynamo=True, dynamic_shapes=({1: length},), verbose=False)
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for n in (17, 5):
        (actual,) = session.run(None, {session.get_inputs()[0].name: tokens(n).numpy()})
        with torch.no_grad():
            assert_same_results(torch.from_numpy(actual), decoder()(tokens(n)))


# ---- selective checkpointing and the compile switch stand in test_compile.py


def test_export_keeps_the_ops() -> None:
    """An exported model holds our ops; decomposed, none of them, and the same values. USERS row 23."""
    program = torch.export.export(decoder().eval(), (tokens(),))

    def ours(exported: torch.export.ExportedProgram) -> List[str]:
        return [str(node.target) for node in exported.graph.nodes if str(node.target).startswith("bhyt.")]

    assert len(ours(program)) == 2 * CONFIG.layers
    stream = io.BytesIO()
    torch.export.save(program, stream)
    plain = program.run_decompositions(bhyt.decompositions())
    assert not ours(plain)
    with torch.no_grad():
        assert_same_results(plain.module()(tokens()), decoder()(tokens()))


# ---- docs/deploy.md, and AOTInductor by its package


@pytest.fixture(scope="session")
def page(programs: Path) -> Path:
    """The folder where the C++ programs were built, in which every block of the page then ran."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    assert len(blocks("docs/deploy.md")) >= 10, "the page has lost its blocks"
    run_page("docs/deploy.md", programs.parent)
    return programs.parent


@pytest.mark.slow
def test_deploy_page(page: Path) -> None:
    """Every route of the page works; what its C++ program wrote is what the exported model gives. USERS rows 22, 23."""
    with torch.no_grad():
        expected = torch.export.load(page / "net-exported.pt2").module()(*torch.load(page / "inputs.pt"))
    (actual,) = from_cpp(page / "outputs.pt")
    assert_same_results(actual, expected)


@pytest.mark.slow
def test_aoti_package_in_a_fresh_process(page: Path, tmp_path: Path) -> None:
    """The page's package runs where only the page's copy of the op library is loaded, at other lengths too, and goes on
    after `import bhyt`. USERS row 23."""
    inputs = [torch.randn(length, 64) for length in (17, 5)]
    torch.save(inputs, tmp_path / "inputs.pt")
    fresh_process(
        "m, inputs = torch._inductor.aoti_load_package(a[0]), torch.load(a[1])\n"
        "with torch.no_grad(): before = [m(x) for x in inputs]; import bhyt; after = [m(x) for x in inputs]\n"
        "bhyt.BHyT(64)(inputs[0]).sum().backward(); torch.save((before, after), a[2])",
        *(page / "net-compiled.pt2", tmp_path / "inputs.pt", tmp_path / "outputs.pt"),
        library=str(page / "bhyt_ops.so"),
    )
    model = torch.export.load(page / "net-exported.pt2").module()
    with torch.no_grad():
        for before, after, x in zip(*torch.load(tmp_path / "outputs.pt"), inputs, strict=True):
            assert_same_results(before, model(x))
            assert same_bits(after, before)
