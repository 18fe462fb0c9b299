"""A CUDA device that is not there: it takes what PyTorch and Triton send, computes nothing and writes down every call.

`device.cpp` is compiled at the first use into a cache folder. A process started with `environment()` sees one CUDA device of
compute capability 9.0; its results are zeros, so look at what was launched, never at values. What a real driver refuses, this
one may not.
"""

import hashlib
import os
import shutil
import site
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, c_char_p
from pathlib import Path

from fastcifar.errors import InputError

SOURCE = Path(__file__).with_name("device.cpp")
LIBRARY = "FASTCIFAR_COUNTING_DEVICE"  # names the library in the environment of a process that has the device


def build() -> Path:
    """Compile the device where that is not done already; return the library. Raises InputError where it cannot be."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise InputError("the counting device needs g++, which is not installed: sudo apt-get install g++")
    packages = [Path(folder) for folder in site.getsitepackages()]
    parts = ("nvidia/cu13/include/cuda_runtime_api.h", "triton/backends/nvidia/include/cuda.h")
    headers = [next((folder / part for folder in packages if (folder / part).is_file()), None) for part in parts]
    if None in headers:
        raise InputError(f"the counting device needs {parts[headers.index(None)]} of the CUDA build of torch: make setup")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastcifar"
    library = cache / f"counting-device-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}" / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_name(f"{os.getpid()}.so")
        includes = [f"-I{header.parent}" for header in headers if header]
        command = [
            compiler,
            "-O1",
            "-shared",
            "-fPIC",
            "-Wl,-soname,libcuda.so.1",
            *includes,
            "-o",
            str(unfinished),
            str(SOURCE),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{SOURCE.name} does not compile: {done.stderr.strip().splitlines()[0]}")
        link = library.with_name("libcuda.so")  # what Triton links its launcher to
        link.unlink(missing_ok=True)
        link.symlink_to(library.name)
        unfinished.rename(library)  # last, whole: another process may be waiting for it
    return library


def environment() -> dict[str, str]:
    """The environment variables that give a new process the device. Raises InputError where it cannot be built."""
    library = build()
    folder = str(library.parent)
    return {
        LIBRARY: str(library), "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder,
        "CUDA_VISIBLE_DEVICES": "0", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }  # fmt: skip


def _library() -> CDLL:
    library = CDLL(os.environ[LIBRARY])
    library.counting_stop.restype = c_char_p
    return library


def launch(name: str) -> None:
    """Count a launch of a kernel that the device was not asked for."""
    _library().counting_event(b"launch", name.encode())


@contextmanager
def record(events: list[str]) -> Iterator[None]:
    """Append what the device was asked for, an entry a call: its kind (launch, copy, sync, allocate or graph) and what.

    A wait of another thread than the main one is no sync.
    """
    library = _library()
    library.counting_start()
    try:
        yield
    finally:
        events += library.counting_stop().decode().splitlines()
