"""The package as a whole: who may include what, what the library links, what import says when it cannot
load."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import List

import pytest
import torch

import bhyt
from support.fresh import run_fresh
from support.paths import ROOT

PACKAGE = Path(bhyt.__file__).parent
OPS = ("forward", "forward_approx", "add_forward", "add_forward_approx", "backward", "backward_approx")
# Kernels are rows of numbers: they compile without torch.
TORCH_FREE = (
    "csrc/params.h",
    "csrc/cpu/*-inl.h",
    "csrc/cpu/kernels*",
    "csrc/cpu/scalar.h",
    "csrc/cpu/tier.h",
    "csrc/cuda/*.cu",
    "csrc/cuda/*.cuh",
    "csrc/cuda/*.h",
)


def sources(*patterns: str) -> List[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def test_kernels_know_no_torch() -> None:
    """DESIGN: torch at the edge only. No torch header in the kernels."""
    assert sources("csrc/params.h"), "csrc not found"
    include = re.compile(r'#\s*include\s*[<"](ATen|torch|c10|caffe2)')
    wrong = [path.name for path in sources(*TORCH_FREE) if include.search(path.read_text())]
    assert not wrong, f"{wrong} include torch headers"


def files_with(pattern: str) -> List[str]:
    """The C++ and CUDA files in whose text the pattern is."""
    return [path.name for path in sources("csrc/*.*", "csrc/*/*.*") if re.search(pattern, path.read_text())]


def test_ops_are_said_once() -> None:
    """One file has the schemas, one has the list of ops that a dispatch key implements."""
    assert files_with(r"Tensor\? weight, Tensor lam") == ["schemas.cpp"]
    assert files_with(r"m\.impl\(") == ["adapters.h", "schemas.cpp"]  # the latter: quantised ops call their overload


def test_what_is_private_to_torch_is_in_one_file() -> None:
    """Autograd's and compiled autograd's insides, which torch may change."""
    private = r"torch/csrc|torch::dynamo|torch::autograd|c10::impl::tls"
    assert files_with(private) == ["autograd_node.h"]


def test_threads_are_those_of_torch() -> None:
    """DESIGN: at::parallel_for only. No OpenMP pragma, no std::thread, no atomics in the kernels. USERS row
    29."""
    wrong = files_with(r"#\s*pragma\s+omp|std::thread|std::async|atomicAdd|std::atomic")
    assert not wrong, f"{wrong} bring their own threads or atomics"


def test_no_second_openmp() -> None:
    """The op library needs no OpenMP runtime of its own. USERS row 29."""
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    library = next(PACKAGE.glob("_ops*.so"))
    dynamic = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert any(name.startswith("libtorch") for name in needed)
    assert not [name for name in needed if re.search(r"omp|gomp|tbb", name)], needed


def test_no_python_in_the_op_library() -> None:
    """DESIGN: the op library has no Python symbol, so that C++ programs link it."""
    if not shutil.which("nm"):
        pytest.skip("no nm")
    library = next(PACKAGE.glob("_ops*.so"))
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    assert not re.findall(r" U (_?Py[A-Z]\w+)", symbols.stdout)


def test_schemas() -> None:
    """The schemas of docs/ops.md, and nothing that mutates or aliases."""
    for name in OPS:
        schema = getattr(torch.ops.bhyt, name).default._schema
        assert not schema.is_mutable and all(
            a.alias_info is None for a in (*schema.arguments, *schema.returns)
        )
    assert str(torch.ops.bhyt.forward.default._schema) == (
        "bhyt::forward(Tensor x, Tensor? weight, Tensor lam, float kappa=10.,"
        " float eps=9.9999999999999995e-07) -> (Tensor y, Tensor variance)"
    )


def import_copy(folder: Path) -> "subprocess.CompletedProcess[str]":
    return run_fresh("import bhyt", cwd=folder)


def copy_of_package(folder: Path) -> Path:
    """The Python files alone, where `import bhyt` from `folder` finds them."""
    package = folder / "bhyt"
    package.mkdir()
    for path in PACKAGE.glob("*.py"):
        shutil.copy(path, package)
    return package


def test_built_for_another_torch(tmp_path: Path) -> None:
    """A mismatch is one line at import: built for torch X, running Y, how to mend. USERS row 1."""
    with (copy_of_package(tmp_path) / "_built_for.py").open("a") as built_for:
        built_for.write('TORCH = "1.99.0"\n')
    run = import_copy(tmp_path)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and last.startswith("ImportError: bhyt: built for torch 1.99.0, running torch")
    assert torch.__version__ in last and "pip install" in last


def test_not_built(tmp_path: Path) -> None:
    """Without the library, or without a build at all: one line that says so. USERS row 1."""
    package = copy_of_package(tmp_path)
    for _ in range(2):
        last = import_copy(tmp_path).stderr.strip().splitlines()[-1]
        assert (
            last.startswith("ImportError: bhyt: the op library has not been built") and "pip install" in last
        )
        (package / "_built_for.py").unlink(missing_ok=True)


def test_the_source_folder_says_so(tmp_path: Path) -> None:
    """Run where the source is, without a build in it: what hides the installed package, and what to do."""
    (copy_of_package(tmp_path) / "_built_for.py").unlink(missing_ok=True)
    (tmp_path / "setup.py").touch()
    last = import_copy(tmp_path).stderr.strip().splitlines()[-1]
    assert "this is the source folder" in last and "run from another one" in last and "-e ." in last


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    """A broken library: an ImportError naming both versions, not a bare OSError. USERS row 1."""
    (copy_of_package(tmp_path) / "_ops.abi3.so").write_bytes(b"not a library")
    last = import_copy(tmp_path).stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: bhyt:") and last.count(torch.__version__) >= 1


def test_import_needs_no_gpu_and_no_extras(tmp_path: Path) -> None:
    """import bhyt loads torch and nothing else: no numpy, no transformers, no CUDA context. USERS row 5."""
    code = (
        "import sys, torch; before = set(sys.modules); import bhyt;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - {'bhyt'};"
        "assert not new & {'numpy', 'transformers', 'triton', 'matplotlib', 'tqdm'}, new;"
        "assert not torch.cuda.is_initialized()"
    )
    run = run_fresh(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_names() -> None:
    """The surface that scripts may rely on (docs/api)."""
    assert set(bhyt.__all__) >= {"BHyT", "BHyTApprox", "attention_gain", "functional", "reference"}
    for name in OPS[:4]:
        assert getattr(bhyt.functional, name).__doc__ and callable(getattr(bhyt.reference, name))
