"""Making a changed word possible again, where that is easy."""

from phalanx.parallel.pipeline.order.problem import Problem, Word


def mend(problem: Problem, word: Word) -> bool:
    """Whether a word is possible; in place, W are pulled forward where memory asks for it."""
    S, delta, limit, placement = (
        problem.num_stages,
        problem.delta,
        problem.limit,
        problem.placement,
    )
    count = [0] * (3 * S)
    held = 0.0
    for place in range(len(word)):
        x = word[place]
        if held + delta[x] > limit:
            found = _next_weight(problem, word, place, count)
            if found < 0:
                return False
            x = word.pop(found)
            word.insert(place, x)
        if x >= S:
            if count[x] >= count[x - S]:
                return False
            s = x - S
            if s < S - 1 and placement[s] == placement[s + 1] and count[x] >= count[x + 1]:
                return False
        elif x > 0 and placement[x] == placement[x - 1] and count[x] >= count[x - 1]:
            return False
        count[x] += 1
        held += delta[x]
    return True


def _next_weight(problem: Problem, word: Word, place: int, count: list[int]) -> int:
    """Place of the first W from here on whose B is done, or -1."""
    S = problem.num_stages
    for later in range(place + 1, len(word)):
        x = word[later]
        if x >= 2 * S and count[x - S] > count[x]:
            return later
    return -1
