"""What the tuned CUDA kernels ask of a multiprocessor, read from their machine code: no GPU needed.

    python benchmarks/machine_code.py                     # the installed library; csrc/cuda where that has no CUDA
    python benchmarks/machine_code.py --archs 90 FILE.o   # some architectures, other files
    python benchmarks/machine_code.py --compile           # csrc/cuda as it lies here, whatever is installed

An instruction is counted as often as a thread on the main path meets it, per element of the row: see `main_path`. Issue
is the share of all issue slots that a kernel needs to keep up with the memory of a GPU; above 75 % or so it is bound by
instructions, whatever the memory could do. A row is asked for so many cycles behind the wait for the grid before, by a
model of latencies: see `waiting_for_the_row`.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from math import ceil
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as a module the tests load it from elsewhere
from cuda_kernels import GPUS, ISSUED_WARPS, KERNELS, LIMITS, Gpu, Kernel  # noqa: E402
from sass import INSTRUCTION, PIPES, Code, Instruction, machine_code, run, tool  # noqa: E402, F401
from sass_latency import (  # noqa: E402, F401
    epilogue_turn,
    loads_in_a_row,
    registers_of,
    runs_of_loads,
    waiting_for_the_row,
)
from sass_paths import in_flight, main_path  # noqa: E402, F401

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Measure:
    kernel: Kernel
    arch: str
    registers: int
    spilled: int  # bytes of stack, and instructions that access it
    blocks: int  # resident per multiprocessor
    warps: int
    kib_in_flight: float
    per_element: float
    per_element_large: float  # where every pack has an argument of tanh above 0.9
    row_asked: int  # cycles behind the wait for the grid before to the first load of a row
    all_asked: int  # and to the last of the loads that nothing waits between
    epilogue_turn: int  # cycles
    pipes: dict[str, float]

    def issue(self, gpu: Gpu) -> float:
        warps_per_ns = self.per_element * gpu.bytes_per_ns / self.kernel.moved / 32
        return warps_per_ns / (gpu.multiprocessors * gpu.ghz * ISSUED_WARPS)


def measure(kernel: Kernel, code: Code) -> Measure:
    path = main_path(code, kernel.loop)
    stored = sum(i.bytes_accessed for i in path if i.name.startswith("ST"))
    elements = kernel.elements or stored / kernel.stored
    pipes = Counter(i.pipe for i in path)
    limits = LIMITS[code.arch]
    warp_registers = ceil(code.registers / 8) * 8 * 32
    blocks = min(limits.threads // kernel.threads, limits.blocks, 65536 // (warp_registers * (kernel.threads // 32)),
                 limits.shared_kib * 1024 // (kernel.shared + 1024))  # fmt: skip
    return Measure(
        kernel, code.arch, code.registers,
        code.stack + sum(i.name.startswith(("LDL", "STL")) for i in code.instructions),
        blocks, blocks * kernel.threads // 32,
        in_flight(path, kernel.loop) * blocks * kernel.threads / 1024,
        len(path) / elements, len(main_path(code, kernel.loop, large=True)) / elements,
        *waiting_for_the_row(main_path(code, loop=False)), epilogue_turn(code),
        {pipe: pipes[pipe] / elements for pipe in (*PIPES, "other")},
    )  # fmt: skip


def compiled(archs: list[str], folder: Path) -> list[Path]:
    """Object files of the kernels as they lie here."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    files = []
    for name in ("forward", "forward_quantized", "backward", "backward_one_launch", "backward_ring"):
        files.append(folder / f"{name}.o")
        source = str(ROOT / "csrc" / "cuda" / f"{name}.cu")
        run("nvcc", "-std=c++17", "-O3", "--threads", "2", *codes, "-c", source, "-o", str(files[-1]))
    return files


def measures(files: list[Path], archs: list[str]) -> list[Measure]:
    found = []
    for arch in archs:
        codes: dict[str, Code] = {}
        for file in files:
            codes |= machine_code(file, arch)
        found += [measure(kernel, codes[kernel.name]) for kernel in KERNELS]
    return found


def installed(archs: list[str]) -> list[Path]:
    """The installed library if it has machine code for these."""
    try:
        import bhyt
        import torch
    except ImportError:
        return []
    has = set(re.findall(r"\d+", torch.ops.bhyt.build_info()["cuda_archs"]))
    return [Path(bhyt.library_path())] if set(archs) <= has else []


def table(found: list[Measure]) -> str:
    arch = found[0].arch
    gpus = [gpu for gpu in GPUS if gpu.arch == arch]
    columns = ["instr/el", "|z|>0.9", *PIPES, "other", "regs", "spills", "blocks", "warps", "KiB ahead", "asked at",
               "turn at the end"]
    lines = [f"| sm_{arch}, d = 4096 | " + " | ".join(columns + [f"issue {gpu.name}" for gpu in gpus]) + " |"]
    lines.append("|---" * (1 + len(columns) + len(gpus)) + "|")
    for m in found:
        counts = [m.per_element, m.per_element_large, *m.pipes.values()]
        cells = [*(f"{n:.1f}" for n in counts), *map(str, (m.registers, m.spilled, m.blocks, m.warps)),
                 f"{m.kib_in_flight:.0f}", f"{m.row_asked}-{m.all_asked}", str(m.epilogue_turn),
                 *(f"{100 * m.issue(gpu):.0f} %" for gpu in gpus)]  # fmt: skip
        lines.append(f"| {m.kernel.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=lambda s: s.split(","), default=list(LIMITS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("files", type=Path, nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = options.files or (not options.compile and installed(options.archs))
        files = files or compiled(options.archs, Path(folder))
        for arch in options.archs:
            print(table(measures(files, [arch])), end="\n\n")


if __name__ == "__main__":
    main()