"""Attention over a batch: one signature, four implementations, each with its gradient beside it."""

from jaxattn.attention.api import attention, choose_implementation
from jaxattn.attention.choice import Choice
from jaxattn.attention.choice_table import ChoiceTable, read_table
from jaxattn.attention.layer import attend_layer

__all__ = [
    "Choice",
    "ChoiceTable",
    "attend_layer",
    "attention",
    "choose_implementation",
    "read_table",
]
