"""Which buckets cost a trace least, and programs that are compiled before anybody waits."""

from jaxattn.planning.cost import LinearCost, fit_cost
from jaxattn.planning.planner import fit_of, plan_buckets, plan_curve
from jaxattn.planning.warmup import WarmupReport, measure_steps, warmup

__all__ = [
    "LinearCost",
    "WarmupReport",
    "fit_cost",
    "fit_of",
    "measure_steps",
    "plan_buckets",
    "plan_curve",
    "warmup",
]
