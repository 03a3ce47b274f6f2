"""What the tuned CUDA kernels ask of a multiprocessor, read from their machine code: no GPU needed.

    python benchmarks/machine_code.py                     # the installed library; csrc/cuda where that has no CUDA
    python benchmarks/machine_code.py --archs 90 FILE.o   # some architectures, other files
    python benchmarks/machine_code.py --compile           # csrc/cuda as it lies here, whatever is installed

An instruction is counted as often as a thread on the main path meets it, per element of the row: see `main_path`. Issue
is the share of all issue slots that a kernel needs to keep up with the memory of a GPU; above 75 % or so it is bound by
instructions, whatever the memory could do.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent


class Gpu(NamedTuple):
    name: str
    arch: str
    multiprocessors: int
    ghz: float
    bytes_per_ns: float  # achieved by a copy


GPUS = (
    Gpu("A100", "80", 108, 1.41, 1750),
    Gpu("H100", "90", 132, 1.98, 3000),
    Gpu("H200", "90", 132, 1.98, 4300),
    Gpu("B200", "100", 148, 1.965, 7200),
)
ISSUED_WARPS = 4  # instructions per multiprocessor and clock; 128 FP32, 64 ALU and 16 special-function lanes


class Limits(NamedTuple):
    """Of a multiprocessor."""

    threads: int
    blocks: int
    shared_kib: int


LIMITS = {
    "80": Limits(2048, 32, 164),
    "90": Limits(2048, 32, 228),
    "100": Limits(2048, 32, 228),
    "110": Limits(1536, 24, 228),
    "120": Limits(1536, 24, 100),
}


class Kernel(NamedTuple):
    """One tuned kernel as it runs at d = 4096, and what it may cost on sm_90."""

    title: str
    name: str  # demangled, without namespaces; Wanted<..>: of a backward, csrc/wanted.h
    moved: int  # bytes per element
    stored: int
    threads: int  # per block
    budget: float  # instructions per element
    shared: int = 0  # dynamic, bytes per block
    loop: bool = False  # rows in a loop: what stands before and after it is not counted
    elements: int = 0  # per thread, where its stores are too narrow to tell them from a row's variance
    large: float = 0  # instructions per element where every pack has an argument of tanh above 0.9, if they are more


# fmt: off
KERNELS = (
    Kernel("exact forward bf16", "forward_row_in_registers<bf16, bf16, bf16, bf16, false, true, 4>", 4, 2, 128, 13.2),
    Kernel("exact forward bf16, no weight",
           "forward_row_in_registers<bf16, bf16, NoGain, bf16, false, true, 4>", 4, 2, 128, 10.4),
    Kernel("exact forward bf16, weight fp32",
           "forward_row_in_registers<bf16, bf16, float, bf16, false, true, 4>", 4, 2, 128, 13.2),
    Kernel("exact forward bf16 + residual",
           "forward_row_in_registers<bf16, bf16, bf16, bf16, true, true, 4>", 8, 4, 128, 18.3),
    Kernel("exact forward bf16 + fp32 residual",
           "forward_row_in_registers<bf16, float, bf16, bf16, true, true, 4>", 12, 6, 256, 30.7, large=38.7),
    Kernel("exact forward fp32",
           "forward_row_in_registers<float, float, float, float, false, true, 4>", 8, 4, 256, 25, large=33),
    Kernel("exact forward fp32 + residual",
           "forward_row_in_registers<float, float, float, float, true, true, 4>", 16, 8, 256, 28.7, large=36.7),
    Kernel("approximate forward bf16",
           "forward_row_in_registers<bf16, bf16, bf16, bf16, false, false, 4>", 4, 2, 128, 10.1),
    Kernel("approximate forward bf16 + residual",
           "forward_row_in_registers<bf16, bf16, bf16, bf16, true, false, 4>", 8, 4, 128, 15),
    Kernel("approximate forward fp32",
           "forward_row_in_registers<float, float, float, float, false, false, 4>", 8, 4, 256, 20.5, large=27.5),
    Kernel("exact forward bf16 to int8",
           "forward_row_in_registers<bf16, bf16, NoGain, Byte, false, true, 4>", 3, 1, 128, 22.1, large=30.1),
    Kernel("exact forward bf16 + residual, to int8",
           "forward_row_in_registers<bf16, bf16, NoGain, Byte, true, true, 4>", 7, 3, 128, 26.9, large=34.9),
    Kernel("exact forward fp32 to int8",
           "forward_row_in_registers<float, float, NoGain, Byte, false, true, 4>", 5, 1, 256, 28.4,
           elements=16, large=36.4),
    Kernel("approximate forward bf16 to int8",
           "forward_row_in_registers<bf16, bf16, NoGain, Byte, false, false, 4>", 3, 1, 128, 19.4, large=26.4),
    Kernel("approximate forward bf16 + residual, to int8",
           "forward_row_in_registers<bf16, bf16, NoGain, Byte, true, false, 4>", 7, 3, 128, 23.9, large=30.9),
    Kernel("exact backward bf16",
           "backward_rows_persistent<bf16, bf16, Wanted<2, true, true>, false>",
           6, 2, 512, 25.7, 20752, True, large=41.5),
    Kernel("exact backward bf16 + grad_sum",
           "backward_rows_persistent<bf16, bf16, Wanted<2, true, true>, true>", 8, 2, 512, 27.2, 20752, True, large=43),
    Kernel("exact backward fp32",
           "backward_rows_persistent<float, float, Wanted<2, true, true>, false>",
           12, 4, 512, 29, 20752, True, large=42.5),
    Kernel("exact backward fp32 + grad_sum",
           "backward_rows_persistent<float, float, Wanted<2, true, true>, true>",
           16, 4, 512, 30.5, 20752, True, large=44),
    Kernel("exact backward bf16 on an fp32 stream",
           "backward_rows_persistent<bf16, float, Wanted<2, true, true>, false>",
           10, 4, 512, 30, 20752, True, large=43.5),
    Kernel("approximate backward bf16",
           "backward_rows_persistent<bf16, bf16, Wanted<1, true, true>, false>", 6, 2, 512, 25, 20752, True, large=41),
    Kernel("approximate backward fp32",
           "backward_rows_persistent<float, float, Wanted<1, true, true>, false>",
           12, 4, 512, 26.5, 20752, True, large=40),
    Kernel("exact backward bf16, frozen weight",
           "backward_rows_persistent<bf16, bf16, Wanted<2, true, false>, false>",
           6, 2, 512, 24.7, 20752, True, large=34.7),
    Kernel("exact backward fp32, frozen weight",
           "backward_rows_persistent<float, float, Wanted<2, true, false>, false>",
           12, 4, 512, 27.8, 20752, True, large=35.8),
    Kernel("approximate backward bf16, x alone",
           "backward_rows_persistent<bf16, bf16, Wanted<1, false, false>, false>",
           6, 2, 512, 18.6, 20752, True, large=28.6),
    Kernel("approximate backward fp32, x alone",
           "backward_rows_persistent<float, float, Wanted<1, false, false>, false>",
           12, 4, 512, 19.9, 20752, True, large=27.9),
)
# fmt: on

PIPES = {
    "fp32": r"F(ADD|MUL|FMA)\d?\b|IMAD|F?HFMA2|HMUL2|HADD2",
    "alu": r"LOP3|PLOP3|SHF|PRMT|ISETP|FSETP|V?I(ADD|MNMX)|LEA|MOV\b|SEL|FSEL|FMNMX|F2FP|FCHK|P2R|R2P|LOP",
    "mufu": r"MUFU|I2F|F2I|F2F|POPC|BREV",
    "memory": r"LD|ST|ATOM|RED\b|SHFL|CCTL|UBLK|SYNCS",
}


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str  # with its modifiers
    operands: str

    @property
    def target(self) -> Optional[int]:
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found.group(1), 16) if found and self.name.split(".")[0] in ("BRA", "CALL") else None

    @property
    def pipe(self) -> str:
        return next((pipe for pipe, names in PIPES.items() if re.match(names, self.name)), "other")

    @property
    def bytes_accessed(self) -> int:
        """Of a row, by this thread."""
        if not re.match(r"(LDG|STG|LDGSTS|LD|ST)\.", self.name):
            return 0
        width = re.search(r"\.(64|128)\b", self.name)
        return int(width.group(1)) // 8 if width else 0


@dataclass
class Code:
    """A kernel in one architecture's machine code."""

    arch: str
    name: str
    instructions: list[Instruction]
    registers: int = 0
    stack: int = 0
    index: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = {instruction.address: i for i, instruction in enumerate(self.instructions)}

    def successors(self, i: int) -> list[int]:
        instruction = self.instructions[i]
        name = instruction.name.split(".")[0]
        always = instruction.predicate in ("", "@UPT", "@PT") and not re.match(r"!?U?P\d", instruction.operands)
        if name in ("EXIT", "RET") and always:
            return []
        following = [i + 1] if i + 1 < len(self.instructions) else []
        if name != "BRA":
            return following
        assert instruction.target is not None
        target = [self.index[instruction.target]]
        return target if always and "DIV" not in instruction.name else target + following


