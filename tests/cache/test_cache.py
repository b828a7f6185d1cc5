import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxattn import PagePool, init_cache, write_cache
from jaxattn.batch import PAD_SLOT
from jaxattn.cache import quantization_scale

pytestmark = pytest.mark.smoke


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


def quantized_cache(dtype: str, k_scale, v_scale):
    return init_cache(
        num_pages=2, page_size=4, num_kv_heads=2, head_dim=16, dtype=dtype, k_scale=k_scale, v_scale=v_scale
    )


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 7), ("float8_e4m3fn", 4), ("float8_e5m2", 3)])
def test_a_quantised_cache_holds_the_nearest_number(dtype, bits):
    """Integers err by half a unit at most, floats by half their last bit, of what the head's scale makes."""
    rng = np.random.default_rng(0)
    k, v = ((np.array([1e-3, 50])[:, None] * rng.standard_normal((3, 2, 16))).astype("float32") for _ in "kv")
    k_scale, v_scale = (quantization_scale(jnp.asarray(x), dtype) for x in (k, v))
    cache = quantized_cache(dtype, k_scale, v_scale)
    written = write_cache(cache, jnp.asarray(k), jnp.asarray(v), jnp.array([5, 0, 3], jnp.int32))
    for pages, scale, rows in (
        (written.k_pages, written.k_scale, k),
        (written.v_pages, written.v_scale, v),
    ):
        assert pages.dtype == dtype
        stored = np.asarray(pages.astype("float32")).reshape(8, 2, 16)[[5, 0, 3]]
        got = stored * np.asarray(scale)[:, None]
        unit = np.asarray(scale)[:, None] if dtype == "int8" else np.abs(rows) * 2.0 ** (1 - bits)
        tiny = 0 if dtype == "int8" else np.asarray(scale)[:, None] * float(jnp.finfo(dtype).smallest_normal)
        assert (np.abs(got - rows) <= 0.5001 * np.maximum(unit, tiny)).all()
        largest = 127 if dtype == "int8" else float(jnp.finfo(dtype).max)
        assert (np.abs(stored).max(axis=(0, 2)) == largest).all(), "the whole range is used, by every head"


@pytest.mark.parametrize(
    ("dtype", "largest"), [("int8", 127), ("float8_e4m3fn", 448), ("float8_e5m2", 57344)]
)
def test_what_exceeds_the_range_becomes_the_largest(dtype, largest):
    x = jnp.full((1, 2, 16), 1e6).at[:, 1].set(-jnp.inf)
    written = write_cache(quantized_cache(dtype, 1.0, 1.0), x, x, jnp.array([0], jnp.int32))
    np.testing.assert_array_equal(written.k_pages[0, 0, 0].astype("float32"), largest)
    np.testing.assert_array_equal(written.v_pages[0, 0, 1].astype("float32"), -largest)


def test_a_head_of_zeros_has_a_scale():
    assert np.isfinite(quantization_scale(jnp.zeros((3, 2, 4)), "int8")).all()


def test_a_head_with_a_number_that_is_not_finite_has_no_scale():
    x = jnp.ones((3, 2, 4)).at[1, 0, 2].set(jnp.nan)
    np.testing.assert_array_equal(jnp.isfinite(quantization_scale(x, "int8")), [False, True])


def test_a_cache_that_is_donated_has_scales_of_its_own():
    scale, ones = jnp.ones(2), jnp.ones((1, 2, 16))
    slot = jnp.array([1], jnp.int32)
    written = jax.jit(write_cache, donate_argnums=0)(quantized_cache("int8", scale, scale), ones, ones, slot)
    np.testing.assert_array_equal(written.k_scale, scale)


@pytest.mark.parametrize(
    ("dtype", "k_scale", "message"),
    [
        ("int8", None, "k_scale was not given, and keys and values are stored as int8"),
        ("float32", 1.0, "k_scale was given, and keys and values are stored as float32"),
        ("int8", [1.0, 1.0, 1.0], r"k_scale has shape \(3,\); give one number, or one per key head, \(2,\)"),
    ],
)
def test_scales_and_dtype_must_agree(dtype, k_scale, message):
    with pytest.raises(ValueError, match=message):
        quantized_cache(dtype, None if k_scale is None else jnp.asarray(k_scale), 1.0)


def test_only_a_quantised_cache_has_a_scale_to_choose():
    with pytest.raises(ValueError, match="dtype=bfloat16 is not one of int8"):
        quantization_scale(jnp.zeros((3, 2, 4)), "bfloat16")


@pytest.mark.parametrize(("shape", "slots"), [((3, 1, 4), [0, 1, 2]), ((1, 2, 4), [0, 1, 2])])
def test_write_refuses_to_broadcast(shape, slots):
    cache = init_cache(num_pages=3, page_size=2, num_kv_heads=2, head_dim=4, dtype="float32")
    with pytest.raises(ValueError, match=r"k.shape=.*; these slots and this cache need \(3, 2, 4\)"):
        write_cache(cache, jnp.ones(shape), jnp.ones(shape), jnp.array(slots, jnp.int32))


