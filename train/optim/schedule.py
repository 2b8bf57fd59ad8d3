"""The learning rate as a function of the step: nothing to save, nothing to restore."""

import math

from phalanx.train.optim.config import LrConfig, LrSchedule


def learning_rate(config: LrConfig, step: int, num_steps: int) -> float:
    """Learning rate of step `step` (counted from 0) of a run of `num_steps`.

    Linear warm-up, then constant, cosine (Loshchilov & Hutter, 2017) or warmup-stable-decay
    (Hu et al., 2024).
    """
    if step < config.warmup_steps:
        return config.peak * (step + 1) / config.warmup_steps
    low = config.peak * config.min_ratio
    if config.schedule is LrSchedule.cosine:
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        return low + (config.peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule is LrSchedule.wsd:
        decay = min(round(num_steps * config.decay_fraction), num_steps - config.warmup_steps)
        decay = max(1, decay)
        remaining = min(1.0, max(0, num_steps - step) / decay)
        return low + (config.peak - low) * remaining
    return config.peak
