"""Builds the native parts, each one optional: what cannot be built is left out and fastrank/_build_info.json says why.

FASTRANK_CUDA=auto  build the CUDA kernels where nvcc's major version is that of torch's CUDA (the default)
FASTRANK_CUDA=1     build them whatever torch is (with a CPU-only torch: to see that they compile); failures are fatal
FASTRANK_CUDA=0     leave them out
TORCH_CUDA_ARCH_LIST, CUDA_HOME and CXX are honoured. No GPU is needed or looked for.
"""

import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).parent
MODE = os.environ.get("FASTRANK_CUDA", "auto")
# Schemas and launchers use nothing newer than torch 2.10's stable ABI, so one build serves every later version.
TORCH_TARGET = ("TORCH_TARGET_VERSION", "0x020a000000000000")


class Missing(Exception):
    """Why a part is not built, in one sentence."""


def find_nvcc():
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    on_path = shutil.which("nvcc")
    places = [*(Path(home) / "bin" / "nvcc" for home in homes if home), Path(on_path or ""), Path("/usr/local/cuda/bin/nvcc")]
    return next((str(place) for place in places if place.is_file()), None)


def version_of(nvcc):
    return re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))[1]


def load_torch():
    if find_spec("torch") is None:
        return None
    import torch

    return torch


def cuda_library_dirs():
    """Where nvcc itself would link from; its own path tells nothing where it is a wrapper script."""
    shown = subprocess.run([NVCC, "--dryrun", "-c", "csrc/gates/gates.cu"], capture_output=True, text=True, check=True)
    return re.findall(r'"-L([^"]+)"', shown.stderr)


TORCH, NVCC = load_torch(), find_nvcc()
NVCC_VERSION = version_of(NVCC) if NVCC else ""
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a" + (";10.0" if tuple(map(int, NVCC_VERSION.split(".") or (0,))) >= (12, 8) else "") if NVCC else ""
ARCHS = (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS).replace(" ", ";").split(";")


def gencode(arch):
    """-gencode flags of one entry of the list, such as 9.0a or 8.9+PTX."""
    match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
    if not match:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST must be numeric, such as 8.0;9.0a or 8.9+PTX, got {arch!r}")
    number = match[1] + match[2]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    return flags + ([f"-gencode=arch=compute_{number},code=compute_{number}"] if match[3] else [])


def torch_include():
    if TORCH is None:
        raise Missing("torch was not importable when fastrank was built")
    return Path(TORCH.__file__).parent / "include"


def check_cuda():
    if MODE == "0":
        raise Missing("it was switched off by FASTRANK_CUDA=0")
    torch_include()
    if NVCC is None:
        raise Missing("no nvcc was found in CUDA_HOME, on PATH or in /usr/local/cuda")
    if MODE == "auto" and TORCH.version.cuda is None:
        raise Missing(f"torch {TORCH.__version__} is a CPU-only build (FASTRANK_CUDA=1 compiles all the same)")
    if MODE == "auto" and TORCH.version.cuda.split(".")[0] != NVCC_VERSION.split(".")[0]:
        raise Missing(f"nvcc is CUDA {NVCC_VERSION} and torch was built with CUDA {TORCH.version.cuda}")


def pybind11_include():
    if find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    if TORCH and (torch_include() / "pybind11").is_dir():
        return str(torch_include())
    raise Missing("pybind11 was not importable when fastrank was built")


