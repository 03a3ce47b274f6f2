"""The tuned CUDA kernels as machine_code.py measures them, what each may cost, and the GPUs they run on."""

import re
from typing import NamedTuple


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


def in_one_launch(kernel: Kernel) -> Kernel:
    """The backward's variant: the same row loop. What comes behind it is not counted."""
    name = kernel.name.replace("backward_rows_persistent", "backward_rows_one_launch")
    return kernel._replace(title=f"{kernel.title}, one launch", name=name, budget=kernel.budget + 0.6,
                           large=kernel.large + 0.6)  # fmt: skip


def in_a_ring(kernel: Kernel) -> Kernel:
    """The backward's variant with rows in shared memory, from d = 16384 on."""
    name = re.sub(r"backward_rows_persistent<(\w+), \1,", r"backward_rows_ring<\1,", kernel.name)
    stages, size = (3, 2) if "bf16" in name else (2, 4)
    shared = 41232 + 32 + stages * 2 * 16 * size * kernel.threads
    return kernel._replace(title=f"{kernel.title}, ring", name=name, budget=kernel.budget + 2.4,
                           large=kernel.large + 2.4, shared=shared)  # fmt: skip


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
           "forward_row_in_registers<float, float, NoGain, Byte, false, true, 4>", 5, 1, 256, 28.4, elements=16,
           large=36.4),
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
           12, 4, 512, 20.7, 20752, True, large=28.7),
)
# fmt: on
PERSISTENT = tuple(k for k in KERNELS if k.loop)
KERNELS += tuple(in_one_launch(k) for k in PERSISTENT if "Wanted<1, false, false>" not in k.name)
KERNELS += tuple(in_a_ring(k) for k in PERSISTENT if re.search(r"<(\w+), \1, Wanted<\d, true,", k.name))
