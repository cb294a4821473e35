"""Builds the CUDA runtime of `runtime.c` and says how a process is started with it. Torch-free.

With it in front of the real library, PyTorch's build for CUDA starts where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from configs.errors import BadInput, in_one_line

_SOURCE = Path(__file__).resolve().parent / "runtime.c"
_HIDDEN = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")


def build_runtime(folder: Path) -> Path:
    """Compile the runtime into a folder and return it; raise BadInput where this machine lacks what it takes."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise BadInput("--rehearse: needs a C compiler, and here is no gcc or cc; install one (Debian: gcc, libc6-dev)")
    headers = _headers()
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *(f"-I{path}" for path in headers)]
    done = subprocess.run([*command, str(_SOURCE), "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"--rehearse: {compiler} cannot build the runtime: {in_one_line(RuntimeError(done.stderr))}")
    return library


def fake_environment(library: Path, root: Path) -> dict[str, str]:
    """Return the variables of a process that imports from `root` and has one fake GPU."""
    variables = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    return variables | {"LD_PRELOAD": str(library), "PYTHONPATH": str(root)}


def _headers() -> list[Path]:
    """Return the folders of CUDA's headers, which PyTorch's and Triton's packages bring along."""
    found: list[Path] = []
    for package, pattern, name in (
        ("nvidia", "*/include", "cuda_runtime_api.h"),
        ("triton", "backends/nvidia/include", "cuda.h"),
    ):
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        folders = [folder for place in places for folder in Path(place).glob(pattern) if (folder / name).is_file()]
        if not folders:
            raise BadInput(
                f"--rehearse: needs PyTorch's build for CUDA 13, which brings {name} along; this one has none "
                "(pip install torch, on Linux)"
            )
        found.append(folders[0])
    return found
