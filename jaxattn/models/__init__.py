"""One decoder; what differs between families is data in its config."""

from jaxattn.metadata.rope import RopeConfig
from jaxattn.models.compiled import CompiledSteps, Model
from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import forward, unembed
from jaxattn.models.layer_caches import check_cache_dtype, check_kv_scales, init_model_cache
from jaxattn.models.params import abstract_params, init_params
from jaxattn.models.sampling import Sampling
from jaxattn.models.stacked import stack_layers, unstack_layers

__all__ = [
    "CompiledSteps",
    "DecoderConfig",
    "Model",
    "RopeConfig",
    "Sampling",
    "abstract_params",
    "check_cache_dtype",
    "check_kv_scales",
    "forward",
    "init_model_cache",
    "init_params",
    "stack_layers",
    "unembed",
    "unstack_layers",
]
