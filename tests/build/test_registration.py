"""Two libraries with ops of bhyt in one process: the first registers them, in any order, and nothing aborts.

Every test runs in fresh processes: a process registers the ops once.
"""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict

import pytest
import torch
from torch.utils import cpp_extension

import bhyt
from support.checks import same_bits
from support.fresh import run_fresh
from support.paths import ROOT, TESTS
from support.programs import built

PACKAGE = Path(bhyt.__file__).parent
PROLOGUE = "import sys, torch; load, a = torch.ops.load_library, sys.argv[1:]\n"
# Outputs and gradients of both kinds of site, as a tensor.
RESULTS = """
def results():
    x = torch.linspace(-3, 3, 192).reshape(3, 64).requires_grad_()
    weight, lam = (torch.linspace(0.5, 1.5, 64).requires_grad_(), torch.ones(1).requires_grad_())
    y, v = torch.ops.bhyt.forward(x, weight, lam)
    y, s = torch.ops.bhyt.add_forward_approx(y, x, v, None, weight, lam)
    q, v = torch.ops.bhyt.forward_quantized(x.detach(), weight.detach(), lam.detach(), 1 / 127)
    grads = torch.autograd.grad(y.sum(), (x, weight, lam))
    return torch.cat([t.detach().double().flatten() for t in (y, s, v, q, *grads)])
"""


def run(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Runs code in a Python that has loaded torch alone; `load` loads a library, `a` are the arguments."""
    return run_fresh(PROLOGUE + RESULTS + code, *arguments, cwd=PACKAGE.parent)


def refusal(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line of a process that an ImportError ended."""
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: bhyt: "), done.stderr
    return last


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the op library, as docs/deploy.md makes one."""
    return Path(shutil.copy(bhyt.library_path(), tmp_path / "bhyt_ops.so"))


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """What the package alone computes."""
    names: Dict[str, object] = {"torch": torch}
    exec(RESULTS, names)
    values: torch.Tensor = names["results"]()  # type: ignore[operator]
    return values


@pytest.mark.parametrize(
    "order",
    ["import bhyt; load(a[0])", "load(a[0]); import bhyt", "load(a[0]); load(a[1])", "load(a[1]); import bhyt",
     "load(a[0]); import bhyt; load(a[1])"],
)  # fmt: skip
def test_a_copy_is_recognised(copy: Path, expected: torch.Tensor, tmp_path: Path, order: str) -> None:
    """The library, copies of it and the package in any order: the same bits, gradients included, and not a word."""
    code = f"{order}\ntorch.save(results(), a[2])"
    done = run(code, copy, bhyt.library_path(), tmp_path / "results.pt")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert same_bits(torch.load(tmp_path / "results.pt"), expected)


def test_modules_after_a_copy(copy: Path, tmp_path: Path) -> None:
    """A scripted model runs on a copy, then the package is imported: the model and modules go on, with the same
    bits."""
    site, x = bhyt.BHyT(64, lam=2.0), torch.randn(5, 64)
    torch.jit.save(torch.jit.script(site), str(tmp_path / "site.pt"))
    torch.save((x, site.state_dict(), site(x).detach()), tmp_path / "expected.pt")
    done = run(
        "load(a[0]); m = torch.jit.load(a[1]); x, state, expected = torch.load(a[2])\n"
        "before = m(x); import bhyt; net = bhyt.BHyT(64, lam=2.0); net.load_state_dict(state)\n"
        "for y in (before, m(x), net(x), torch.jit.script(net)(x), torch.jit.load(a[1])(x)):\n"
        "    assert torch.equal(y, expected) and y.requires_grad\n"
        "m(x).sum().backward(); net(x).sum().backward(); assert torch.equal(m.weight.grad, net.weight.grad)",
        *(copy, tmp_path / "site.pt", tmp_path / "expected.pt"),
    )
    assert done.returncode == 0, done.stderr


def test_another_build_of_the_package(copy: Path, tmp_path: Path) -> None:
    """The ops of a build without the package's CUDA kernels, or for another version, are not taken for the
    package's."""
    shutil.copytree(PACKAGE, tmp_path / "bhyt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    built_for = tmp_path / "bhyt" / "_built_for.py"
    facts = built_for.read_text()
    code = "import os; os.chdir(a[1]); sys.path[0] = a[1]; load(a[0]); import bhyt"
    built_for.write_text(facts + 'CUDA_ARCHS = "sm_72"\n')
    assert "needs those of version" in (last := refusal(run(code, copy, tmp_path))) and "and CUDA sm_72" in last
    built_for.write_text(facts + 'VERSION = "0.0.7"\n')
    last = refusal(run(code.replace("load(a[0]); ", ""), copy, tmp_path))
    assert f"version {bhyt.__version__} has an op library of version 0.0.7" in last and "pip install" in last


@pytest.fixture(scope="module")
def other() -> Dict[str, Path]:
    """Two libraries of cpp/other_ops.cpp."""
    include = [f"-I{path}" for path in (*cpp_extension.include_paths(), ROOT / "csrc")]
    flags = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC", "-fvisibility=hidden", *include]
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]

    def build(name: str) -> Path:
        define = ["-DOLD"] if name == "old_ops" else []
        return built(f"{name}.so", [TESTS / "cpp" / "other_ops.cpp"], [*flags, *define], libraries)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(("other_ops", "old_ops"), pool.map(build, ("other_ops", "old_ops"))))


@pytest.mark.slow
def test_the_ops_of_another_version_are_refused(other: Dict[str, Path]) -> None:
    """Loaded before the package: one line that names both versions, and the ops that were there still work."""
    for name, theirs in (("other_ops", "0.0.1 for torch 2.7 and CUDA sm_90"), ("old_ops", "unknown for torch unknown")):
        last = refusal(run("load(a[0])\nimport bhyt", other[name]))
        assert f"registered the ops of version {theirs}" in last and "Warning" not in last
        assert f"version {bhyt.__version__} for torch" in last and "bhyt.library_path()" in last
        code = (
            "load(a[0])\ntry: import bhyt\nexcept ImportError: assert torch.ops.bhyt.forward(torch.ones(3)).sum() == 3"
        )
        assert run(code, other[name]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import bhyt; load(a[0])", "load(a[1]); load(a[0]); import bhyt"])
def test_another_version_later_changes_nothing(
    other: Dict[str, Path], copy: Path, expected: torch.Tensor, tmp_path: Path, order: str
) -> None:
    """Loaded after the ops were registered: one warning that names it and both versions; the ops stay as they are."""
    done = run(f"{order}\ntorch.save(results(), a[2])", other["other_ops"], copy, tmp_path / "results.pt")
    assert done.returncode == 0 and done.stderr.count("Warning") == 1, done.stderr
    for text in (str(other["other_ops"]), "version 0.0.1 for torch 2.7.0 and CUDA sm_90", bhyt.__version__):
        assert text in done.stderr
    assert same_bits(torch.load(tmp_path / "results.pt"), expected)


@pytest.mark.slow
def test_a_library_after_another_version(other: Dict[str, Path]) -> None:
    """The op library itself, loaded after other ops: no abort, a warning; `import bhyt` is still one line."""
    for name in ("other_ops", "old_ops"):
        done = run("load(a[0]); load(a[1])\nassert torch.ops.bhyt.forward(torch.ones(3)).sum() == 3\nimport bhyt",
                   other[name], bhyt.library_path())  # fmt: skip
        assert "registered the ops of version" in refusal(done) and done.stderr.count("Warning") == 1