def worth(instruction: Instruction, large: bool) -> tuple[int, ...]:
    """What a path prefers to meet, most important first."""
    name = instruction.name
    return (
        instruction.bytes_accessed,
        -bool(re.match(r"UCGABAR|MAPA|ERRBAR|CCTL|MEMBAR|SYNCS|CALL|UBLK", name)),  # clusters; divisions' rare ends
        name.startswith("SHFL"),
        bool(re.match(r"MUFU\.EX2", name)) * (1 if large else -1),
        name.startswith("I2IP"),  # eight bits: the longer way, to integers
        # Arithmetic, so that no element is left out; but not what only looks for large arguments one by one.
        name.startswith(("FMUL", "FFMA")) - 4 * name.startswith("FSETP"),
        -1,
    )


def main_path(code: Code, loop: bool, large: bool = False) -> list[Instruction]:
    """The instructions of one thread: the way through the kernel, or round its row loop, that moves the most of a row.

    Of ways that move as much the one without clusters and without the rare ends of divisions, then the one with the
    most shuffles (rows longer than a warp), then the one without arguments of tanh above 0.9, or with `large` the one
    where all are; then int8 rather than float8; then the one with the most arithmetic, which
    leaves no element out; then the shortest.
    """
    nodes = len(code.instructions)
    order: list[int] = []  # every node behind its successors, but for edges back
    back: list[tuple[int, int]] = []
    state = [0] * nodes
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(code.successors(0)))]
    state[0] = 1
    while stack:
        node, following = stack[-1]
        for successor in following:
            if state[successor] == 1:
                back.append((node, successor))
            elif state[successor] == 0:
                state[successor] = 1
                stack.append((successor, iter(code.successors(successor))))
                break
        else:
            state[node] = 2
            order.append(node)
            stack.pop()
    edges_back = set(back)

    def best(start: int, ends: Optional[set[int]], inside: Optional[set[int]]) -> list[int]:
        value: dict[int, tuple[int, ...]] = {}
        follow: dict[int, Optional[int]] = {}
        for node in order:
            if inside is not None and node not in inside:
                continue
            ways = [s for s in code.successors(node) if (node, s) not in edges_back and s in value]
            own = worth(code.instructions[node], large)
            if ends is None and not code.successors(node) or ends is not None and node in ends:
                value[node], follow[node] = own, None
            elif ways:
                chosen = max(ways, key=lambda s: value[s])
                value[node], follow[node] = tuple(map(sum, zip(own, value[chosen]))), chosen
        path, at = [], start
        while True:
            path.append(at)
            following = follow[at]
            if following is None:
                return path
            at = following

    if not loop:
        return [code.instructions[i] for i in best(0, None, None)]
    before: dict[int, list[int]] = {}
    for node in range(nodes):
        for successor in code.successors(node):
            before.setdefault(successor, []).append(node)
    bodies: dict[int, set[int]] = {}
    ends: dict[int, set[int]] = {}
    for node, head in back:
        body, new = {head, node}, [node]
        while new:
            if (at := new.pop()) != head:
                fresh = [p for p in before.get(at, []) if p not in body and state[p]]
                body.update(fresh)
                new += fresh
        bodies[head] = bodies.get(head, set()) | body
        ends.setdefault(head, set()).add(node)
    head = max(bodies, key=lambda h: sum(code.instructions[i].bytes_accessed for i in bodies[h]))
    return [code.instructions[i] for i in best(head, ends[head], bodies[head])]


