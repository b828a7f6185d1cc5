"""Compile for a GPU without having one: XLA's ahead-of-time compiler, its target given as text.

What comes out is what the GPU would run. `ptxas` assembles it once more to report registers and
spills, which XLA does not return. Needs jax's CUDA plugin and NVIDIA's compiler (the dependency group
`compile`), and JAX_PLATFORMS=cpu in the environment, because there is no driver.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

KIB = 1024
# As users compile, although the tests of everything else compile with less.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
REMEDY = "run `make test-compile`, which installs the dependency group `compile` and sets JAX_PLATFORMS=cpu"


class Target(NamedTuple):
    """A GPU to compile for.

    Attributes:
        name: A name that jax knows; it derives the compute capability from it.
        major: Major compute capability.
        minor: Minor compute capability.
        suffix: "a" where the architecture's own instructions are used (wgmma, tcgen05), or nothing.
        shared_memory: Bytes of shared memory that one block can have.
    """

    name: str
    major: int
    minor: int
    suffix: str
    shared_memory: int

    @property
    def architecture(self) -> str:
        """As ptxas names it, e.g. `sm_90a`."""
        return f"sm_{self.major}{self.minor}{self.suffix}"


A100 = Target("NVIDIA A100-SXM4-80GB", 8, 0, "", 163 * KIB)
L4 = Target("NVIDIA L4", 8, 9, "", 99 * KIB)
H200 = Target("NVIDIA H200 141GB HBM3e", 9, 0, "a", 227 * KIB)
B200 = Target("NVIDIA B200", 10, 0, "a", 227 * KIB)
# The RTX 5090 is also sm_120, but jax derives no capability from its name.
RTX_PRO_6000 = Target("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 12, 0, "", 99 * KIB)
TARGETS = (A100, L4, H200, B200, RTX_PRO_6000)


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        name: Name of its entry.
        registers: Registers per thread.
        spilled: Bytes per thread that do not fit in registers.
        shared_memory: Bytes of shared memory per block, static and dynamic.
        grid: Blocks of the launch, along three axes.
        threads: Threads per block, along three axes.
        ptx: Its program, before assembly.
    """

    name: str
    registers: int
    spilled: int
    shared_memory: int
    grid: tuple[int, ...]
    threads: tuple[int, ...]
    ptx: str


def compile_for(target: Target, function: Callable[..., Any], *args: Any) -> list[Kernel]:
    """Compile a function and report the kernels of its program.

    Args:
        target: The GPU.
        function: What to compile.
        *args: Its arguments, pytrees of `jax.ShapeDtypeStruct`.

    Raises:
        RuntimeError: If the compiler is not installed.
        jax.errors.JaxRuntimeError: If XLA refuses the program, e.g. for want of shared memory.
    """
    return kernels_of(target, lower_for(target, function, *args))


def lower_for(
    target: Target, function: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
) -> Any:
    """Lower a function for a GPU, all arguments kept: the first half of `compile_for`."""
    sharding = SingleDeviceSharding(_topology(target).devices[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    device = AbstractDevice(target.name, None, "gpu")  # the number of cores is of no interest
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return jax.jit(function, keep_unused=True, donate_argnums=donate_argnums).lower(*args)


def kernels_of(target: Target, lowered: Any) -> list[Kernel]:
    """Compile what was lowered: the second half."""
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(compiler_options=OPTIMISED | {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"})
        launches = _launches("".join(path.read_text() for path in Path(folder).glob("*thunk_sequence.txt")))
        paths = sorted(Path(folder).glob("*.ptx"))
        return [kernel for path in paths for kernel in _assemble(path, target, launches)]


def _topology(target: Target) -> Any:
    # Otherwise the plugin refuses to load where libraries are missing that no compilation needs.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=_config(target), topology="1x1x1"
        )
    except NotImplementedError as error:
        raise RuntimeError(f"jax's CUDA plugin is missing or was not loaded; {REMEDY}") from error


def _config(target: Target) -> str:
    """The target as a text proto (xla.GpuTargetConfigProto). Limits that all targets share stay fixed."""
    accelerated = "feature_extension: ACCELERATED_FEATURES" if target.suffix == "a" else ""
    return f"""
    gpu_device_info {{
      name: "{target.name}"
      cuda_compute_capability {{ major: {target.major} minor: {target.minor} {accelerated} }}
      shared_memory_per_block_optin: {target.shared_memory}
      shared_memory_per_core: {target.shared_memory + KIB}
      shared_memory_per_block: {48 * KIB}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      core_count: 100 fpus_per_core: 128 threads_per_core_limit: 1536
      threads_per_warp: 32 threads_per_block_limit: 1024
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      device_memory_size: 17179869184 memory_bandwidth: 1000000000000
      l2_cache_size: 33554432 clock_rate_ghz: 1.5
      device_vendor: "NVIDIA Corporation"
      driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
    }}
    platform_name: "CUDA"
    device_description_str: "{target.name}"
    """


def ptxas() -> Path:
    """NVIDIA's assembler, the one that XLA finds too, in the wheel `nvidia-cuda-nvcc`."""
    package = importlib.util.find_spec("nvidia")
    for root in (package and package.submodule_search_locations) or ():
        for path in Path(root).glob("cu*/bin/ptxas"):
            return path
    raise RuntimeError(f"ptxas of the wheel nvidia-cuda-nvcc is missing; {REMEDY}")


class _Launch(NamedTuple):
    """How a program starts a kernel; memory is what the launch adds to the kernel's own."""

    grid: tuple[int, ...]
    threads: tuple[int, ...]
    shared_memory: int


def _launches(thunks: str) -> dict[str, _Launch]:
    """Launches by kernel, as XLA lists them."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    pattern = r"(\w+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+)"
    return {
        name: _Launch(numbers(grid), numbers(threads), int(memory))
        for name, grid, threads, memory in re.findall(pattern, thunks)
    }


def _assemble(path: Path, target: Target, launches: dict[str, _Launch]) -> list[Kernel]:
    command = [ptxas(), "--verbose", "--gpu-name", target.architecture, path, "--output-file", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) reg([^\n]*)", report, re.S
    )
    ptx = path.read_text()
    kernels = []
    for name, spilled, registers, rest in entries:
        own = re.search(r"(\d+) bytes smem", rest)
        launch = launches[name]
        memory = launch.shared_memory + int(own[1] if own else 0)
        kernels.append(Kernel(name, int(registers), int(spilled), memory, launch.grid, launch.threads, ptx))
    return kernels
