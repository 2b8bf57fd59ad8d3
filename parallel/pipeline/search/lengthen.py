"""A schedule of few microbatches made one of many: its middle repeated at an even pace.

What a good schedule loses it loses at its begin and end; how many microbatches pass in between
hardly matters. So the search works on a short schedule, where it is quick, and lengthens that.
"""

from collections.abc import Iterator

from phalanx.parallel.pipeline.order.problem import Problem, Word
from phalanx.parallel.pipeline.order.replay import Replay
from phalanx.parallel.pipeline.search.mend import mend


def lengthen(short: Replay, words: list[Word], problem: Problem) -> Iterator[list[Word]]:
    """The words for each microbatch that may be repeated, where that is possible."""
    few, many = short.problem.num_microbatches, problem.num_microbatches
    period = max(problem.work) / many
    orders = [short.operations(word) for word in words]
    ends = short.run(orders)
    assert ends is not None
    starts = [end - time for end, time in zip(ends, short.time, strict=False)]
    later = (many - few) * period
    for repeated in range(few):
        longer = []
        for order in orders:
            ops = []
            for operation in order:
                x, n = divmod(operation, few)
                start = starts[operation]
                ops.append((start if n <= repeated else start + later, x))
                if n == repeated:
                    ops += [(start + k * period, x) for k in range(1, many - few + 1)]
            # Equal starts keep the order of letters: a W never comes before its B.
            ops.sort(key=lambda op: op[0])
            longer.append([x for _, x in ops])
        if all(mend(problem, word) for word in longer):
            yield longer
