from .buckets import plot_tradeoff as plot_tradeoff
from .pages import plot_pages as plot_pages
from .programs import plot_programs as plot_programs
from .schedule import padding_waste as padding_waste
from .schedule import plot_mask as plot_mask
from .schedule import plot_schedule as plot_schedule

__all__: list[str]
