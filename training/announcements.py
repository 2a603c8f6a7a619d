"""What a run announces in its log before the first step: data, network, batch, averages, and warnings about
each."""

from __future__ import annotations

from data.label_space import listed, space_of
from dnnlib import EasyDict
from torch_utils import distributed
from training import architectures
from training.run_log import RunLog


def describe_run(log: RunLog, c: EasyDict, net, dataset, teacher, rounds: int, batch_gpu: int) -> None:
    """Log what is about to be trained on what."""
    describe_data(log, c, dataset)
    if teacher is not None and (untaught := {*space_of(teacher).absent} - {*dataset.label_space.absent}):
        log(
            f'Warning: the training set of {c.teacher} has no images of classes {listed(sorted(untaught))}, '
            'of which these data have some: its predictions for them were never trained.'
        )

    # Network.
    params = sum(p.numel() for p in net.parameters())
    log(f'Network: {type(net).__name__} / {type(net.model).__name__}, {params:,} parameters')
    for warning in architectures.missing_levels(c.network):
        log(warning)

    # Batch and averages.
    processes = distributed.get_world_size()
    log(f'Batch: {c.batch_size} images in {rounds} round(s) of {batch_gpu} on {processes} process(es)')
    describe_averages(log, c)


def describe_data(log: RunLog, c: EasyDict, dataset) -> None:
    """Log the training set and what is unusual about it."""
    # What it is.
    is_subset = dataset.num_images < dataset.num_files
    subset = f', a random {dataset.num_images} of its {dataset.num_files}' if is_subset else ''
    facts = f'{len(dataset)} images of {dataset.image_shape}, {dataset.label_space}'
    log(f'Data: {facts}, from {c.dataset.path}{subset}')

    # Labels without images, other files in the folder, images that lie on their side.
    if dataset.unused_labels:
        log(
            f'Warning: {dataset.unused_labels} labels in dataset.json are of no image in {c.dataset.path}. '
            'Is it complete?'
        )
    if about := dataset.about_others():
        log(f'Note: {about}.')
    if dataset.unturned:
        log(
            f'Note: {len(dataset.unturned)} images carry an EXIF orientation, which is ignored: training '
            'uses pixels as they are stored. dataset_tool.py --exif=apply turns them.'
        )
    if warning := dataset.label_space.warning():
        log(f'Warning: {warning}')


def describe_averages(log: RunLog, c: EasyDict) -> None:
    """Log the half-life of the EMA, and warn if it is too short, or too long for the run."""
    # Too short: the average is next to the weights themselves.
    steps = c.ema_halflife_nimg / c.batch_size
    log(f'EMA half-life: {c.ema_halflife_nimg:,.0f} images = {steps:,.0f} steps')
    if steps < 100:
        log(
            f'Warning: an EMA with a half-life of {steps:.3g} steps averages next to nothing. --ema is in '
            'Mimg; --ema=500kimg names another unit.'
        )

    # Too long: without a ramp, the initial weights decay by the half-life alone.
    remaining = 0.0 if c.ema_rampup_ratio else 0.5 ** (c.total_nimg / c.ema_halflife_nimg)
    if remaining > 0.01:
        log(
            f'Warning: with a constant half-life of {c.ema_halflife_nimg:,.0f} images, at the end '
            f'{remaining:.0%} of the average will still be the weights that training began with. Shorten '
            '--ema, or set --ema_rampup=0.05.'
        )


def describe_resume(log: RunLog, c: EasyDict, progress, made_by: int, world_size: int) -> None:
    """Log where a run resumes, and whether that can be exact. The state was saved by `made_by` processes."""
    log(f'Resumed from {c.resume} at {progress.nimg / 1e3:.1f} kimg.')
    if made_by != world_size:
        log(
            f'Warning: {made_by} process(es) saved that state, and now there are {world_size}: every image '
            'is seen as before, but sums are rounded differently, so the result will not be bit for bit '
            'that of an uninterrupted run.'
        )
