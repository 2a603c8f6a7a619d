"""Statistics at the end of a tick: progress, timing, resources, distances of the averages."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from training.phema import WeightAverages
from training.setup import Run
from training.trained import Trained
from training.weight_update import learning_rate


@dataclass
class Clock:
    """Times of the loop, in seconds of `time.monotonic`.

    Attributes:
        start, tick_start: when training and the current tick began.
        maintenance: seconds spent evaluating and saving before the current tick.
        steady: when the second tick began, and images seen then; None before. The first one is slower.
    """

    start: float
    tick_start: float
    maintenance: float
    steady: tuple[float, int] | None = None

    def remaining(self, now: float, nimg: int, total_nimg: int) -> float | None:
        """Seconds to `total_nimg` images at the pace since the second tick began; None before its end."""
        if self.steady is None or nimg <= self.steady[1]:
            return None
        since, images = self.steady
        return max(total_nimg - nimg, 0) * (now - since) / (nimg - images)


def network_stats(networks: Sequence[Trained], averages: WeightAverages) -> dict[str, dict]:
    """Relative distance of each average from the weights, loss scale and skipped steps. Waits for the device.

    Args:
        networks: those that train, first the one that is averaged.
    """
    update = networks[0].update
    parameters, weights = update.parameters, update.weights.detach()
    # Averages may lie on the host (--ema-device=cpu).
    vectors = {name: vector.detach().to(weights.device) for name, vector in averages.vectors.items()}
    length = parameters.norm(weights)
    values = {
        f'EMA/{name}_distance': parameters.distance(vector, weights) / length
        for name, vector in vectors.items()
    }
    for update in (trained.update for trained in networks):
        values |= {update.statistic('loss_scale'): update.scale, update.statistic('bad_steps'): update.skips}
    return {name: dict(num=1, mean=value.item(), std=0) for name, value in values.items()}


def tick_stats(run: Run, clock: Clock, now: float, data_wait: float) -> dict[str, dict]:
    """Progress, timing and resources of a tick, in the form of `training_stats.collect`.

    Args:
        now: time of the clock.
        data_wait: seconds that steps waited for batches.
    """
    c, progress, device = run.c, run.progress, run.device
    tick_time = now - clock.tick_start
    # The first tick of a resumed run began before it.
    seen = progress.nimg - max(progress.tick_start_nimg, run.start_nimg)
    # The clock of a machine that was put to sleep may stand still.
    per_second = lambda amount: amount / tick_time if tick_time > 0 else 0.0

    peak_gpu_mem = torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else 0
    values = {
        'Progress/tick': progress.tick,
        'Progress/nimg': progress.nimg,
        'Progress/kimg': progress.nimg / 1e3,
        'Progress/step': progress.nimg // c.batch_size,
        'Progress/lr': learning_rate(c, progress.nimg - c.batch_size),
        'Progress/ema_halflife_kimg': run.averages.halflife_at(progress.nimg) / 1e3,
        'Timing/total_sec': now - clock.start,
        'Timing/sec_per_tick': tick_time,
        'Timing/sec_per_kimg': tick_time / max(seen, 1) * 1e3,
        'Timing/images_per_sec': per_second(seen),
        'Timing/maintenance_sec': clock.maintenance,
        'Timing/data_wait_share': per_second(data_wait),
        'Resources/cpu_mem_gb': psutil.Process(os.getpid()).memory_info().rss / 2**30,
        'Resources/peak_gpu_mem_gb': peak_gpu_mem / 2**30,
    }
    return {name: dict(num=1, mean=value, std=0) for name, value in values.items()}


def tick_line(stats: dict, loss_name: str, remaining_sec: float | None) -> str:
    """The console line of a tick, at most 100 characters.

    `ema` is the effective half-life in images, `data` the share of time that steps waited for batches.

    Args:
        stats: of `network_stats` and `tick_stats`, and the loss by its name.
        remaining_sec: estimated time to the end; None where it is not known yet.
    """
    mean = lambda name: stats.get(name, {}).get('mean', float('nan'))
    kimg = mean('Progress/kimg')
    fields = [
        f'tick {mean("Progress/tick"):<4.0f}',
        f'kimg {f"{kimg:.6g}" if kimg < 1e5 else f"{kimg:.0f}":<7}',
        f'loss {in_width(mean(loss_name), 7) if loss_name in stats else "-":<7}',  # the student's turn may be later
        f'lr {in_width(mean("Progress/lr"), 6):<6}',
        f'ema {with_suffix(mean("Progress/ema_halflife_kimg") * 1e3):<5}',
        f'time {compact_time(mean("Timing/total_sec")):<6}',
        f'img/s {with_suffix(mean("Timing/images_per_sec")):<5}',
        f'data {min(mean("Timing/data_wait_share"), 0.99):<3.0%}',
        *([] if remaining_sec is None else [f'ETA {compact_time(max(remaining_sec, 0))}']),
    ]
    return ' '.join(fields).rstrip()


def in_width(value: float, width: int) -> str:
    """A number in at most `width` characters, of six or more: with three digits if they fit."""
    texts = [re.sub(r'e([+-])0*', lambda m: 'e' + m[1].strip('+'), f'{value:.{n}g}') for n in (3, 2, 1)]
    return next((text for text in texts if len(text) <= width), texts[-1])


def with_suffix(value: float) -> str:
    """`12`, `1.5k`, `7.88M`: a count in at most five characters, or `0.012` if it is small."""
    for unit, suffix in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if value >= 0.9995 * unit:
            return f'{value / unit:.3g}{suffix}'
    return in_width(value, 5)


def compact_time(seconds: float) -> str:
    """`42s`, `3m05s`, `1h02m`, `2d03h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m{seconds % 60:02}s'
    if seconds < 86400:
        return f'{seconds // 3600}h{seconds // 60 % 60:02}m'
    return f'{seconds // 86400}d{seconds // 3600 % 24:02}h'
