"""Attention as a layer of your own Flax model: `jaxattn.nn.linen.Attention`, `jaxattn.nn.nnx.Attention`.

Nothing else in jaxattn imports these modules, so that only who uses them waits for Flax.
"""
