"""Pictures of a batch: who sees what, which program does what, who owns which page, where padding goes.

Every function returns a matplotlib figure with a transparent background, legible in a light and in a dark
notebook; `figure.savefig(path)` writes it.
"""

from jaxattn.viz_buckets import plot_tradeoff
from jaxattn.viz_pages import plot_pages
from jaxattn.viz_programs import plot_programs
from jaxattn.viz_schedule import padding_waste, plot_mask, plot_schedule

__all__ = ["padding_waste", "plot_mask", "plot_pages", "plot_programs", "plot_schedule", "plot_tradeoff"]
