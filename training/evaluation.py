"""Evaluations during training: the Fréchet distance and pictures of each average in --val_emas, and the
picture of each snapshot."""

from __future__ import annotations

import math
import os

import torch

from dnnlib import EasyDict, NotFinite
from metrics.validator import Validator, check_sampler, label_chooser
from sampling import generation
from torch_utils import distributed
from torch_utils.preemption import PreemptionHandler
from training import checkpoint, execution
from training.run_files import file_stem
from training.run_log import RunLog
from training.setup import Run


def build_validator(run: Run) -> Validator:
    """The validator of a run. A resumed run generates the images of interrupted evaluations again."""
    c, net = run.c, run.student.net
    options = EasyDict(c.validation, overwrite=c.validation.overwrite or run.resumed)
    check_sampler(options, net)  # against the network's range, before the first step
    image_shape = [net.img_channels, net.img_resolution, net.img_resolution]
    teacher = (run.teacher, 'the teacher', None, None) if options.get('pairs') else None
    validator = Validator(
        options,
        run.dataset,
        run.dir,
        run.device,
        image_shape,
        run.dataset.label_space,
        c.encoder,
        teacher=teacher,
    )
    # Whether there are pairs is known by what snapshots will record.
    if teacher:
        average = sampling_network(run, 'ema')
        average.metadata = checkpoint.snapshot_metadata(c, run.progress.nimg)
        validator.check_pairs(average)
        run.log(f'Pairs of --val_pairs={options.pairs}: the teacher by {validator.pairing.sampler}.')
    return validator


def evaluate_at_start(validator: Validator, run: Run, stop: PreemptionHandler) -> dict | None:
    """Evaluate what --val_teacher and --val_at_start name; None if a signal asked to stop meanwhile."""
    if run.c.validation.teacher and run.teacher is not None:
        record = validator.run(run.teacher, nimg=0, ema='teacher', steps=None, stop=stop)
        if record is None:
            return None
        run.log.evaluation(record)
    return evaluate(validator, run, stop) if run.c.validation.at_start else {}


def evaluate(validator: Validator, run: Run, stop: PreemptionHandler) -> dict | None:
    """FID of each average of --val_emas, by name, the same on all processes; None, with nothing recorded, if
    a signal asked to stop meanwhile.

    The FID is None for an average whose images are not finite. That is logged, and training continues.
    """
    c, nimg, records = run.c, run.progress.nimg, {}

    # Record nothing until all averages are evaluated: a stopped run repeats them all.
    for name in c.validation.emas:
        net, metadata = sampling_network(run, name), checkpoint.snapshot_metadata(c, nimg)
        records[name] = validator.run(net, nimg=nimg, ema=name, metadata=metadata, stop=stop)
        if records[name] is None:
            return None

    for name, record in records.items():
        _, grid = run.files.attempt(sample_grid, validator, sampling_network(run, name), nimg, name, run.log)
        run.log.evaluation(record, grid)
    return distributed.broadcast_object({name: record['fid'] for name, record in records.items()})


def sampling_network(run: Run, name: str) -> torch.nn.Module:
    """The network that samples with the average of that name. At most one copy at a time is on the device."""
    average = execution.run_with(run.averages.on_device(name), channels_last=run.c.channels_last)
    return run.loss_state.sampling_network(average)


def sample_grid(validator: Validator, net, nimg: int, name: str, log: RunLog) -> str | None:
    """The path of `Validator.sample_grid`; None, and a line in the log, if its images are not finite."""
    try:
        return validator.sample_grid(net, nimg, name)
    except NotFinite as error:
        log(f'Warning: no picture of samples ({name}): {error}.')
        return None


# ----------------------------------------------------------------------------
# The picture of a snapshot.


def show_samples(run: Run) -> None:
    """Write samples of the run's exponential average beside its snapshot, and log them. Called by all
    processes; the main one samples."""
    # Averages that are divided among processes are assembled by all of them.
    needed = distributed.is_main() or run.student.update.parameters.sharded
    net = sampling_network(run, 'ema') if needed else None
    _, path = run.files.attempt(write_samples, run, net)
    if path is not None:
        run.log.samples(run.progress.nimg, path)


def write_samples(run: Run, net: torch.nn.Module) -> str | None:
    """Write `samples-<kimg>.png`: what generate.py makes of the snapshot for seeds 0, 1, ...

    Random numbers come from generators of their own, so training goes on as if nothing had been sampled.
    Returns: its path; None, and a line in the log, if its images are not finite.
    Raises: UserError if the file cannot be written.
    """
    c, space, seeds = run.c, run.dataset.label_space, range(run.c.sample_grid)
    net.metadata = checkpoint.snapshot_metadata(c, run.progress.nimg)
    choose = label_chooser('dataset' if space.are_vectors else 'uniform', space, run.dataset)

    # In batches that the device has room for.
    batches = generation.split_batches(seeds, run.batch_gpu)
    try:
        drawn = [generation.generate_checked(net, batch, choose) for batch in batches]
        images = generation.finite_images(drawn, seeds)
    except NotFinite as error:
        run.log(f'Warning: no picture of samples: {error}.')
        return None

    # As square as possible, with black in places that remain.
    columns = math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    picture = generation.image_grid(torch.cat([images, torch.zeros_like(images[:missing])]), columns)
    stem = file_stem(run.progress, 'network-snapshot').replace('network-snapshot', 'samples')
    path = os.path.join(run.dir, f'{stem}.png')
    generation.save_picture(picture, path)
    return path
