import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn import PAD_SLOT, PagePool, init_cache, write_cache


def test_write():
    cache = init_cache(num_pages=3, page_size=2, num_kv_heads=1, head_dim=4, dtype="float32")
    assert cache.page_size == 2
    k = jnp.arange(12.0).reshape(3, 1, 4)
    cache = write_cache(cache, k, -k, jnp.array([5, PAD_SLOT, 0], jnp.int32))
    np.testing.assert_array_equal(cache.k_pages[2, 1], k[0])
    np.testing.assert_array_equal(cache.k_pages[0, 0], k[2])
    np.testing.assert_array_equal(cache.v_pages, -cache.k_pages)
    assert int((cache.k_pages != 0).any(axis=(2, 3)).sum()) == 2  # the padding token wrote nowhere


def test_write_casts_to_the_caches_dtype():
    cache = init_cache(num_pages=1, page_size=2, num_kv_heads=1, head_dim=4, dtype="bfloat16")
    ones = jnp.ones((1, 1, 4))
    assert write_cache(cache, ones, ones, jnp.array([1], jnp.int32)).k_pages.dtype == jnp.bfloat16


@pytest.mark.parametrize(("shape", "slots"), [((3, 1, 4), [0, 1, 2]), ((1, 2, 4), [0, 1, 2])])
def test_write_refuses_to_broadcast(shape, slots):
    cache = init_cache(num_pages=3, page_size=2, num_kv_heads=2, head_dim=4, dtype="float32")
    with pytest.raises(ValueError, match=r"k.shape=.*; these slots and this cache need \(3, 2, 4\)"):
        write_cache(cache, jnp.ones(shape), jnp.ones(shape), jnp.array(slots, jnp.int32))


def test_write_needs_slots():
    cache = init_cache(num_pages=3, page_size=2, num_kv_heads=2, head_dim=4, dtype="float32")
    with pytest.raises(ValueError, match="nested without page_tables"):
        write_cache(cache, jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4)), None)


def test_donated_cache_is_written_in_place():
    cache = init_cache(num_pages=3, page_size=2, num_kv_heads=1, head_dim=4, dtype="float32")
    ones = jnp.ones((1, 1, 4))
    before = cache.k_pages.unsafe_buffer_pointer()
    written = jax.jit(write_cache, donate_argnums=0)(cache, ones, ones, jnp.array([1], jnp.int32))
    assert written.k_pages.unsafe_buffer_pointer() == before
    assert cache.k_pages.is_deleted()


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=40))
def test_a_page_is_never_handed_out_twice(actions):
    pool = PagePool(num_pages=12, page_size=4)
    held: list[np.ndarray] = []
    for allocate, n in actions:
        if allocate:
            try:
                held.append(pool.allocate(n))
            except MemoryError:
                assert -(-n // 4) > pool.num_free
        elif held:
            pool.free(held.pop(n % len(held)))
        pages = np.concatenate(held) if held else np.empty(0, np.int32)
        assert np.unique(pages).size == pages.size
        assert pool.num_free == 12 - pages.size


def test_refuses_when_full_and_takes_nothing():
    pool = PagePool(num_pages=3, page_size=16)
    np.testing.assert_array_equal(pool.allocate(17), [0, 1])
    with pytest.raises(MemoryError, match="num_tokens=17 needs 2 pages of 16 tokens, but 1 of 3 are free"):
        pool.allocate(17)
    assert pool.num_free == 1


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([0.5], "pages has dtype float64"),
        ([5], "page 5 is out of range"),
        ([0, 0], "names a page twice"),
        ([2], "page 2 is not allocated"),
    ],
)
def test_refuses_to_free(pages, message):
    pool = PagePool(num_pages=3, page_size=16)
    pool.allocate(17)
    with pytest.raises(ValueError, match=message):
        pool.free(np.array(pages))
    assert pool.num_free == 1


def test_impossible_pools():
    with pytest.raises(ValueError, match="page_size=0"):
        PagePool(3, 0)
    with pytest.raises(ValueError, match="num_tokens=-1 must not be negative"):
        PagePool(3, 1).allocate(-1)