class BuildNative(build_ext):
    def run(self):
        self.missing = {}
        in_place = self.inplace or getattr(self, "editable_mode", False)
        super().run()
        info = {
            "missing": self.missing,
            "nvcc": NVCC_VERSION,
            "archs": ARCHS if "fastrank._C_cuda" not in self.missing else [],
            "torch": str(TORCH.__version__) if TORCH else "",
        }
        folder = ROOT / "fastrank" if in_place else Path(self.build_lib) / "fastrank"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")

    def build_extension(self, ext):
        part = ext.name.rpartition(".")[2]
        try:
            getattr(self, f"prepare{part}")(ext)
            super().build_extension(ext)
        except (Missing, BaseError, CCompilerError, OSError, subprocess.SubprocessError) as error:
            self.missing[ext.name] = f"{ext.name} was not built: {str(error).splitlines()[0]}"
            if MODE == "1" and part == "_C_cuda":
                raise SystemExit(f"FASTRANK_CUDA=1 asks for the CUDA kernels, but {self.missing[ext.name]}") from error
            print(self.missing[ext.name])

    def prepare_C(self, ext):
        self.use_torch(ext)

    def prepare_host(self, ext):
        ext.include_dirs += [pybind11_include()]
        ext.define_macros += [("FASTRANK_NVCC", f'"{NVCC_VERSION}"'), ("FASTRANK_ARCHS", f'"{";".join(ARCHS)}"')]

    def prepare_C_cuda(self, ext):
        check_cuda()
        self.use_torch(ext)
        ext.define_macros.append(("USE_CUDA", None))  # the stable headers declare the current stream behind it
        ext.library_dirs += [*cuda_library_dirs(), *self.stub_folder()]
        ext.libraries += ["torch_cuda", "cudart"]
        for source in sorted(Path("csrc").glob("*/*.cu")):
            target = Path(self.build_temp) / "_".join(ARCHS) / source.with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = [flag for arch in ARCHS for flag in gencode(arch)]
            if newer_group([str(source), *ext.depends], str(target)):
                command = [NVCC, "-c", str(source), "-o", str(target), "-O3", "-Icsrc", "-Xcompiler=-fPIC"]
                self.spawn([*command, "--threads=2", *flags])
            target.touch()  # newer than a library that was linked for other architectures
            ext.extra_objects.append(str(target))
            ext.depends.append(str(target))

    def use_torch(self, ext):
        ext.include_dirs += [str(torch_include()), str(torch_include() / "torch/csrc/api/include")]
        ext.library_dirs.append(str(Path(TORCH.__file__).parent / "lib"))
        ext.libraries += ["torch_cpu"]
        ext.define_macros.append(TORCH_TARGET)

    def stub_folder(self):
        """A CPU-only torch has no libtorch_cuda to link with: a stub of that name lets the compile be checked."""
        if (Path(TORCH.__file__).parent / "lib" / "libtorch_cuda.so").exists():
            return []
        folder = Path(self.build_temp) / "stubs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stub.c").write_text("void aoti_torch_get_current_cuda_stream(void) {}\n", encoding="utf-8")
        library = folder / "libtorch_cuda.so"
        command = [*self.compiler.linker_so, str(folder / "stub.c"), "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
        self.spawn(command)
        return [str(folder)]


def extension(name, sources, **options):
    headers = sorted(str(p) for pattern in ("*.h", "*.cuh", "*.cu") for p in Path("csrc").glob(f"*/{pattern}"))
    return Extension(name, [str(s) for s in sources], include_dirs=["csrc"], depends=headers, language="c++", optional=True, **options)


if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"FASTRANK_CUDA must be auto, 1 or 0, got {MODE!r}")
setup(
    packages=[*find_packages(include=["fastrank", "fastrank.*"]), "fastrank.triton_kernels"],
    package_dir={"fastrank.triton_kernels": "triton_kernels"},
    package_data={"fastrank": ["py.typed"]},
    ext_modules=[
        extension("fastrank._C", ["csrc/registry.cpp"], py_limited_api=True),
        extension("fastrank._C_cuda", sorted(Path("csrc").glob("*/*.cpp")), py_limited_api=True),
        extension("fastrank._host", ["csrc/bindings.cpp"], extra_compile_args=["-O2", "-g0", "-fvisibility=hidden", "-Wno-unknown-pragmas"]),
    ],
    cmdclass={"build_ext": BuildNative},
)
