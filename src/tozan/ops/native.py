"""Compiles kernels (the `.cpp` files beside this one) for this processor at first use and keeps them in a cache folder.

The folder is `$XDG_CACHE_HOME/tozan/kernels` (else `~/.cache/…`), closed to other users: what lies there is code that
this process runs. A library's name is a hash of source, flags and processor, and it appears there by a rename, so a
home that different nodes share holds one for each of them, and login nodes may compile for compute nodes of their kind
that have no compiler. Of the processes of a node that start together one compiles, the others wait for it. Where
nothing can be compiled, every operation runs in plain PyTorch.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tozan.cpuinfo import processors

Choice = Literal["auto", "plain"]

SOURCE = Path(__file__).with_name("kernels.cpp")
PRODUCTS_SOURCE = Path(__file__).with_name("gemm.cpp")
ARENA_SOURCE = Path(__file__).with_name("arena.cpp")
COMPILED = "compiled for this processor"
ARENA = "an arena of their own"
PATIENCE = 120.0
"""Seconds that a process waits for another's compiler before it starts its own."""

PRODUCTS = ("fff", "bfb", "bff", "bbb", "bbf")
"""Matrix products that there are kernels for: types of both operands and of the result, fp32 or bf16."""

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_chosen: Choice = "auto"


def choose(choice: Choice) -> None:
    """Use compiled kernels where they can be had (`auto`, as at the start), or `plain` PyTorch only."""
    global _chosen
    _chosen = choice


def status() -> str:
    """`COMPILED` if kernels are in use, else why not."""
    if _plain():
        return _plain()
    library, why = _load()
    return COMPILED if library else f"plain PyTorch: {why}"


def usable(*tensors: Tensor | None) -> bool:
    """Whether kernels can take these tensors: on the CPU, in fp32 or bf16, outside of torch.compile.

    torch.compile fuses plain operations by itself, with more of what is around them.
    """
    if _chosen == "plain" or torch.compiler.is_compiling():
        return False
    fit = all(t is None or (t.device.type == "cpu" and t.dtype in _TYPES) for t in tensors)
    return fit and _load()[0] is not None


def fuses_on_gpu() -> bool:
    """Whether operations on a GPU have kernels of their own, which Triton compiles."""
    return _chosen == "auto" and not torch.compiler.is_compiling() and compiles_for_gpu()


@functools.cache
def compiles_for_gpu() -> bool:
    """Whether Triton and torch.compile can work for this machine's GPU: they need a C compiler."""
    from torch.utils._triton import has_triton

    return has_triton() and any(map(shutil.which, [os.environ.get("CC") or "cc", "gcc", "clang"]))


def call(
    name: str, dtype: torch.dtype | None, *arguments: Tensor | float | None, into: torch.dtype | None = None
) -> None:
    """Run a kernel on as many threads as PyTorch uses.

    Args:
        name: of the function, without its type.
        dtype: of the elements; None if they may be of any.
        arguments: as the kernel takes them; tensors must be contiguous, None is a null pointer.
        into: type of the result's elements, where a kernel is made for several.
    """
    library = _load()[0]
    assert library is not None, name
    types = [_TYPES[one] for one in (dtype, into) if one is not None]
    function = getattr(library, "_".join([name, *types]))
    with noted(f"tozan::{name}"):
        function(*map(_argument, arguments), ctypes.c_int(torch.get_num_threads()))


def products_pay() -> bool:
    """Whether matrix products have kernels on this processor that are faster than PyTorch's libraries."""
    library = _products()
    return library is not None and bool(library.gemm_pays())


def product(
    variant: str,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    bias: Tensor | None,
    *,
    add: bool,
    library: ctypes.CDLL | None = None,
) -> None:
    """Writes A · B + bias into y, or adds it.

    Args:
        variant: one of `PRODUCTS`.
        a: (m, k), of any strides of which one is 1.
        b: (k, n), likewise.
        y: (m, n), contiguous.
        bias: (n,) in fp32.
        add: to what y holds, which must be fp32.
        library: which holds the product; default: that of AVX-512.
    """
    library = library or _products()
    assert library is not None
    strides = (*a.stride(), *b.stride())
    operands = [ctypes.c_void_p(t.data_ptr()) for t in (a, b)]
    with noted("tozan::product"):
        library[f"gemm_{variant}"](
            *operands,
            *map(ctypes.c_long, (*strides, a.shape[0], b.shape[1], a.shape[1])),
            _argument(y),
            _argument(bias),
            ctypes.c_long(add),
            ctypes.c_int(torch.get_num_threads()),
        )


def noted(name: str) -> contextlib.AbstractContextManager[object]:
    """Shows a kernel to PyTorch's profiler, if that is at work."""
    profiling = torch.autograd.profiler._is_profiler_enabled
    return torch.profiler.record_function(name) if profiling else contextlib.nullcontext()