def test_donated_cache_is_written_in_place():
    cache = init_cache(num_pages=3, page_size=2, num_kv_heads=1, head_dim=4, dtype="float32")
    ones = jnp.ones((1, 1, 4))
    before = cache.k_pages.unsafe_buffer_pointer()
    written = jax.jit(write_cache, donate_argnums=0)(cache, ones, ones, jnp.array([1], jnp.int32))
    assert written.k_pages.unsafe_buffer_pointer() == before
    assert cache.k_pages.is_deleted()


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


class PoolMachine(RuleBasedStateMachine):
    """A pool against a dictionary of references; every action takes some held pages."""

    NUM_PAGES, PAGE_SIZE = 7, 3

    def __init__(self):
        super().__init__()
        self.pool = PagePool(self.NUM_PAGES, self.PAGE_SIZE)
        self.model: dict[int, int] = {}

    def held(self, data) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True))

    @rule(num_tokens=st.integers(0, 30))
    def allocate(self, num_tokens):
        n = -(-num_tokens // self.PAGE_SIZE)
        if n > self.NUM_PAGES - len(self.model):
            with pytest.raises(MemoryError):
                self.pool.allocate(num_tokens)
            return
        pages = self.pool.allocate(num_tokens).tolist()
        assert len(set(pages)) == n
        assert not self.model.keys() & set(pages)
        self.model |= dict.fromkeys(pages, 1)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def share(self, data):
        pages = self.held(data)
        self.pool.share(pages)
        self.model |= {page: self.model[page] + 1 for page in pages}

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        pages = self.held(data)
        self.pool.free(np.array(pages, np.int32))
        self.model |= {page: self.model[page] - 1 for page in pages}
        self.model = {page: n for page, n in self.model.items() if n}

    @rule(
        pages=st.lists(st.integers(-2, NUM_PAGES + 1), min_size=1), action=st.sampled_from(["share", "free"])
    )
    def refuse(self, pages, action):
        if len(set(pages)) < len(pages) or not set(pages) <= self.model.keys():
            with pytest.raises(ValueError, match="page"):
                getattr(self.pool, action)(pages)

    @invariant()
    def agrees_with_the_model(self):
        references = self.pool.references(range(self.NUM_PAGES))
        assert references.tolist() == [self.model.get(page, 0) for page in range(self.NUM_PAGES)]
        assert self.pool.num_free == self.NUM_PAGES - len(self.model)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(stateful_step_count=20)


def test_a_shared_page_is_free_after_its_last_holder():
    pool = PagePool(num_pages=2, page_size=16)
    pages = pool.allocate(20)
    pool.share(pages[:1])
    pool.free(pages)
    assert pool.references(pages).tolist() == [1, 0]
    assert pool.allocate(16).tolist() == [pages[1]]
    with pytest.raises(MemoryError):
        pool.allocate(1)
    pool.free(pages)
    assert pool.num_free == 2


def test_no_pages_are_pages_too():
    pool = PagePool(num_pages=1, page_size=16)
    assert pool.allocate(0).size == 0
    pool.share([])
    pool.free([])
    assert pool.references([]).size == 0


def test_refuses_when_full_and_takes_nothing():
    pool = PagePool(num_pages=3, page_size=16)
    np.testing.assert_array_equal(pool.allocate(17), [0, 1])
    with pytest.raises(MemoryError, match="num_tokens=17 needs 2 pages of 16 tokens, but 1 of 3 are free"):
        pool.allocate(17)
    assert pool.num_free == 1


@pytest.mark.parametrize("action", ["share", "free"])
@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([0.5], "pages has dtype float64"),
        ([[0, 1]], r"and shape \(1, 2\); expected one axis"),
        ([0, 5], "page 5 is out of range"),
        ([0, -1], "page -1 is out of range"),
        ([0, 0], "names a page twice"),
        ([0, 2], "page 2 is not allocated"),
    ],
)
def test_refuses_and_changes_nothing(action, pages, message):
    pool = PagePool(num_pages=3, page_size=16)
    pool.allocate(17)
    with pytest.raises(ValueError, match=message):
        getattr(pool, action)(np.array(pages))
    assert pool.num_free == 1
    assert pool.references([0, 1, 2]).tolist() == [1, 1, 0]


def test_impossible_pools():
    with pytest.raises(ValueError, match="page_size=0"):
        PagePool(3, 0)
    with pytest.raises(ValueError, match="num_tokens=-1 must not be negative"):
        PagePool(3, 1).allocate(-1)
    with pytest.raises(ValueError, match="page 3 is out of range"):
        PagePool(3, 1).references([3])
