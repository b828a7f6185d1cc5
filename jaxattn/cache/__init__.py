"""The paged key/value cache: pages on the device, the pool that hands them out, shared prefixes."""

from jaxattn.cache.paged import PagedKVCache, init_cache, write_cache
from jaxattn.cache.pool import PagePool
from jaxattn.cache.quantization import quantization_scale

__all__ = ["PagePool", "PagedKVCache", "init_cache", "quantization_scale", "write_cache"]
