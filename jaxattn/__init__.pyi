from .attention import attention as attention
from .attention import choose_implementation as choose_implementation
from .batch import Bucket as Bucket
from .batch import BucketGrid as BucketGrid
from .batch import RaggedBatch as RaggedBatch
from .batch import advance as advance
from .batch import nest_sequences as nest_sequences
from .cache import PagedKVCache as PagedKVCache
from .cache import PagePool as PagePool
from .cache import init_cache as init_cache
from .cache import write_cache as write_cache
from .checkpoints import CheckpointError as CheckpointError
from .checkpoints import inspect as inspect
from .checkpoints import load_model as load_model
from .checkpoints import load_params as load_params
from .checkpoints import save_params as save_params
from .compiling import forbid_compiles as forbid_compiles
from .metadata import AttentionMetadata as AttentionMetadata
from .metadata import AttentionSpec as AttentionSpec
from .metadata import RopeConfig as RopeConfig
from .metadata import prepare_metadata as prepare_metadata
from .models import DecoderConfig as DecoderConfig
from .models import Model as Model
from .models import Sampling as Sampling
from .planning import warmup as warmup
from .serving import Server as Server
from .serving import compute_logits as compute_logits
from .serving import generate as generate
from .serving import load_tokenizer as load_tokenizer
from .serving import serve as serve
from .training import nest_batches as nest_batches
from .training import next_token_cross_entropy as next_token_cross_entropy
from .training import pack_best_fit as pack_best_fit

__all__: list[str]
__version__: str