def _argument(value: Tensor | float | None) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous(), value.stride()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return None if value is None else ctypes.c_long(value)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, or why there are none."""
    return open_library(SOURCE)


@functools.cache
def _products() -> ctypes.CDLL | None:
    """The library of matrix products, if it can be compiled and this processor has the instructions."""
    library = open_library(PRODUCTS_SOURCE)[0]
    return library if hasattr(library, "gemm_pays") else None


def arena() -> str:
    """Have tensors made by the allocator of `arena.cpp` from now on; says `ARENA`, or why they are not."""
    return f"the C library's heap: {why}" if (why := _plain() or _arena()[1]) else ARENA


def arena_bytes(again: bool = False) -> tuple[int, int, int] | None:
    """Bytes of tensors now and at most since the start, and of memory ever touched for them; None without an arena.

    Tensors below 64 KiB are not among them.

    Args:
        again: begin anew with the largest.
    """
    library = None if _plain() else _arena()[0]
    if library is None:
        return None
    found = (ctypes.c_size_t * 3)()
    library.arena_count(found, ctypes.c_int(again))
    return found[0], found[1], found[2]


def _plain() -> str:
    return "plain PyTorch: asked for" if _chosen == "plain" else ""


@functools.cache
def _arena() -> tuple[ctypes.CDLL | None, str]:
    """The installed allocator, or why there is none. Its addresses are as many as this machine has bytes of memory."""
    folder = Path(torch.__file__).parent
    # Its classes are PyTorch's own, so a library serves one build of PyTorch only.
    flags = [f"-I{folder / 'include'}", f'-DTORCH="{torch.__version__}"', f"-L{folder / 'lib'}", "-lc10"]
    library, why = open_library(ARENA_SOURCE, flags)
    if library is None:
        return None, why
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not library.arena_install(ctypes.c_size_t(size)):
        return None, f"{size >> 30} GiB of addresses cannot be had"
    return library, ""


def open_library(source: Path, more: Sequence[str] = ()) -> tuple[ctypes.CDLL | None, str]:
    """A library, compiled unless the cache has it, or why there is none."""
    try:
        library = ctypes.CDLL(str(build(cache_folder(), source, more)))
    except OSError as error:
        return None, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    except RuntimeError as error:  # this user has no home
        return None, str(error)
    return library, ""


def cache_folder() -> Path:
    """Where libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tozan" / "kernels"


def build(folder: Path, source: Path | None = None, more: Sequence[str] = ()) -> Path:
    """The library of a source for this processor, compiled unless `folder` has it.

    Args:
        folder: where libraries are kept.
        source: default: that of the kernels.
        more: flags of the compiler, to be put behind the source.

    Raises:
        OSError: no compiler, or it fails, or others may write into the folder.
    """
    source = source or SOURCE
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder)
    flags = map(str.encode, [*_flags(), *more])
    name = hashlib.sha256(b"\0".join([*_texts(source), *flags, _processor()])).hexdigest()
    path = folder / f"{name[:32]}.so"
    with contextlib.nullcontext() if path.exists() else turn(folder / f"{name[:32]}.{platform.node()}.lock", path):
        if not path.exists():
            _compile(path, source, more)
    _require_private(path)
    return path


def _texts(source: Path) -> list[bytes]:
    """A source, and the files beside it that it includes, each once."""
    found, ahead = {}, [source]
    for path in ahead:
        if path not in found:
            found[path] = path.read_bytes()
            included = re.findall(rb'^#include "(.+)"', found[path], re.MULTILINE)
            ahead += [path.parent / name.decode() for name in included]
    return list(found.values())


def _flags() -> list[str]:
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return ["-std=c++17", "-O3", native, "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]


def _processor() -> bytes:
    """What decides which instructions the compiler may use."""
    named = ("flags", "model name", "Features", "CPU implementer", "CPU part")
    found = {f"{name}: {cpu[name]}" for cpu in processors() for name in named if name in cpu}
    return "\n".join(sorted(found) or [platform.machine(), platform.processor()]).encode()


def _require_private(path: Path) -> None:
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise PermissionError(0, "others than this user may write there", str(path))


@contextlib.contextmanager
def turn(lock: Path, made: Path) -> Iterator[None]:
    """Waits until no other process of this node holds the lock, or `made` exists, or patience ends."""
    with lock.open("w") as file:
        end = time.monotonic() + PATIENCE
        while not made.exists() and time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:  # held, or a file system without locks: then each compiles for itself
                time.sleep(0.05)
        yield


def _compile(path: Path, source: Path, more: Sequence[str]) -> None:
    """Compile into a file of its own, then rename it.

    Raises:
        OSError: no compiler, or it fails.
    """
    given = os.environ.get("CXX", "").split()
    compiler = given or [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))][:1]
    if not compiler:
        raise FileNotFoundError(0, "no C++ compiler (c++, g++ or clang++) to compile kernels with")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler, *_flags(), "-o", str(made), str(source), *more]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except subprocess.TimeoutExpired:
            raise TimeoutError(0, f"{compiler[0]} took more than {PATIENCE:.0f} s") from None
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise OSError(0, f"{compiler[0]} failed: {first}")
        made.chmod(0o500)
        made.replace(path)
