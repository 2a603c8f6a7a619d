"""Statistics at the end of a tick: progress, timing, resources, distances of the averages."""

from __future__ import annotations

import os

import psutil
import torch

from dnnlib import EasyDict
from torch_utils import misc
from training.phema import WeightAverages
from training.run_files import Progress
from training.weight_update import WeightUpdate, learning_rate


def network_stats(update: WeightUpdate, averages: WeightAverages) -> dict[str, dict]:
    """Relative distance of each average from the weights, loss scale and skipped steps. Waits for the
    device."""
    weights = update.weights.detach()
    vectors = {name: vector.detach().to(weights.device) for name, vector in averages.vectors.items()}
    values = {
        f'EMA/{name}_distance': torch.dist(vector, weights) / weights.norm()
        for name, vector in vectors.items()
    }
    values |= {'Progress/loss_scale': update.scale, 'Progress/bad_steps': update.skips}
    return {name: dict(num=1, mean=value.item(), std=0) for name, value in values.items()}


def tick_stats(
    progress: Progress,
    c: EasyDict,
    averages: WeightAverages,
    start_time: float,
    tick_start_time: float,
    start_nimg: int,
    maintenance_time: float,
    now: float,
    device: torch.device,
    data_wait: float,
) -> dict[str, dict]:
    """Progress, timing and resources of a tick, in the form of `training_stats.collect`.

    Args:
        start_time, tick_start_time, now: in seconds of one clock.
        start_nimg: images seen when this process started.
        maintenance_time, data_wait: seconds spent evaluating and saving, and waiting for batches.
    """
    tick_time, seen = now - tick_start_time, progress.nimg - max(progress.tick_start_nimg, start_nimg)
    # The clock of a machine that was put to sleep may stand still.
    per_second = lambda amount: amount / tick_time if tick_time > 0 else 0.0

    peak_gpu_mem = torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else 0
    values = {
        'Progress/tick': progress.tick,
        'Progress/nimg': progress.nimg,
        'Progress/kimg': progress.nimg / 1e3,
        'Progress/step': progress.nimg // c.batch_size,
        'Progress/lr': learning_rate(c, progress.nimg - c.batch_size),
        'Progress/ema_halflife_kimg': averages.halflife_at(progress.nimg) / 1e3,
        'Timing/total_sec': now - start_time,
        'Timing/sec_per_tick': tick_time,
        'Timing/sec_per_kimg': tick_time / max(seen, 1) * 1e3,
        'Timing/images_per_sec': per_second(seen),
        'Timing/maintenance_sec': maintenance_time,
        'Timing/data_wait_share': per_second(data_wait),
        'Resources/cpu_mem_gb': psutil.Process(os.getpid()).memory_info().rss / 2**30,
        'Resources/peak_gpu_mem_gb': peak_gpu_mem / 2**30,
    }
    return {name: dict(num=1, mean=value, std=0) for name, value in values.items()}


def tick_line(stats: dict, loss_name: str, remaining_sec: float) -> str:
    """The console line of a tick."""
    mean = lambda name: stats[name]['mean']
    fields = [
        f'tick {mean("Progress/tick"):<5.0f}',
        f'kimg {mean("Progress/kimg"):<9.1f}',
        f'loss {stats.get(loss_name, {}).get("mean", float("nan")):<9.4g}',
        f'time {misc.format_time(mean("Timing/total_sec")):<8}',
        f'img/s {mean("Timing/images_per_sec"):<8.4g}',
        f'sec/kimg {mean("Timing/sec_per_kimg"):<7.3g}',
        f'data {mean("Timing/data_wait_share"):<6.1%}',
        f'maint {mean("Timing/maintenance_sec"):<5.1f}',
        f'mem {mean("Resources/cpu_mem_gb"):<5.2f}',
        f'gpu {mean("Resources/peak_gpu_mem_gb"):<5.2f}',
        f'ETA {misc.format_time(remaining_sec)}',
    ]
    return ' '.join(fields)
