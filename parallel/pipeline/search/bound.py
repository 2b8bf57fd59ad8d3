"""What no order can beat: a lower bound of the longest stage."""

from phalanx.parallel.pipeline.order.problem import Problem


def lower_bound(problem: Problem) -> float:
    """The longest stage is at least this long, whatever the order.

    A rank works; before its first B it can do nothing but F, as many as memory holds; and behind
    the last B of a later rank, which has done all its F and B by then, the last microbatch still
    comes back.
    """
    fronts = [_front(problem, rank) for rank in range(problem.num_ranks)]
    return max(*fronts, _back(problem))


def _front(problem: Problem, rank: int) -> float:
    """Time until a rank's first B, and the work that cannot be done by then."""
    S, time = problem.num_stages, problem.time
    stages = problem.stages[rank]
    until, x = 0.0, stages[0]
    while x != S + stages[-1]:
        until += time[x] + problem.lag[x]
        x = problem.next[x]
    doable = problem.num_microbatches * sum(time[s] for s in stages)
    if all(problem.delta[s] > 0 for s in stages):
        most = max(time[s] / problem.delta[s] for s in stages)
        doable = min(doable, problem.limit * most)
    return problem.work[rank] + max(0.0, until - doable)


def _back(problem: Problem) -> float:
    """From a rank's last B back to an earlier rank's last W."""
    S, m, time = problem.num_stages, problem.num_microbatches, problem.time
    longest = 0.0
    for rank, stages in enumerate(problem.stages):
        end = problem.begin[rank] + m * sum(time[s] + time[S + s] for s in stages)
        weights = [2 * S + s for s in stages]
        if all(problem.delta[x] < 0 for x in weights):
            # W that memory cannot put off until then.
            most = problem.limit * max(-time[x] / problem.delta[x] for x in weights)
            end += max(0.0, m * sum(time[x] for x in weights) - most)
        x = S + stages[0]
        while True:
            first = x - S
            owner = problem.placement[first]
            if first == problem.stages[owner][0]:
                longest = max(longest, end + time[2 * S + first] - problem.begin[owner])
            if first == 0:
                break
            end += problem.lag[x] + time[x - 1]
            x -= 1
    return longest
