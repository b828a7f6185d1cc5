"""Every shipped kernel compiles to machine code that keeps its state in registers, on every GPU.

Interpret mode accepts what a GPU cannot hold, and a lowered program does not show it either.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from abstract_lists import abstract_tiles, ints
from deviceless import A100, B200, H200, RTX_PRO_6000, TARGETS, Kernel, Target, compile_for
from resources import MAX_REGISTERS, Key, Resources, check, resources_of

from jaxattn.cache.quantization import QUANTIZED_DTYPES
from jaxattn.metadata.consumers import triton_tiling
from jaxattn.metadata.spec import AttentionSpec
from jaxattn_kernels.arrays import KeyLookup, KVScales, VisibleRange
from jaxattn_kernels.triton.forward import KernelConfig, ragged_attention

pytestmark = pytest.mark.compile

# ptxas spills some bytes of its own accord where one more block then fits on a multiprocessor:
# in about one kernel of twelve, and in different ones with every version.
MAX_TRADED = 64


class Case(NamedTuple):
    """What the size of a kernel depends on."""

    target: Target
    group_size: int
    head_dim: int
    dtype: str = "bfloat16"
    page_size: int | None = 16
    windowed: bool = False
    capped: bool = False
    sinks: bool = False
    kv_dtype: str | None = None

    def __str__(self) -> str:
        paging = f"p{self.page_size}" if self.page_size else "packed"
        options = "-window" * self.windowed + "-cap" * self.capped + "-sinks" * self.sinks
        options += f"-{self.kv_dtype}" if self.kv_dtype else ""
        return (
            f"{self.target.architecture}-g{self.group_size}-d{self.head_dim}-{self.dtype}-{paging}{options}"
        )


def every_pair() -> list[Case]:
    """49 cases in which every pair of values of any two factors occurs.

    An orthogonal array: the factors of case (i, j) take their values number i, j, i + j, i + 2 j...
    modulo 7, and any two of these determine i and j.
    """

    def pick(values: tuple, number: int):
        return values[number % 7 % len(values)]

    return [
        Case(
            group_size=pick((1, 2, 3, 4, 6, 8, 32), i),
            head_dim=pick((16, 64, 80, 96, 128, 192, 256), j),
            page_size=pick((None, 1, 8, 12, 16, 64, 128), i + j),
            target=pick(TARGETS, i + 2 * j),
            dtype=pick(("bfloat16", "float16", "float32"), i + 3 * j),
            windowed=pick((True, False), i + 4 * j),
            capped=pick((False, True), i + 5 * j),
            sinks=pick((False, True), i + 6 * j),
        )
        for i in range(7)
        for j in range(7)
    ]


def compile_case(case: Case, config: KernelConfig | None = None) -> list[Kernel]:
    """The kernels of a case: for short queries (decode), for merging their parts, for long ones (prefill)."""
    return [k for k in compile_for(case.target, *program_of(case, config)) if "_attention" in k.name]


def program_of(case: Case, config: KernelConfig | None = None) -> tuple[Any, ...]:
    """A function that attends with the kernels of a case, and its arguments."""
    tokens, rows, pages, num_kv_heads, units = 1024, 16, 512, 4, 640
    num_q_heads = num_kv_heads * case.group_size
    spec = AttentionSpec(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=case.head_dim)
    tiling = triton_tiling(spec)

    def attend(q, k, v, visible, start, page_list, sinks, scales, short, long):
        return ragged_attention(
            q, k, v, visible, KeyLookup(start, page_list if case.page_size else None), (short, long),
            sinks=sinks if case.sinks else None, kv_scales=scales if case.kv_dtype else None,
            page_size=case.page_size, scale=spec.softmax_scale,
            logits_soft_cap=30.0 if case.capped else None,
            windowed=case.windowed, interpret=False, config=config,
        )  # fmt: skip

    q = jax.ShapeDtypeStruct((tokens, num_q_heads, case.head_dim), case.dtype)
    kv_dtype = case.kv_dtype or case.dtype
    k = jax.ShapeDtypeStruct((pages * (case.page_size or 16), num_kv_heads, case.head_dim), kv_dtype)
    # More units than a launch has programs: each loops over its share, and needs registers for that too.
    short = abstract_tiles(units, tiling.short_q, num_units=units)
    long = abstract_tiles(units, tiling.long_q, has_order=True)
    sinks: Any = jax.ShapeDtypeStruct((num_q_heads,), jnp.float32)
    scale: Any = jax.ShapeDtypeStruct((num_kv_heads,), jnp.float32)
    layer = (q, k, k, VisibleRange(ints(tokens), ints(tokens)), ints(rows + 1), ints(pages))
    options = (sinks, KVScales(scale, scale))
    return attend, *layer, *options, short, long


def stays_in_registers(kernel: Kernel) -> bool:
    """Whether a kernel has registers for all its state, but for what ptxas trades for occupancy."""
    traded = kernel.registers < MAX_REGISTERS and kernel.spilled <= MAX_TRADED
    return kernel.spilled == 0 or traded


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", every_pair(), ids=str)
def test_kernels_stay_in_registers(case):
    kernels = compile_case(case)
    assert len(kernels) == 3
    assert [(k.name, k.registers, k.spilled) for k in kernels if not stays_in_registers(k)] == []


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.architecture)
def test_kernels_of_quantised_caches_stay_in_registers(target, kv_dtype):
    if kv_dtype == "float8_e4m3fn" and target is A100:
        with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
            compile_case(Case(target, group_size=4, head_dim=128, kv_dtype=kv_dtype))
        return
    shapes = (4, 128, "bfloat16"), (8, 64, "float16"), (2, 256, "bfloat16")
    shape = shapes[
        (TARGETS.index(target) + QUANTIZED_DTYPES.index(kv_dtype)) % 3
    ]  # every pair of two of them
    kernels = compile_case(Case(target, *shape, kv_dtype=kv_dtype))
    assert [(k.name, k.registers, k.spilled) for k in kernels if not stays_in_registers(k)] == []


def test_the_gate_rejects_a_kernel_that_is_too_large():
    config = KernelConfig(block_k=128, num_warps=4, num_stages=2)
    kernels = compile_case(Case(H200, group_size=4, head_dim=128, windowed=True), config)
    assert not all(stays_in_registers(k) for k in kernels)


def test_too_much_shared_memory_is_refused():
    config = KernelConfig(block_k=128, num_warps=8, num_stages=3)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        compile_case(Case(RTX_PRO_6000, group_size=4, head_dim=256), config)


PRODUCTS = {A100: "mma.sync", H200: "wgmma", B200: "tcgen05.mma", RTX_PRO_6000: "mma.sync"}
MAIN = [
    Case(target, group_size=group_size, head_dim=head_dim)
    for group_size, head_dim in ((4, 64), (4, 128), (4, 256), (1, 128), (8, 128))
    for target in PRODUCTS
]
"""The configurations most models use; what they take stands in `resources.json`."""
MAIN_QUANTIZED = [
    Case(target, group_size=4, head_dim=128, kv_dtype=kv_dtype)
    for kv_dtype in ("int8", "float8_e4m3fn")
    for target in PRODUCTS
    if (kv_dtype, target) != ("float8_e4m3fn", A100)  # it cannot read them
]
"""The same with quantised caches."""


def resources_by_key(case: Case, kernels: list[Kernel]) -> dict[Key, Resources]:
    """What the kernels of a case take, as the table has it."""
    return {key_of(case, k.name): resources_of(k) for k in kernels}


def key_of(case: Case, kernel: str) -> Key:
    architecture = case.target.architecture
    return Key("triton", str(case).removeprefix(f"{architecture}-"), kernel, architecture)


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_main_configurations_use_the_hardware(case):
    compiled = compile_case(case)
    found = resources_by_key(case, compiled)
    kernels = {k.name: k for k in compiled}
    takes = {key.kernel: value for key, value in found.items()}
    assert kernels.keys() == {"merge_attention_q16", "ragged_attention_q16", "ragged_attention_q64"}
    assert [(k.name, k.spilled) for k in compiled if k.spilled] == []
    short, long = "ragged_attention_q16", "ragged_attention_q64"
    assert "mma.sync" in takes[short].instructions
    assert PRODUCTS[case.target] in takes[long].instructions
    for name in short, long:
        ptx = kernels[name].ptx
        copies = Counter(re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, 0x(\w+)", ptx))
        assert copies.keys() <= {"10", "4"}, "keys and values are copied asynchronously, 16 bytes at a time"
        # Page numbers, 4 bytes each: of keys there would be four times as many narrow copies as wide ones.
        assert copies["4"] < copies["10"] / 4
        assert not re.search(r"ld\.global\S*\.[bu](8|16)\b", ptx), "a narrow load"
    check(found)


@pytest.mark.parametrize("case", MAIN_QUANTIZED, ids=str)
def test_quantised_caches_use_the_hardware(case):
    compiled = compile_case(case)
    found = resources_by_key(case, compiled)
    takes = {key.kernel: value for key, value in found.items()}
    assert takes.keys() == {"merge_attention_q16", "ragged_attention_q16", "ragged_attention_q64"}
    assert [(k.name, k.spilled) for k in compiled if k.spilled] == []
    assert "mma.sync" in takes["ragged_attention_q16"].instructions
    assert PRODUCTS[case.target] in takes["ragged_attention_q64"].instructions
    check(found)
