"""What an attention layer does between its projections: rotate, write the cache, attend."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxattn.attention.api import attention
from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.cache.paged import PagedKVCache, write_cache
from jaxattn.metadata.rope import rotate
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata


def attend_layer(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    cache: PagedKVCache | None = None,
    *,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | ChoiceTable = "auto",
) -> tuple[Float[Array, "T N H"], PagedKVCache | tuple[Float[Array, "T K H"], Float[Array, "T K H"]]]:
    """Attend with a layer's projected queries, keys and values, not yet rotated.

    Args:
        q: Queries of all sequences, packed.
        k: Keys of this step's tokens.
        v: Values.
        metadata: Prepared for this spec.
        spec: The layer.
        cache: The layer's cache, exactly where the batch was nested with page tables; else tokens attend
            to this step's keys alone.
        sinks: Logits of the sinks, exactly where the spec has them.
        implementation: As `attention` takes it.

    Returns:
        One output per token, and the cache with this step's keys and values written; without a cache,
            these keys, rotated, and values.

    Raises:
        ValueError: If a cache is missing or left over; as `attention` does.
    """
    if (cache is None) != (metadata.page_size is None):
        given, nested = ("not given", "with") if cache is None else ("given", "without")
        raise ValueError(
            f"cache was {given}, and the batch was nested {nested} page tables; give both, or neither"
        )
    if spec.rope is not None:
        tables = metadata.rope(spec)
        q, k = rotate(q, tables), rotate(k, tables)
    if cache is None:
        out = attention(q, k, v, metadata, spec, sinks=sinks, implementation=implementation)
        return out, (k, v)
    cache = write_cache(cache, k, v, metadata.slot_mapping)
    out = attention(
        q,
        cache.k_pages,
        cache.v_pages,
        metadata,
        spec,
        sinks=sinks,
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
        implementation=implementation,
    )
    return out, cache