def in_flight(path: list[Instruction], loop: bool) -> int:
    """The most bytes a thread has asked for and not yet touched."""
    most = 0
    waiting: dict[int, int] = {}  # by the number of the load's first register
    for instruction in path * (2 if loop else 1):
        touched = {int(r) for r in re.findall(r"\bR(\d+)\b", instruction.operands)}
        waiting = {r: size for r, size in waiting.items() if not touched & set(range(r, r + size // 4))}
        if instruction.name.startswith(("LDG.", "LD.")) and instruction.bytes_accessed:
            waiting[int(re.findall(r"\bR(\d+)\b", instruction.operands)[0])] = instruction.bytes_accessed
        most = max(most, sum(waiting.values()))
    return most


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
        {pipe: pipes[pipe] / elements for pipe in (*PIPES, "other")},
    )  # fmt: skip


@cache
def tool(name: str) -> Optional[str]:
    """A program of the CUDA toolkit or of the nvidia-cuda-* packages, or None."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    try:
        import nvidia

        folders += [folder / "bin" for root in nvidia.__path__ for folder in Path(root).iterdir()]
    except ImportError:
        pass
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def run(name: str, *arguments: str) -> str:
    program = tool(name)
    if program is None:
        raise SystemExit(f"machine_code.py: {name} not found: set CUDA_HOME, or install nvidia-cuda-{name}")
    # cuobjdump looks for nvdisasm on the path, and finds it beside itself.
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(program).parent)])
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        raise SystemExit(f"machine_code.py: {name} failed: {done.stderr[-2000:]}")
    return done.stdout


def plain(names: list[str]) -> list[str]:
    """Mangled names as they stand in KERNELS."""
    text = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True).stdout
    text = re.sub(r"\(bhyt::GradX\)|bhyt::|cuda::|\(anonymous namespace\)::|\bvoid ", "", text)
    return [re.sub(r"\(.*", "", line) for line in text.splitlines()]


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


@cache
def machine_code(file: Path, arch: str) -> dict[str, Code]:
    """Kernels by name. Read once: disassembling the library takes ten seconds."""
    parts = re.split(r"\n\s*Function : (\S+)", run("cuobjdump", "-sass", "-arch", f"sm_{arch}", str(file)))[1:]
    usage = run("cuobjdump", "-res-usage", "-arch", f"sm_{arch}", str(file))
    used = {name: (int(r), int(s)) for name, r, s in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage)}
    codes = {}
    for symbol, name, body in zip(parts[::2], plain(parts[::2]), parts[1::2]):
        instructions = [Instruction(int(a, 16), p.strip(), n, o) for a, p, n, o in INSTRUCTION.findall(body)]
        codes[name] = Code(arch, name, instructions, *used[symbol])
    return codes


def compiled(archs: list[str], folder: Path) -> list[Path]:
    """Object files of the kernels as they lie here."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    files = []
    for name in ("forward", "forward_quantized", "backward"):
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
    columns = ["instr/el", "|z|>0.9", *PIPES, "other", "regs", "spills", "blocks", "warps", "KiB ahead"]
    lines = [f"| sm_{arch}, d = 4096 | " + " | ".join(columns + [f"issue {gpu.name}" for gpu in gpus]) + " |"]
    lines.append("|---" * (1 + len(columns) + len(gpus)) + "|")
    for m in found:
        counts = [m.per_element, m.per_element_large, *m.pipes.values()]
        cells = [*(f"{n:.1f}" for n in counts), *map(str, (m.registers, m.spilled, m.blocks, m.warps)),
                 f"{m.kib_in_flight:.0f}", *(f"{100 * m.issue(gpu):.0f} %" for gpu in gpus)]  # fmt: skip
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
