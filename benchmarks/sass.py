"""Reads the machine code of CUDA kernels: cuobjdump's text becomes instructions."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple, Optional

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
