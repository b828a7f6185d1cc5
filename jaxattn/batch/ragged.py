"""A ragged batch: one packed int32 buffer, and where each field lies in it."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from jaxattn.batch.bucket import Bucket

INT32_MAX = int(np.iinfo(np.int32).max)

PAD_SLOT = INT32_MAX
"""A slot that does not exist: out of range and *positive*, so that a scatter with `mode="drop"` skips it. A
negative one would wrap around and overwrite a live slot."""


@functools.lru_cache(maxsize=1024)
def field_slices(bucket: Bucket) -> dict[str, slice]:
    """Where each primary field lies in the packed buffer of a bucket.

    The order of this table is the layout; there is no other.
    """
    sizes = {
        "num_seqs": 1,
        "token_ids": bucket.tokens,
        "cu_q_lens": bucket.seqs + 1,
        "kv_lens": bucket.seqs,
        "is_decode": bucket.seqs,
        "state_slots": bucket.seqs,
        "prefix_lm_lens": bucket.seqs,
        "page_indptr": bucket.seqs + 1,
        "page_list": bucket.pages,
    }
    ends = itertools.accumulate(sizes.values())
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class RaggedBatch:
    """A batch of sequences of different lengths, padded to a bucket. A pytree of one leaf.

    The batch *is* its packed int32 buffer: one transfer brings it to the device, and the fields
    below are slices of it, free inside a jitted program.

    Attributes:
        packed: All primary fields, one after the other (`field_slices`).
        bucket: The static sizes T, R and P.
        page_size: Tokens per page, or None where keys lie beside the queries and are not paged.
    """

    packed: Int32[Array, " packed"]
    bucket: Bucket = field(metadata={"static": True})
    page_size: int | None = field(metadata={"static": True})

    def _get(self, name: str) -> Array:
        return self.packed[field_slices(self.bucket)[name]]

    @property
    def num_seqs(self) -> Int32[Array, ""]:
        """Sequences of the batch; rows past it are padding."""
        return self._get("num_seqs")[0]

    @property
    def token_ids(self) -> Int32[Array, " T"]:
        """Query tokens, sequence after sequence; 0 in the padding."""
        return self._get("token_ids")

    @property
    def cu_q_lens(self) -> Int32[Array, " R_plus_1"]:
        """Prefix sums of query lengths, in tokens; the tail repeats the last value."""
        return self._get("cu_q_lens")

    @property
    def kv_lens(self) -> Int32[Array, " R"]:
        """Keys per sequence, this step's included; 0 for a padding row."""
        return self._get("kv_lens")

    @property
    def is_decode(self) -> Bool[Array, " R"]:
        """Whether a row decodes, as opposed to prefilling; stated by the caller, never guessed."""
        return self._get("is_decode") != 0

    @property
    def state_slots(self) -> Int32[Array, " R"]:
        """Slot of each sequence's recurrent state; `PAD_SLOT` for a padding row."""
        return self._get("state_slots")

    @property
    def prefix_lm_lens(self) -> Int32[Array, " R"]:
        """Leading keys of each sequence that all its tokens see, in layers with `prefix_lm`; 0 for none."""
        return self._get("prefix_lm_lens")

    @property
    def page_indptr(self) -> Int32[Array, " R_plus_1"]:
        """Prefix sums of the number of pages that each sequence holds, reserved ones included."""
        return self._get("page_indptr")

    @property
    def page_list(self) -> Int32[Array, " P"]:
        """Physical pages, sequence after sequence, in logical order."""
        return self._get("page_list")

    def _repr_html_(self) -> str:
        from jaxattn.viz.cards import batch_card  # when looked at

        return batch_card(self, size=field_slices(self.bucket)["page_list"].stop)


def abstract_batch(bucket: Bucket, page_size: int | None = None) -> RaggedBatch:
    """The shapes of a batch in a bucket, without data: what a program is compiled from."""
    size = field_slices(bucket)["page_list"].stop
    packed: Any = jax.ShapeDtypeStruct((size,), jnp.int32)
    return RaggedBatch(packed=packed, bucket=bucket, page_size=page_size)


def pack_fields(bucket: Bucket, page_size: int | None, **fields: Array) -> RaggedBatch:
    """A batch from its primary fields, on the device. Pure; values are not checked (`check_batch`).

    Args:
        bucket: The bucket.
        page_size: Tokens per page, or None for an unpaged batch.
        **fields: Every field of `field_slices`, of the bucket's sizes.

    Raises:
        ValueError: If a field is missing, unknown or of another size.
    """
    slices = field_slices(bucket)
    if fields.keys() != slices.keys():
        raise ValueError(f"fields {sorted(fields)} given; a batch has {sorted(slices)}")
    for name, place in slices.items():
        size = place.stop - place.start
        if jnp.size(fields[name]) != size:
            raise ValueError(f"{name} has {jnp.size(fields[name])} entries; {bucket} needs {size}")
    parts = [jnp.asarray(fields[name], jnp.int32).reshape(-1) for name in slices]
    return RaggedBatch(packed=jnp.concatenate(parts), bucket=bucket, page_size=page_size)
