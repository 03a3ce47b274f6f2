"""The machine code of the CUDA kernels, without a GPU: what a changed line or a new compiler costs shows here.

benchmarks/machine_code.py reads it from the installed library, or from objects made here.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

spec = importlib.util.spec_from_file_location("machine_code", ROOT / "benchmarks" / "machine_code.py")
assert spec and spec.loader
machine_code = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = machine_code  # dataclasses look their module up
spec.loader.exec_module(machine_code)

pytestmark = pytest.mark.slow
# What is tuned: 16-byte packs, row in registers or persistent.
TUNED = re.compile(r"forward_row_in_registers|backward_rows_\w+|sum_partials")
# Row kernels of the backward, of each variant.
ROWS = {"backward_rows_persistent": 75, "backward_rows_one_launch": 65, "backward_rows_ring": 24}
SOME_CODE = """
.func : x
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA 0x60 ;
        /*0030*/                   MUFU.EX2 R8, R8 ;
        /*0040*/                   FMUL R8, R8, R8 ;
        /*0050*/                   BRA 0x70 ;
        /*0060*/                   FMUL R9, R4, R4 ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/              @P1  BRA 0x10 ;
        /*0090*/                   EXIT ;
"""


def architectures() -> list[str]:
    """Those that the build was asked for; else the list in setup.py, the one place that holds it."""
    if asked := os.environ.get("BHYT_CUDA_ARCHS"):
        return asked.split()
    match = re.search(r'"BHYT_CUDA_ARCHS", "([\d ]+)"', (ROOT / "setup.py").read_text())
    assert match, "setup.py: cuda_targets"
    return match.group(1).split()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The installed library; where that has code for fewer GPUs or none, objects made here."""
    if machine_code.tool("cuobjdump") is None or machine_code.tool("nvdisasm") is None:
        pytest.skip("no cuobjdump: the machine code was not read")
    if found := machine_code.installed(architectures()):
        return found
    if machine_code.tool("nvcc") is None:
        pytest.skip("no nvcc: the CUDA kernels were not compiled")
    return machine_code.compiled(architectures(), tmp_path_factory.mktemp("cuda"))


def tuned(files: list[Path], arch: str) -> list["machine_code.Code"]:
    found = [code for file in files for code in machine_code.machine_code(file, arch).values()]
    codes = [code for code in found if TUNED.search(code.name)]
    assert len(codes) >= 36
    return codes


def test_budgets(files: list[Path]) -> None:
    """Instructions per element on the main path, and no spills, in the code for sm_90."""
    if "90" not in architectures():
        pytest.skip("sm_90 is not built")
    found = machine_code.measures(files, ["90"])
    print(machine_code.table(found))
    over = [f"{m.kernel.title}: {m.per_element:.1f}" for m in found if m.per_element > m.kernel.budget]
    over += [f"{m.kernel.title}, large arguments: {m.per_element_large:.1f}" for m in found
             if m.per_element_large > (m.kernel.large or m.per_element_large)]  # fmt: skip
    assert not over, over
    assert not any(m.spilled for m in found)
    h200 = next(gpu for gpu in machine_code.GPUS if gpu.name == "H200")
    bound = [m.kernel.title for m in found if m.kernel.loop and m.kernel.stored == 2 and m.issue(h200) > 0.62]
    assert not bound, f"16-bit backwards that an H200's instructions bind: {bound}"


def test_rows_are_asked_for_at_once(files: list[Path]) -> None:
    """Every tuned forward, in the code for sm_90: by the model no row waits for lam, a load latency more."""
    if "90" not in architectures():
        pytest.skip("sm_90 is not built")
    forwards = [code for code in tuned(files, "90") if "forward_row_in_registers" in code.name]
    assert len(forwards) == 120
    asked = {code.name: machine_code.waiting_for_the_row(machine_code.main_path(code, loop=False)) for code in forwards}
    late = {name: cycles for name, cycles in asked.items() if not 0 < cycles[0] <= 230 or cycles[1] > 270}
    assert not late, late


