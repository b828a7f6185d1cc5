"""Checkpoints of decoders: found, checked against their config, and loaded.

    model = load_model("path/to/checkpoint", dtype="bfloat16")

Read are safetensors, Flax's msgpack files and Orbax folders, old ones too, with the names of Hugging Face,
of the gemma library, of MaxText, or of a table of one's own; of the families Llama, Mistral, Phi-3, Qwen 2
and 3, Gemma 1, 2 and 3. What a config means is what Hugging Face's torch models compute from it. Names and
shapes are compared with the config before any weight is read; every disagreement is reported in one error.

Inside, each line imports only from those above it (import-linter holds it):

    errors, locate, manifest    where weights, their config and their checksums are
    formats                     how bytes lie: names, shapes, dtypes and arrays of files
    layouts                     what leaves are called and how their axes lie; the match with a decoder's
    families                    what configs mean
    opening, reading            all compared, with no weight read; then read, converted, put into place
    load, inspection, save      what a user calls
"""

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.families.config_json import config_from_dict, config_to_dict
from jaxattn.checkpoints.inspection import Inspection, inspect
from jaxattn.checkpoints.layouts.rows import LeafRow
from jaxattn.checkpoints.layouts.user_tables import read_table
from jaxattn.checkpoints.load import LoadedModel, LoadReport, load_model, load_params
from jaxattn.checkpoints.manifest import MANIFEST, write_manifest
from jaxattn.checkpoints.opening import load_config
from jaxattn.checkpoints.save import save_params
from jaxattn.models import abstract_params

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "Inspection",
    "LeafRow",
    "LoadReport",
    "LoadedModel",
    "abstract_params",
    "config_from_dict",
    "config_to_dict",
    "inspect",
    "load_config",
    "load_model",
    "load_params",
    "read_table",
    "save_params",
    "write_manifest",
]
