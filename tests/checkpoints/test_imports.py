"""Libraries of checkpoints are imported when a checkpoint needs them."""

import json
import subprocess
import sys

import tiny_checkpoints as tiny

HEAVY = {"orbax", "tensorstore", "flax", "rich", "tokenizers", "safetensors", "matplotlib"}

PROGRAM = """
import json, sys
import jaxattn.checkpoints

def loaded():
    return sorted({name.partition(".")[0] for name in sys.modules} & set(HEAVY))

at_import = loaded()
jaxattn.checkpoints.inspect(sys.argv[1])
jaxattn.checkpoints.load_params(sys.argv[1])
print(json.dumps([at_import, loaded()]))
"""


def test_a_format_is_imported_when_it_is_opened(tmp_path):
    tensors = tiny.random_tensors(tiny.LLAMA)
    folders = {
        "safetensors": tiny.write_safetensors(tmp_path / "safetensors", tiny.LLAMA, tensors),
        "msgpack": tiny.write_msgpack(tmp_path / "msgpack", tiny.LLAMA, tiny.flax_tree(tensors)),
    }
    program = PROGRAM.replace("HEAVY", repr(HEAVY))
    for name, folder in folders.items():
        words = [sys.executable, "-c", program, str(folder)]
        run = subprocess.run(words, capture_output=True, text=True, check=True)
        at_import, after_loading = json.loads(run.stdout)
        assert at_import == []
        assert after_loading == (["safetensors"] if name == "safetensors" else [])
