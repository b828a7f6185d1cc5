"""One decoder; what differs between families is data in its config."""

from jaxattn.models.config import DecoderConfig, RopeConfig
from jaxattn.models.decoder import abstract_params, forward, init_cache, init_params, unembed
from jaxattn.models.programs import Model, Programs

__all__ = [
    "DecoderConfig",
    "Model",
    "Programs",
    "RopeConfig",
    "abstract_params",
    "forward",
    "init_cache",
    "init_params",
    "unembed",
]
