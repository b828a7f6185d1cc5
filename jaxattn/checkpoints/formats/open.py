"""Opening weights in the format they are in; a format's library is imported when there is such a file."""

from __future__ import annotations

from jaxattn.checkpoints.formats.weights import Weights
from jaxattn.checkpoints.locate import Location


def open_weights(location: Location) -> Weights:
    """Open weights: what is stored is known then, and nothing of it is read.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    # Imported here: Orbax takes 0.6 s of a session's start, `import jaxattn` 1 s, and many load nothing.
    if location.is_old_orbax:
        from jaxattn.checkpoints.formats.old_orbax import open_old_orbax

        return open_old_orbax(location.weights)
    match location.format:
        case "orbax":
            from jaxattn.checkpoints.formats.orbax import open_orbax

            return open_orbax(location.weights)
        case "safetensors":
            from jaxattn.checkpoints.formats.safetensors import open_safetensors

            return open_safetensors(location.weights)
        case "msgpack":
            from jaxattn.checkpoints.formats.msgpack import open_msgpack

            return open_msgpack(location.weights)
