"""Search for the best schedule of given costs within a memory limit.

The way of a search: plans (`order/plan.py`) are drawn (`scout.py`), run in time
(`order/squeeze.py`), again under other rules (`rounds.py`), and changed here and there
(`anneal.py`).
"""

from phalanx.parallel.pipeline.search.auto import best_order, best_schedule, least_memory

__all__ = ["best_order", "best_schedule", "least_memory"]
