"""One decoder; what differs between families is data in its config."""

from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import (
    abstract_params,
    check_cache_dtype,
    check_kv_scales,
    forward,
    init_cache,
    init_params,
    unembed,
)
from jaxattn.models.programs import Model, Programs
from jaxattn.models.sampling import Sampling
from jaxattn.models.stacked import stack_layers, unstack_layers
from jaxattn.rope import RopeConfig

__all__ = [
    "DecoderConfig",
    "Model",
    "Programs",
    "RopeConfig",
    "Sampling",
    "abstract_params",
    "check_cache_dtype",
    "check_kv_scales",
    "forward",
    "init_cache",
    "init_params",
    "stack_layers",
    "unembed",
    "unstack_layers",
]
