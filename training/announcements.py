"""What a run announces in its log before the first step: data, network, batch, averages, and warnings about
each and about schedules that do not suit the length of the run (`start_warnings`, the only list of them)."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator

import torch

from data.label_space import LabelSpace, listed, space_of
from dnnlib import EasyDict
from torch_utils import distributed
from training import architectures, execution, resolution
from training import consistency_ops as ops
from training.run_log import RunLog
from training.saved_files import saved_snapshots

# Optimizer steps that a network needs for each edge that a segment gains, from docs/results.md: on digits mct of
# eight steps has 8.2 and is as good as the teacher; with four steps it has 4.1 and is 1.42 times as far, and mcd
# of eight with 5.3 is 11 % worse than with few edges throughout. The published student has 337.
STEPS_PER_EDGE = 8
# A half-life of under a hundred steps that is a smaller share of the run is a wrong unit, as --ema=50kimg for the
# published 50 Mimg of 210. Defaults have 0.047 % or more, those of EDM2's networks of latents 0.023 %.
SHORTEST_EMA = 0.0003


def describe_place(log: RunLog, run_dir: str, device: torch.device) -> None:
    """Log where a run writes, and the device that it runs on."""
    log(f'Output folder: {run_dir}')
    if device.type == 'cuda':
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        place = f'{torch.cuda.get_device_name(device)}, {memory:.0f} GiB, CUDA {torch.version.cuda}'
    else:
        place = f'{device.type.upper()}, {torch.get_num_threads()} thread(s)'
    backend = distributed.get_backend()
    log(f'Device: {place}, PyTorch {torch.__version__}{f", {backend}" if backend else ""}')


def describe_end(log: RunLog, c: EasyDict, run_dir: str, space: LabelSpace) -> None:
    """Log the last snapshot, and the command that samples from it."""
    newest = next(iter(saved_snapshots(run_dir)), None)
    if newest is None:
        log('No snapshot was written' + (' (--snap=0).' if not c.snapshot_ticks else '.'))
        return
    log(f'Last snapshot: {newest}')
    labels = ' --labels=data' if space.are_vectors else ''
    log(
        f'Sample from it: python generate.py --network={shlex.quote(str(newest))} --outdir=samples '
        f'--seeds=0-63{labels}'
    )


def describe_run(log: RunLog, c: EasyDict, net, dataset, teacher, rounds: int, batch_gpu: int) -> None:
    """Log what is about to be trained on what, and what is to be warned of."""
    # Data: what they are.
    is_subset = dataset.num_images < dataset.num_files
    subset = f', a random {dataset.num_images} of its {dataset.num_files}' if is_subset else ''
    facts = f'{len(dataset)} images of {dataset.image_shape}, {dataset.label_space}'
    log(f'Data: {facts}, from {c.dataset.path}{subset}')

    # Guidance.
    if c.get('guide'):
        interval = c.get('guidance_interval')
        at = f' at noise levels from {interval[0]:g} to {interval[1]:g}' if interval else ''
        log(f'Guidance: {c.guide} with weight {c.guidance:g}{at}')

    # Network.
    params = sum(p.numel() for p in net.parameters())
    log(f'Network: {type(net).__name__} / {type(net.model).__name__}, {params:,} parameters')

    # Batch and averages.
    processes = distributed.get_world_size()
    log(f'Batch: {c.batch_size} images in {rounds} round(s) of {batch_gpu} on {processes} process(es)')
    counted = lambda number: f'{number:,.0f}' if number >= 100 else f'{number:.3g}'
    images, steps = c.ema_halflife_nimg, c.ema_halflife_nimg / c.batch_size
    log(f'EMA half-life: {counted(images)} images = {counted(steps)} steps')

    for warning in start_warnings(c, dataset, teacher, net):
        log(warning)


# ----------------------------------------------------------------------------
# Warnings.


def start_warnings(
    c: EasyDict, dataset, teacher: torch.nn.Module | None, net: torch.nn.Module
) -> Iterator[str]:
    """Warnings and notes of a run's start, a line each: of its log, and of --dry-run.

    Args:
        net: the network that trains, or one like it on the meta device.
    """
    yield from data_warnings(c, dataset)
    if teacher is not None and (untaught := {*space_of(teacher).absent} - {*dataset.label_space.absent}):
        yield (
            f'Warning: the training set of {c.teacher} has no images of classes {listed(sorted(untaught))}, '
            'of which these data have some: its predictions for them were never trained.'
        )
    yield from architectures.missing_levels(c.network)
    yield from execution_warnings(c, net)
    yield from schedule_warnings(c)
    if warning := resolution.unresolved_gap(c, teacher):
        yield warning


def execution_warnings(c: EasyDict, net: torch.nn.Module) -> Iterator[str]:
    """Options that have no effect on this machine or with these processes."""
    device = distributed.get_device()
    if c.precision == 'fp16' and device.type == 'cpu':
        yield (
            'Warning: there is no GPU, and FP16 is for GPUs only: the network runs in FP32 here. '
            '--precision=fp32 or --precision=bf16 says so in the options.'
        )
    if c.get('shard') == 'optimizer' and distributed.get_world_size() == 1:
        yield 'Note: --shard=optimizer is for several processes; this is one.'
    if c.channels_last and not execution.keeps_channels_last(net, c.compiled, device.type == 'cuda'):
        yield f'Note: {execution.CHANNELS_LAST_IGNORED}'


def data_warnings(c: EasyDict, dataset) -> Iterator[str]:
    """What is unusual about the training set."""
    if c.dataset.get('cache') is False and not dataset.holds_latents:
        yield (
            f'Note: images are decoded anew in every epoch (--cache=False); kept, they would take '
            f'{dataset.decoded_bytes / 1e9:.3g} GB of this machine, in all loader processes together.'
        )

    # Labels without images, other files in the folder, images that lie on their side.
    if dataset.unused_labels:
        yield (
            f'Warning: {dataset.unused_labels} labels in dataset.json are of no image in {c.dataset.path}. '
            'Is it complete?'
        )
    if about := dataset.about_others():
        yield f'Note: {about}.'
    if dataset.unturned:
        yield (
            f'Note: {len(dataset.unturned)} images carry an EXIF orientation, which is ignored: training '
            'uses pixels as they are stored. dataset_tool.py --exif=apply turns them.'
        )
    if warning := dataset.label_space.warning():
        yield f'Warning: {warning}'


# ----------------------------------------------------------------------------
# Schedules against the length of the run.


def schedule_warnings(c: EasyDict) -> list[str]:
    """A line for each ramp that the run does not finish, for a T that rises too fast, and for the EMA."""
    return [f'Warning: {text}' for text in (*ramp_warnings(c), *edge_warnings(c), *ema_warnings(c))]


def ramp_warnings(c: EasyDict) -> list[str]:
    """Ramps of the learning rate and of a growing grid that are not over when the run ends."""
    found, end = [], f'when the run ends at {c.total_nimg / 1e3:g} kimg'
    if c.lr_rampup_nimg >= c.total_nimg:
        found.append(
            f'the learning rate is still rising {end}, at {c.total_nimg / c.lr_rampup_nimg:.2g} of its ramp. '
            f'Shorten --lr_rampup={c.lr_rampup_nimg / 1e3:g}, or lengthen --duration.'
        )

    # The last step may go beyond `total_nimg`, and the default of --schedule_steps goes with it.
    seen = -(-c.total_nimg // c.batch_size) * c.batch_size
    growth = c.loss.get('schedule_nimg') or 0
    if c.loss.get('N') is None and c.loss.get('s0') != c.loss.get('s1') and growth > seen:
        found.append(
            f'the grid has not grown to --s1={c.loss.s1} {end}. Shorten --schedule_steps='
            f'{growth // c.batch_size}, or lengthen --duration.'
        )
    return found


def edge_warnings(c: EasyDict) -> list[str]:
    """A number of edges T that is below T_end when the run ends, or rises faster than the network follows.

    A target is the network's own prediction one edge down, so what the teacher knows passes from edge to edge:
    the more edges a segment gains, the more steps that takes.
    """
    if c.loss.get('T_start') is None or c.loss.T_start == c.loss.T_end or not c.loss.T_anneal_kimg:
        return []
    # A single segment's top, at which it is sampled, is learned without a chain if it is anchored.
    if c.loss.S == 1 and c.loss.get('terminal_anchor'):
        return []
    found, loss, rise = [], c.loss, c.loss.T_anneal_kimg * 1e3
    last = ops.anneal_T(c.total_nimg, loss.T_start, loss.T_end, loss.T_anneal_kimg)
    if rise > c.total_nimg:
        found.append(
            f'T is {last} when the run ends at {c.total_nimg / 1e3:g} kimg, not --T_end={loss.T_end}. '
            f'Shorten --T_anneal_kimg={loss.T_anneal_kimg:g}, or lengthen --duration.'
        )

    steps, gained = min(rise, c.total_nimg) / c.batch_size, (last - loss.T_start) / loss.S
    taken = max(round(steps), 1)
    if steps < STEPS_PER_EDGE * gained:
        found.append(
            f'T rises from {loss.T_start} to {last} in {taken:,} step{"s" * (taken > 1)}, and the network '
            f'needs about {STEPS_PER_EDGE * gained:,.0f} to follow ({STEPS_PER_EDGE} for each edge that a '
            'segment gains). Lower --T_end, or lengthen --duration.'
        )
    return found


def ema_warnings(c: EasyDict) -> list[str]:
    """An EMA that averages next to nothing, or that is long for the run. At most one line."""
    halflife, total, ratio = c.ema_halflife_nimg, c.total_nimg, c.ema_rampup_ratio
    steps = halflife / c.batch_size
    if steps < 100 and halflife < SHORTEST_EMA * total:
        return [
            f'an EMA with a half-life of {steps:.3g} steps averages next to nothing. --ema is in Mimg; '
            '--ema=500kimg names another unit.'
        ]

    # Longer than the run, or mostly what training began with.
    remaining = initial_share(halflife, ratio, total, c.batch_size)
    if halflife <= total and remaining <= 0.01:
        return []
    text = f'the half-life of the EMA is {halflife / 1e3:,g} kimg, and the run {total / 1e3:,g} kimg: '
    if remaining > 0.01:
        text += (
            f'at the end {remaining:.0%} of the average will still be the weights that training began with'
        )
    else:
        text += f'--ema_rampup={ratio:g} alone limits it, to {ratio * total / 1e3:,.4g} kimg at the end'
    return [f'{text}. Shorten --ema{"" if ratio else ", or set --ema_rampup=0.05"}.']


def initial_share(halflife: float, ratio: float | None, total: int, batch: int) -> float:
    """Weight in the EMA, after `total` images, of the weights that it began with.

    With a limit of `ratio` n on the half-life after n images, these are the weights after the first step, and
    lose d ln w = −ln 2 dn / (ratio n) until the limit is at the half-life.
    """
    if not ratio:
        return 0.5 ** (total / halflife)
    knee = min(halflife / ratio, total)
    if knee <= batch:
        return 0.5 ** ((total - batch) / halflife) if total > batch else 0.0
    return (batch / knee) ** (math.log(2) / ratio) * 0.5 ** ((total - knee) / halflife)


# ----------------------------------------------------------------------------
# Resuming.


def describe_resume(log: RunLog, c: EasyDict, progress, made_by: int, world_size: int) -> None:
    """Log where a run resumes, and whether that can be exact. The state was saved by `made_by` processes."""
    log(f'Resumed from {c.resume} at {progress.nimg / 1e3:.1f} kimg.')
    if made_by != world_size:
        log(
            f'Warning: {made_by} process(es) saved that state, and now there are {world_size}: every image '
            'is seen as before, but sums are rounded differently, so the result will not be bit for bit '
            'that of an uninterrupted run.'
        )
