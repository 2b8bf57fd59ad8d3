"""Search for the best schedule of given costs within a memory limit; proof of it for small cases.

The way of a search: plans (`plan.py`) are drawn (`scout.py`), run in time (`squeeze.py`), again
under other rules (`rounds.py`), and changed here and there (`anneal.py`). `exact.py` proves.
"""

from phalanx.parallel.pipeline.search.auto import best_order, best_schedule, least_memory

__all__ = ["best_order", "best_schedule", "least_memory"]
