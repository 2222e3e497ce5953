"""Builds the native parts, each one optional: what cannot be built is left out and fastrank/_build_info.json says why.

FASTRANK_CUDA=auto  build the CUDA kernels where nvcc's major version is that of torch's CUDA (the default)
FASTRANK_CUDA=1     build them whatever torch is (with a CPU-only torch: to see that they compile); failures are fatal
FASTRANK_CUDA=0     leave them out
TORCH_CUDA_ARCH_LIST and CUDA_HOME are honoured. No GPU is needed or looked for.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError
from setuptools.modified import newer_group

MODE = os.environ.get("FASTRANK_CUDA", "auto")
HEADERS = sorted(str(path) for path in Path("csrc").glob("*/*") if path.suffix != ".cpp")
HOST_FLAGS = ["-O2", "-g0", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
COMMON = {"depends": HEADERS, "optional": True}


class Missing(Exception):
    """Why a part is not built, in one sentence."""


def find_nvcc():
    """(path, version) of nvcc, both empty where there is none."""
    for place in (f"{os.environ.get('CUDA_HOME')}/bin/nvcc", shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"):
        if os.path.isfile(place):
            shown = subprocess.run([place, "--version"], capture_output=True, text=True, check=True).stdout
            return place, re.search(r"release (\d+\.\d+)", shown)[1]
    return "", ""


TORCH = importlib.import_module("torch") if find_spec("torch") else None
TORCH_FOLDER = Path(TORCH.__file__).parent if TORCH else None
NVCC, NVCC_VERSION = find_nvcc()
BLACKWELL = ";10.0" if NVCC and tuple(map(int, NVCC_VERSION.split("."))) >= (12, 8) else ""
ARCHS = re.split("[; ]", os.environ.get("TORCH_CUDA_ARCH_LIST") or f"8.0;8.6;8.9;9.0a{BLACKWELL}") if NVCC else []


def gencode(arch):
    """nvcc's flags for one entry of the list, such as 9.0a or 8.9+PTX."""
    match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
    if not match:
        raise Missing(f"TORCH_CUDA_ARCH_LIST must be a list such as 8.0;9.0a or 8.9+PTX, got {arch!r}")
    number, kinds = match[1] + match[2], ("sm", "compute") if match[3] else ("sm",)
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]


def check_cuda():
    if MODE == "0":
        raise Missing("it was switched off by FASTRANK_CUDA=0")
    if not NVCC:
        raise Missing("no nvcc was found in CUDA_HOME, on PATH or in /usr/local/cuda")
    if MODE == "auto" and TORCH and TORCH.version.cuda is None:
        raise Missing(f"torch {TORCH.__version__} is a CPU-only build (FASTRANK_CUDA=1 compiles all the same)")
    if MODE == "auto" and TORCH and TORCH.version.cuda.split(".")[0] != NVCC_VERSION.split(".")[0]:
        raise Missing(f"nvcc is CUDA {NVCC_VERSION} and torch was built with CUDA {TORCH.version.cuda}")


