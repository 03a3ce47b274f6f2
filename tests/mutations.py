"""Breaks the CUDA kernels one line at a time and asks the tests on the host to notice.

    python tests/mutations.py            every mutant; exit status 1 if one survives

Each mutant is a copy of csrc with one replacement; the programs of tests/cpp are built against it and run. A mutant is
caught when a program fails, does not compile or does not end. Some minutes on two cores.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    programs: tuple[str, ...]


FORWARD, BACKWARD, BOTH = ("forward",), ("backward",), ("forward", "backward")
MUTANTS = (
    Mutant("reduce.cuh", "for (int mask = 16; mask > 0; mask /= 2)\n    if (mask < lanes)", "for (int mask = 8; mask > 0; mask /= 2)\n    if (mask < lanes)", BOTH),
    Mutant("reduce.cuh", "lane < ladder.threads / 32 ? sums[lane] : A(0)", "lane < ladder.threads / 32 - 1 ? sums[lane] : A(0)", BOTH),
    Mutant("reduce.cuh", "for (int i = 0; i < ladder.parts; ++i)", "for (int i = 1; i < ladder.parts; ++i)", BOTH),
    Mutant("reduce.cuh", "odd = hw::fma(x[j + 1], y[j + 1], odd)", "odd = hw::fma(x[j + 1], y[j], odd)", FORWARD),
    Mutant("reduce.cuh", "  else\n    hw::block_barrier();", "", FORWARD),
    Mutant("forward.cu", "return inside && pack_of(k) < ladder.row_packs;", "return inside && pack_of(k) < ladder.row_packs - 1;", FORWARD),
    Mutant("forward.cu", "const A v = hw::div(total, constants.d);", "const A v = hw::div(total, constants.d + 1);", FORWARD),
    Mutant("forward.cu", "return i < rows_per_thread && row_of(i) < p.rows;", "return i < rows_per_thread && row_of(i) < p.rows - 1;", FORWARD),
    Mutant("math.cuh", "constexpr float kSmall = 0.9f;", "constexpr float kSmall = 1.9f;", BOTH),
    Mutant("math.cuh", "u[j] = hw::mul(hw::mul(4.f, r), hw::add(1.f, -r));", "u[j] = hw::mul(4.f, r);", BACKWARD),
    Mutant("math.cuh", "p = hw::fma(p, s, 0.13330359756946564f);", "p = hw::fma(p, s, 0.1334f);", FORWARD),
    Mutant("backward_kernels.cuh", "columns[j] = hw::fma(dy, t[j], columns[j]);", "columns[j] = hw::mul(dy, t[j]);", BACKWARD),
    Mutant("backward_kernels.cuh", "hw::fma(A(2), dv, -hw::div", "hw::fma(A(2), dv, hw::div", BACKWARD),
    Mutant("backward_kernels.cuh", "hw::mul(A(-0.5), scale.a)", "hw::mul(A(-1), scale.a)", BACKWARD),
    Mutant("backward_kernels.cuh", "lam = hw::fma(scale.per_lam, sum, lam);", "lam = hw::fma(scale.a, sum, lam);", BACKWARD),
    Mutant("backward_kernels.cuh", "dx[j] = grad_sum.template get<A>(j);", "dx[j] = A(0);", BACKWARD),
    Mutant("backward_kernels.cuh", "load_row(row + step);", "load_row(row + 1);", BACKWARD),
    Mutant("backward_kernels.cuh", "for (int i = 0; i < kSlices; ++i)", "for (int i = 0; i < kSlices - 1; ++i)", BACKWARD),
    Mutant("backward_kernels.cuh", "if (mask >= ladder.threads) {", "if (mask > ladder.threads) {", BACKWARD),
    Mutant("backward_kernels.cuh", "column = turn == 0 ? columns[k][j] : hw::add(column, columns[k][j]);", "column = columns[k][j];", BACKWARD),
)


def caught(csrc: Path, folder: Path, program: str) -> bool:
    source = ROOT / "tests" / "cpp" / f"test_cuda_{program}.cpp"
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-DBHYT_SIMT", f"-I{source.parent}", f"-I{csrc / 'cuda'}"]
    built = folder / program
    if subprocess.run(["g++", *options, str(source), "-o", str(built)], capture_output=True).returncode:
        return True
    try:
        return subprocess.run([str(built)], capture_output=True, timeout=300).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def main() -> int:
    survivors = 0
    for mutant in MUTANTS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shutil.copytree(ROOT / "csrc", folder / "csrc")
            file = folder / "csrc" / "cuda" / mutant.file
            text = file.read_text()
            if text.count(mutant.old) < 1:
                raise SystemExit(f"{mutant.file} no longer has: {mutant.old}")
            file.write_text(text.replace(mutant.old, mutant.new, 1))
            found = any(caught(folder / "csrc", folder, program) for program in mutant.programs)
        survivors += not found
        print("caught  " if found else "SURVIVED", f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} caught")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
