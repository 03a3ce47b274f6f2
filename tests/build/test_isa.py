"""Nothing above the baseline runs on a CPU without it: read from the library's machine code.

AVX, AVX2 and AVX-512 instructions may stand only in functions of the namespaces that are entered after a look at the
CPU (csrc/cpu/kernels.cpp, kernels_*.cpp). A std:: template that leaked out of one of them would be called by everybody.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import bhyt

FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>.*)>:$")
INSTRUCTION = re.compile(r"^\s+[0-9a-f]+:\s+(?P<mnemonic>v[a-z0-9]+|[a-z0-9]+)\b(?P<operands>.*)$")
# The second form: names that c++filt leaves mangled, lambdas of lambdas in an unoptimised build.
GUARDED = re.compile(r"\b(avx2|avx512)::|^_ZN4bhyt3cpu\d+avx(2|512)12_GLOBAL__N_1")


def above_baseline(mnemonic: str, operands: str) -> bool:
    """VEX or EVEX encoded: v-prefixed on vector or mask registers."""
    vector = mnemonic.startswith("v") and mnemonic not in ("verr", "verw")
    return vector or re.search(r"%(ymm|zmm|k[1-7])\b", operands) is not None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has tiers")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_baseline_code_is_baseline() -> None:
    library = next(Path(bhyt.__file__).parent.glob("_ops*.so"))
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", "-j", ".text", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name, guarded, found = "", {}, {}
    for line in listing.splitlines():
        if (match := FUNCTION.match(line)) is not None:
            name = match["name"]
        elif (match := INSTRUCTION.match(line)) is not None and above_baseline(match["mnemonic"], match["operands"]):
            (guarded if GUARDED.search(name) else found).setdefault(name, line.strip())
    assert not found, f"{len(found)} functions, for instance {next(iter(found.items()))}"
    assert len(guarded) > 20, "the check saw no vector code at all: symbols stripped?"