def test_sums_over_blocks_wait_once(files: list[Path]) -> None:
    """Eight partial sums are asked for before one is waited for. In the code for sm_90, by blocks of few registers, and
    the groups of a block read all of their columns before they write one."""
    for arch in architectures():
        runs = [machine_code.loads_in_a_row(code) for code in tuned(files, arch) if "sum_partials" in code.name]
        assert len(runs) == 2 and min(runs) >= 8, arch
    if "90" not in architectures():
        pytest.skip("sm_90 is not built")
    codes = tuned(files, "90")
    sums = {code.name: code for code in codes if "sum_partials" in code.name}
    rows = [code for code in codes if "backward_rows_" in code.name]
    beside = max(code.registers for code in rows)  # 512 threads of these, and 128 of the others
    assert 512 * beside + 128 * sums["sum_partials<float>"].registers <= 65536, beside
    turns = {code.name: machine_code.epilogue_turn(code) for code in rows}
    assert all(0 < turn <= 200 for turn in turns.values()), turns


def test_one_launch_orders_memory(files: list[Path]) -> None:
    """In the variant of one launch a block counts itself behind a fence of the whole GPU, and reads other blocks' sums
    behind what empties its own cache. The sums over blocks, of columns and of lam, wait as rarely as in a kernel of
    their own. No row loop has any of it."""
    for arch in architectures():
        codes = [code for code in tuned(files, arch) if "one_launch" in code.name]
        assert len(codes) == ROWS["backward_rows_one_launch"]
        for code in codes:
            names = [i.name for i in code.instructions]
            counts = [i for i, name in enumerate(names) if name.startswith("ATOMG") and "ADD.STRONG.GPU" in name]
            fences = [i for i, name in enumerate(names) if re.match(r"MEMBAR\.\w+\.GPU", name)]
            looks = [i for i, name in enumerate(names) if name.startswith("LDG.E.STRONG.GPU")]
            emptied = [i for i, name in enumerate(names) if name == "CCTL.IVALL"]
            assert fences and counts and fences[0] < counts[0], code.name
            assert any(counts[0] < i < counts[1] for i in emptied), code.name
            assert looks and any(looks[0] < i for i in emptied), code.name
            wanted = "Wanted<2, true, true>" in code.name or "Wanted<1, true, true>" in code.name
            assert not wanted or machine_code.runs_of_loads(code)[1] >= 8, code.name


def test_row_loops_flush_nothing(files: list[Path]) -> None:
    """A cluster's blocks exchange their sums without a barrier that empties caches or waits for all of memory."""
    for arch in architectures():
        loops = [code for code in tuned(files, arch) if "backward_rows_" in code.name]
        assert {name: sum(name in code.name for code in loops) for name in ROWS} == ROWS
        for code in loops:
            grad_x, sums = re.search(r"Wanted<(\d), (\w+),", code.name).groups()
            addresses = [instruction.address for instruction in machine_code.main_path(code, loop=True)]
            body = [i.name for i in code.instructions if min(addresses) <= i.address <= max(addresses)]
            stores = sum(name.startswith("STG.E") and name.endswith("128") for name in body)
            assert stores >= 2 if grad_x != "0" else stores == 0, code.name
            exchanges = any(name.startswith("SYNCS") for name in body)  # of sums
            assert exchanges == (sums == "true" and int(arch) >= 90), code.name
            bulk = sum(name.startswith("UBLKCP") for name in body)
            assert bulk == (2 if "ring" in code.name and int(arch) >= 90 else 0), code.name
            flushes = ("MEMBAR", "CCTL.IVALL", "UCGABAR", "ERRBAR")
            assert not [name for name in body if name.startswith(flushes)], code.name


