"""Shared prefixes: which neighbouring sequences begin with the same pages.

Keys that several sequences share need to be read once for all of their queries. Attention then has
two levels: all query tokens of a group attend to the group's prefix, as if they were one sequence;
each sequence attends to the rest of its own keys; and the two results are merged by their
log-sum-exps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxattn.batch.ragged import RaggedBatch
from jaxattn.metadata.fields import described


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Cascade:
    """Groups of neighbouring sequences that share leading pages. A group has one or more rows.

    The first level has the group's queries `cu_group_q_lens` and the keys `0 .. prefix_lens` in the
    pages of row `first_seq`; the second has each row's own queries, and its keys from
    `prefix_lens[group_of_seq]` on.
    """

    num_groups: Int32[Array, ""] = described("groups of the batch")
    group_of_seq: Int32[Array, " R"] = described("group of each row; R for a padding row")
    first_seq: Int32[Array, " R"] = described("per group, its first row; R past the last group")
    cu_group_q_lens: Int32[Array, " R_plus_1"] = described(
        "prefix sums of the query tokens of each group", "cu_prefix_query_lens, qo_indptr of level 0"
    )
    prefix_lens: Int32[Array, " R"] = described(
        "per group, the keys that all of its rows share, in whole pages; 0 for a single row",
        "prefix_kv_lens, common_prefix_len",
    )

    def _repr_html_(self) -> str:
        from jaxattn.viz.cards import record_card  # when looked at

        return record_card(self)


def find_cascade(
    batch: RaggedBatch, page_size: int, context_lens: Int32[Array, " R"], seq_of_entry: Int32[Array, " P"]
) -> Cascade:
    """Group neighbouring rows whose page lists begin alike. Linear in rows and pages.

    Args:
        batch: A paged batch.
        page_size: Tokens per page.
        context_lens: Keys cached before this step; only those can be shared.
        seq_of_entry: Row of each entry of the batch's page list; R past the last.
    """
    R, P = batch.bucket.seqs, batch.bucket.pages
    row, entry = jnp.arange(R, dtype=jnp.int32), jnp.arange(P, dtype=jnp.int32)
    starts, counts = batch.page_indptr[:-1], jnp.diff(batch.page_indptr)
    # Each entry against the one at the same place in the row before.
    seq = jnp.minimum(seq_of_entry, R - 1)
    place = entry - starts[seq]
    before = jnp.maximum(seq - 1, 0)
    differs = (place >= counts[before]) | (
        batch.page_list != batch.page_list[jnp.minimum(starts[before] + place, P - 1)]
    )
    same = jnp.full(R, P, jnp.int32).at[seq_of_entry].min(jnp.where(differs, place, P), mode="drop")
    whole = context_lens // page_size
    shared = jnp.minimum(jnp.minimum(same, counts), jnp.minimum(whole, whole[jnp.maximum(row - 1, 0)]))
    is_real = row < batch.num_seqs
    begins = is_real & ((row == 0) | (shared == 0))
    group = jnp.cumsum(begins, dtype=jnp.int32) - 1
    group_of_seq = jnp.where(is_real, group, R)
    first_seq = jnp.full(R, R, jnp.int32).at[jnp.where(begins, group, R)].set(row, mode="drop")
    # The prefix of a group is the least that a row shares with the one before; alone, nothing.
    joined = jnp.where(is_real & ~begins, group, R)
    least = jnp.full(R, P + 1, jnp.int32).at[joined].min(shared, mode="drop")
    num_groups = begins.sum(dtype=jnp.int32)
    last_of_group = jnp.where(row + 1 < num_groups, jnp.roll(first_seq, -1), batch.num_seqs)
    ends = batch.cu_q_lens[jnp.where(row < num_groups, last_of_group, batch.num_seqs)]
    return Cascade(
        num_groups=num_groups,
        group_of_seq=group_of_seq,
        first_seq=first_seq,
        cu_group_q_lens=jnp.concatenate([jnp.zeros(1, jnp.int32), ends]),
        prefix_lens=jnp.where(least <= P, least, 0) * page_size,
    )
