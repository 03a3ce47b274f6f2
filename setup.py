"""Builds the op library `bhyt/_ops`, for the torch in this environment.

BHYT_CUDA=1 demands the CUDA kernels, BHYT_CUDA=0 leaves them out; unset, they are built when nvcc is found, whether or
not a GPU is visible. BHYT_CUDA_ARCHS="80 90" names the architectures to build for; unset, each generation that this
nvcc knows. BHYT_CXXFLAGS are added last, for sanitizers and quick builds. MAX_JOBS bounds parallel compilation.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
OLDEST_TORCH = (2, 7)
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
if TORCH < OLDEST_TORCH:
    sys.exit(f"bhyt: needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, found {torch.__version__}")
# A translation unit with torch headers takes up to 1 GB to compile: four at a time stay within 4 GB.
os.environ.setdefault("MAX_JOBS", str(min(4, os.cpu_count() or 1)))
STREAM_HANDLES = TORCH >= (2, 11)  # c10 gives out a stream's handle; before, only the CUDA part of torch did


def cuda_home():
    """The toolkit to build with, or None for a CPU build."""
    wanted = os.environ.get("BHYT_CUDA", "")
    if wanted == "0":
        return None
    if not STREAM_HANDLES and torch.version.cuda is None:
        if wanted == "1":
            sys.exit(f"bhyt: BHYT_CUDA=1: torch {torch.__version__}, before 2.11, needs CUDA itself for the kernels")
        print("bhyt: a CPU build of torch before 2.11, building for the CPU only", file=sys.stderr)
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"),
                  Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    for candidate in filter(None, candidates):  # a wrapper script on the path need not sit in the toolkit's own folder
        home = Path(candidate)
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime_api.h").exists():
            return str(home)
    if wanted == "1":
        sys.exit("bhyt: BHYT_CUDA=1 asks for the CUDA kernels, but nvcc was not found: set CUDA_HOME")
    print("bhyt: nvcc not found, building for the CPU only", file=sys.stderr)
    return None


def cuda_targets(home):
    """(architectures to make machine code for, the one to keep as PTX), of those that the toolkit knows."""
    nvcc = str(Path(home) / "bin" / "nvcc")
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = re.findall(r"compute_(\d+)", done.stdout)
    wanted = os.environ.get("BHYT_CUDA_ARCHS", "80 90 100 110 120").split()
    unknown = [arch for arch in wanted if arch not in known]
    if unknown and (asked := os.environ.get("BHYT_CUDA_ARCHS")):
        sys.exit(f'bhyt: BHYT_CUDA_ARCHS="{asked}": {nvcc} has no {" ".join(unknown)}; it has {" ".join(known)}')
    archs = sorted({arch for arch in wanted if arch in known}, key=int)
    if not archs:
        sys.exit(f"bhyt: {nvcc} has none of the architectures {' '.join(wanted)}; BHYT_CUDA=0 builds for the CPU only")
    # PTX of 100 runs on all that came later: on 110 too where the toolkit is older than that name, unlike PTX of 120.
    return archs, "100" if "100" in archs else archs[-1]


# -fopenmp only when compiling: at::parallel_for then uses the OpenMP runtime that torch has loaded, and no second one
# is linked. -ffp-contract=off: the same arithmetic from every compiler.
# -std: torch before 2.10 would ask for an older one.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
             "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-uninitialized",
             "-Wno-maybe-uninitialized", *os.environ.get("BHYT_CXXFLAGS", "").split()]

# --threads: the architectures of one file beside each other, 0.25 GB each; two files take most of the time of a build.
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xptxas=-v", "-Xfatbin=-compress-all", "--threads=4"]


def sources(*patterns):
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def extension():
    home = cuda_home()
    if home is None:
        return CppExtension("bhyt._ops", sources("csrc/ops/*.cpp", "csrc/cpu/*.cpp"),
                            include_dirs=[str(ROOT / "csrc")], py_limited_api=True,
                            extra_compile_args={"cxx": CXX_FLAGS})
    # A CppExtension, not a CUDAExtension: this also builds, and is tested, where torch itself is a CPU build. The CUDA
    # runtime is linked in; the kernels know nothing of torch.
    cpp_extension.CUDA_HOME = home
    archs, ptx = cuda_targets(home)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    return CppExtension(
        "bhyt._ops",
        sources("csrc/ops/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
        include_dirs=[str(ROOT / "csrc"), str(Path(home) / "include")],
        library_dirs=[str(Path(home) / folder) for folder in ("lib64", "lib") if (Path(home) / folder).is_dir()],
        libraries=["cudart_static", "rt", "dl", "pthread", *([] if STREAM_HANDLES else ["c10_cuda"])],
        py_limited_api=True,
        define_macros=[("BHYT_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": [*NVCC_FLAGS, *targets]},
    )


class Build(BuildExtension):
    """Also writes what the library was built for, which `import bhyt` compares with what is running or registered."""

    def finalize_options(self):
        super().finalize_options()
        version = ("BHYT_VERSION", self.distribution.get_version())
        for module in self.extensions:
            module.define_macros = [*dict.fromkeys([*module.define_macros, version])]
        if self.editable_mode:  # setuptools compiles these in a folder it throws away: everything anew each time
            self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def run(self):
        super().run()
        folder = ROOT / "bhyt" if self.inplace else Path(self.build_lib) / "bhyt"
        folder.mkdir(parents=True, exist_ok=True)
        archs = re.findall(r"code=(sm_\d+)", str(self.extensions[0].extra_compile_args))
        facts = {"VERSION": self.distribution.get_version(), "TORCH": torch.__version__, "CUDA_ARCHS": " ".join(archs)}
        (folder / "_built_for.py").write_text("".join(f'{name} = "{fact}"\n' for name, fact in facts.items()))


major, minor = torch.__version__.split(".")[:2]
setup(
    packages=find_packages(str(ROOT), include=["bhyt", "bhyt.*"]),
    ext_modules=[extension()],
    cmdclass={"build_ext": Build.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    install_requires=[f"torch=={major}.{minor}.*"],
)
