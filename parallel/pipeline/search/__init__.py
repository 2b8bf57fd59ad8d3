"""Search for the best schedule of given costs within a memory limit, and proof of it for small cases."""

from phalanx.parallel.pipeline.search.auto import best_order, best_schedule, least_memory

__all__ = ["best_order", "best_schedule", "least_memory"]