def test_tuned_kernels_move_16_bytes_at_a_time(files: list[Path]) -> None:
    """Rows are read and written by 16-byte instructions, without local memory, in the code for sm_90. A pack in eight
    bits is 8 bytes, beside fp32 4."""
    for code in tuned(files, "90") if "90" in architectures() else ():
        names = [instruction.name for instruction in code.instructions]
        assert not [name for name in names if name.startswith(("LDL", "STL"))], code.name
        if "sum_partials" not in code.name:
            assert any(name.startswith("LDG") and name.endswith("128") for name in names), code.name
            if "Wanted<0," in code.name:  # no grad_x: the rows are only read
                continue
            bits = "128" if "Byte" not in code.name else "E" if "float, NoGain" in code.name else "64"
            assert any(name.startswith("STG") and name.endswith(bits) for name in names), code.name


def test_no_spills(files: list[Path]) -> None:
    """For every architecture: the tuned kernels need no stack."""
    for arch in architectures():
        assert not [code.name for code in tuned(files, arch) if code.stack], arch


def test_main_path() -> None:
    """Of a loop with a branch: the way without the exponential, or with `large` the one with it."""
    found = machine_code.INSTRUCTION.findall(SOME_CODE)
    code = machine_code.Code("90", "x", [machine_code.Instruction(int(a, 16), p.strip(), n, o) for a, p, n, o in found])
    names = [i.name for i in machine_code.main_path(code, loop=True)]
    assert names == ["LDG.E.128", "BRA", "FMUL", "STG.E.128", "BRA"]
    large = [i.name for i in machine_code.main_path(code, loop=True, large=True)]
    assert large == ["LDG.E.128", "BRA", "MUFU.EX2", "FMUL", "BRA", "STG.E.128", "BRA"]
    assert len(machine_code.main_path(code, loop=False)) == 7
    assert machine_code.in_flight(machine_code.main_path(code, loop=True), loop=True) == 16


# Four loads and a wait, then two; an epilogue that reads, adds and writes one column behind the other.
SOME_LOADS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ACQBULK ;
        /*0020*/                   IADD3 R2, R1, 0x10, RZ ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0050*/                   R2UR UR8, R8 ;
        /*0060*/                   LDG.E.128 R12, desc[UR4][R2.64] ;
        /*0070*/                   FADD R4, R4, R12 ;
        /*0080*/              @P1  BRA 0x20 ;
        /*0090*/                   LDS R4, [R2] ;
        /*00a0*/                   FADD R4, R4, R5 ;
        /*00b0*/                   STS [R2], R4 ;
        /*00c0*/                   BAR.SYNC 0x0 ;
        /*00d0*/              @P1  BRA 0x90 ;
        /*00e0*/                   EXIT ;
"""


def test_latencies() -> None:
    """A load behind a value that another load brings waits for it; what is ready when the wait ends does not count."""
    found = machine_code.INSTRUCTION.findall(SOME_LOADS)
    lines = [machine_code.Instruction(int(a, 16), p.strip(), n, o) for a, p, n, o in found]
    code = machine_code.Code("90", "x", lines)
    # ACQBULK, IADD3, 5 cycles to its result, LDG, LDG, 285 cycles to its result, R2UR, LDG
    assert machine_code.waiting_for_the_row(lines) == (7, 294)
    assert machine_code.loads_in_a_row(code) == 2
    # LDS, 30 cycles, FADD, 5 cycles, STS, BAR, BRA
    assert machine_code.epilogue_turn(code) == 38
    assert machine_code.registers_of(lines[3]) == ({"R4", "R5", "R6", "R7"}, {"UR4", "R2", "R3"})


def test_uniform_branches() -> None:
    """A branch on a predicate that stands among its operands may go on, the negated ones of sm_100 too."""
    for operands, ways in (("0x20", 1), ("UP0, 0x20", 2), ("!UP0, 0x20", 2)):
        lines = [(0, "BRA.U", operands), (0x10, "NOP", ""), (0x20, "EXIT", "")]
        code = machine_code.Code("100", "x", [machine_code.Instruction(a, "", n, o) for a, n, o in lines])
        assert len(code.successors(0)) == ways
