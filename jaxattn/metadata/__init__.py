"""Everything that attention derives from a batch, once: fields, schedules, who reads what."""

from jaxattn.metadata.consumers import CONSUMERS, Consumer
from jaxattn.metadata.fields import MissingFieldError
from jaxattn.metadata.prepare import prepare_metadata
from jaxattn.metadata.rope import RopeConfig, RopeTables, rope_tables, rotate
from jaxattn.metadata.spec import AttentionSpec, Visibility, WindowClass
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.metadata.visible import VisibleKeys

__all__ = [
    "CONSUMERS",
    "AttentionMetadata",
    "AttentionSpec",
    "Consumer",
    "MissingFieldError",
    "RopeConfig",
    "RopeTables",
    "Visibility",
    "VisibleKeys",
    "WindowClass",
    "prepare_metadata",
    "rope_tables",
    "rotate",
]
