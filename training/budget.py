"""--budget: measures the training step of a configuration on this machine, and chooses the duration that the hours allow."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import io
import sys
import tempfile
import time

import torch

from data.dataset import ImageFolderDataset
from data.prefetcher import Prefetcher
from dnnlib import EasyDict, UserError
from dnnlib.text import printable
from torch_utils import distributed, training_stats
from torch_utils.preemption import WorkersIgnoreSignals
from training import configuration, run_folder
from training.command_line import Options
from training.profiling import StepProfile
from training.setup import Run, set_up
from training.training_loop import prefetch, train_step

WARM_UP = 3  # steps before measuring: memory is allocated, kernels are chosen, networks are compiled
SECONDS = 20.0  # of measuring, at most,
SHARE = 0.02  # and at most this share of the budget
MOST_STEPS = 1000


def spend(o: Options, dataset: ImageFolderDataset, teacher: torch.nn.Module | None) -> Options:
    """The options with the duration that --budget allows, in place of --budget. All processes call this together.

    What scales with the duration is left to `configuration.resolve_defaults`. The hours are those of training steps:
    starting, evaluating and saving come on top.

    Raises: UserError if the budget is less than one step, or for what contradicts the files that it names.
    """
    hours, o = o.run.budget, dataclasses.replace(o.but(budget=None), given=o.given - {'budget'})

    # The run as it would be with the usual duration, on which no step's cost depends.
    c = configuration.configure(configuration.resolve_defaults(o, dataset, teacher, None), dataset, teacher)
    distributed.from_main(lambda: run_folder.check_new_folder(o, c.run_dir))
    seconds = 3600 * hours
    step, count = measure_step(c, dataset, teacher, min(SECONDS, SHARE * seconds))

    # Whole steps.
    steps = int(seconds / step)
    if not steps:
        raise UserError(
            f'--budget={hours:g} hours are {seconds:.3g} seconds, less than a step, which takes {step:.3g}: '
            'give more hours, or choose a smaller --batch or network.'
        )
    nimg = steps * c.batch_size
    distributed.print0(
        printable(
            f'--budget={hours:g}: a step of {c.batch_size} images takes {1e3 * step:.4g} ms here '
            f'({count} measured), so {hours:g} hours are {steps:,} steps: --duration={nimg / 1e6!r} '
            f'({nimg / 1e3:g} kimg). Evaluating and saving come on top.'
        ),
        file=sys.stderr,
    )
    return o.but(duration=nimg / 1e6)


def measure_step(
    c: EasyDict, dataset: ImageFolderDataset, teacher: torch.nn.Module | None, seconds: float
) -> tuple[float, int]:
    """(seconds of a training step, number of steps measured), equal on all processes.

    The steps are those of a run that is thrown away, on a copy of the teacher.
    """
    if 'aux_ahead' in c.loss:  # from the start the networks take turns, whose steps are not alike
        c = EasyDict(c, loss=EasyDict(c.loss, aux_ahead=0))
    with tempfile.TemporaryDirectory() as folder, WorkersIgnoreSignals() as ignore_signals:
        # What a run announces and warns of is left to the run to come; errors are not.
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                run = set_up(c, folder, dataset, copy.deepcopy(teacher), None)
        except BaseException:
            print(said.getvalue(), end='', file=sys.stderr)
            raise
        prefetcher = prefetch(run, ignore_signals)
        # A step of each network tells how many fit; the slowest process decides how long each takes.
        turns = len(run.trained)
        timed(run, prefetcher, WARM_UP)
        first = max(distributed.gather_objects(timed(run, prefetcher, turns)))
        count = max(min(int(seconds / first), MOST_STEPS) // turns, 1) * turns
        step = max(distributed.gather_objects(timed(run, prefetcher, count)))

    # Leave no trace in the run to come.
    del run, prefetcher
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    training_stats.reset()
    return step, count


def timed(run: Run, prefetcher: Prefetcher, count: int) -> float:
    """Seconds of each of `count` training steps."""
    no_profile = StepProfile(0, run.dir, run.device, {}, say=print)
    start = time.perf_counter()
    for _ in range(count):
        train_step(run, prefetcher, no_profile)
    if run.device.type == 'cuda':
        torch.cuda.synchronize(run.device)
    return (time.perf_counter() - start) / count
