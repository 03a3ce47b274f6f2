"""Models outside Python: C++ programs, AOTInductor packages, ONNX; and the blocks of docs/deploy.md."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import bhyt
from support.checks import same_bits
from support.deployed import CONFIG, assert_same_results, decoder, fresh_process, one_step, tokens
from support.packages import needs, needs_program
from support.pages import blocks, run_page
from support.paths import ROOT


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/cpp, built in the folder `build-cpp` against the installed op library, as docs/deploy.md does it."""
    needs_program("cmake")
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


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    """The model as ONNX ops, without further ado, run by onnxruntime at two lengths. USERS row 23."""
    needs("onnxscript")
    onnxruntime = needs("onnxruntime")
    length = torch.export.Dim("length", min=2, max=CONFIG.seq_len)
    path = tmp_path / "model.onnx"
    program = torch.onnx.export(
        decoder().eval(), (tokens(),), dynamo=True, dynamic_shapes=({1: length},), verbose=False
    )
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for n in (17, 5):
        (actual,) = session.run(None, {session.get_inputs()[0].name: tokens(n).numpy()})
        with torch.no_grad():
            assert_same_results(torch.from_numpy(actual), decoder()(tokens(n)))


@pytest.fixture(scope="session")
def page(programs: Path) -> Path:
    """The folder where the C++ programs were built, in which every block of the page then ran."""
    needs("onnxscript")
    needs("onnxruntime")
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