class BuildNative(build_ext):
    def run(self):
        self.missing = {}
        self.folder = Path("fastrank" if self.inplace or self.editable_mode else f"{self.build_lib}/fastrank")
        super().run()
        archs = [] if "fastrank._C_cuda" in self.missing else ARCHS
        torch = TORCH and str(TORCH.__version__)
        info = {"missing": self.missing, "nvcc": NVCC_VERSION, "archs": archs, "torch": torch}
        os.makedirs(self.folder, exist_ok=True)
        (self.folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")

    def build_extension(self, ext):
        try:
            getattr(self, "prepare" + ext.name.removeprefix("fastrank."))(ext)
            super().build_extension(ext)
        except (Missing, BaseError, CCompilerError, OSError, subprocess.SubprocessError) as error:
            self.missing[ext.name] = f"{ext.name} was not built: {str(error).splitlines()[0]}"
            if MODE == "1" and ext.name == "fastrank._C_cuda":
                raise SystemExit(f"FASTRANK_CUDA=1 asks for the CUDA kernels, but {self.missing[ext.name]}") from error
            print(self.missing[ext.name])
            built = Path(self.get_ext_fullpath(ext.name))
            for stale in (built, self.folder / built.name):  # of an earlier build
                stale.unlink(missing_ok=True)

    def prepare_host(self, ext):
        # torch ships pybind11's headers too.
        headers = find_spec("pybind11") or find_spec("torch")
        if headers is None:
            raise Missing("pybind11 was not importable when fastrank was built")
        ext.include_dirs = ["csrc", f"{headers.submodule_search_locations[0]}/include"]
        ext.define_macros += [("FASTRANK_NVCC", f'"{NVCC_VERSION}"'), ("FASTRANK_ARCHS", f'"{";".join(ARCHS)}"')]

    def prepare_C(self, ext):
        if TORCH is None:
            raise Missing("torch was not importable when fastrank was built")
        ext.include_dirs = ["csrc", f"{TORCH_FOLDER}/include", f"{TORCH_FOLDER}/include/torch/csrc/api/include"]
        ext.library_dirs, ext.libraries = [f"{TORCH_FOLDER}/lib"], ["torch_cpu"]
        # Nothing newer than the stable ABI of torch 2.10 is used, so one build serves every later version.
        ext.define_macros.append(("TORCH_TARGET_VERSION", "0x020a000000000000"))

    def prepare_C_cuda(self, ext):
        check_cuda()
        self.prepare_C(ext)
        ext.define_macros.append(("USE_CUDA", None))  # the stable headers declare the current stream behind it
        ext.libraries += ["torch_cuda", "cudart"]
        # Where nvcc itself would link from: its own path tells nothing where it is a wrapper script.
        shown = subprocess.run([NVCC, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
        ext.library_dirs += re.findall(r'"-L([^"]+)"', shown)
        if not Path(TORCH_FOLDER, "lib/libtorch_cuda.so").exists():
            ext.library_dirs.append(self.stub_folder())
        flags = ["-O3", "-Icsrc", "-Xcompiler=-fPIC", "--threads=2", *(f for arch in ARCHS for f in gencode(arch))]
        if "9.0a" in ARCHS:  # without the "a" the Hopper kernels would be empty
            flags.append("-DFASTRANK_SM90A")
        for source in sorted(Path("csrc").glob("*/*.cu")):
            target = Path(self.build_temp) / "_".join(ARCHS) / source.with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            if newer_group([str(source), *HEADERS], str(target)):
                self.spawn([NVCC, "-c", str(source), "-o", str(target), *flags])
            target.touch()  # newer than a library that was linked for other architectures
            ext.extra_objects.append(str(target))
            ext.depends = [*ext.depends, str(target)]

    def stub_folder(self):
        """A CPU-only torch has no libtorch_cuda to link with: with a stub of that name the compile can be checked."""
        os.makedirs(folder := f"{self.build_temp}/stubs", exist_ok=True)
        Path(folder, "stub.c").write_text("void aoti_torch_get_current_cuda_stream(void) {}\n", encoding="utf-8")
        options = ["-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", f"{folder}/libtorch_cuda.so"]
        self.spawn([*self.compiler.linker_so, f"{folder}/stub.c", *options])
        return folder


if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"FASTRANK_CUDA must be auto, 1 or 0, got {MODE!r}")
setup(
    packages=[*find_packages(include=["fastrank", "fastrank.*"]), "fastrank.triton_kernels"],
    package_dir={"fastrank.triton_kernels": "triton_kernels"},
    package_data={"fastrank": ["py.typed", "_tables/*.json"]},
    ext_modules=[
        Extension("fastrank._C", ["csrc/registry.cpp"], py_limited_api=True, **COMMON),
        Extension("fastrank._C_cuda", sorted(map(str, Path("csrc").glob("*/*.cpp"))), py_limited_api=True, **COMMON),
        Extension("fastrank._host", ["csrc/bindings.cpp"], extra_compile_args=HOST_FLAGS, **COMMON),
    ],
    cmdclass={"build_ext": BuildNative},
)
