"""Attention over ragged, paged batches: nest once, prepare once, attend on every backend.

batch = nest_sequences(token_ids, page_tables=…, page_size=16)     # host, once per step
metadata = prepare_metadata(batch, specs)                          # device, once per step
out = attention(q, cache.k_pages, cache.v_pages, metadata, spec)   # per layer, any backend

The names of a first hour, listed in `__init__.pyi`, are imported when they are first used; the others are
in their rooms, such as `jaxattn.batch.check_batch`.
"""

import lazy_loader

# Eager, since a room has the same name: importing that first would put the room in the function's place.
from jaxattn.attention.api import attention as attention

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
