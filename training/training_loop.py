"""The training loop of teachers and students: the step, the end of a tick, and the loop around them.

`setup` builds what they work on, `run_events` holds how a run begins and stops, `evaluation` and `tick_stats`
what the end of a tick evaluates and reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from data.dataset import ImageFolderDataset, InfiniteSampler
from data.prefetcher import Prefetcher
from dnnlib import EasyDict
from metrics.validator import Validator
from torch_utils import distributed, misc, training_stats
from torch_utils.preemption import PreemptionHandler, WorkersIgnoreSignals
from training import checkpoint
from training.announcements import describe_end
from training.evaluation import build_validator, evaluate, evaluate_at_start, show_samples
from training.objectives.loss import State
from training.profiling import StepProfile
from training.rng import SampleRng
from training.run_events import give_up, nothing_to_do, start_log, stop_here
from training.run_files import is_due
from training.setup import Run, profiled_networks, set_up
from training.tick_stats import Clock, network_stats, tick_line, tick_stats
from training.weight_update import WeightUpdate, learning_rate

# ----------------------------------------------------------------------------
# The step. Nothing here waits for the device.


def train_step(run: Run, prefetcher: Prefetcher, profile: StepProfile) -> None:
    """One optimizer step: gradients of the whole batch, new weights, new averages."""
    c, state, progress = run.c, run.loss_state, run.progress

    # The objective's schedule (its grid, its stage) follows from the images seen so far.
    state.begin_step(progress.nimg)
    run.averages.begin_step()
    # One network trains: the student, or in some steps of some objectives the auxiliary network.
    trains, peak = (run.auxiliary, c.loss.aux_lr) if state.trains_auxiliary else (run.student, None)
    for network in run.trained:
        network.begin_step(trains is network)

    # Gradients accumulate over micro-batches; with the last one they are averaged over processes.
    for i in range(run.accumulation_rounds):
        with profile.part('data'):
            batch = next(prefetcher)
        with profile.part('gradients'), trains.gradients.round(last=i == run.accumulation_rounds - 1):
            first = progress.nimg + distributed.get_rank() * run.rank_batch + i * run.batch_gpu
            rng, scale = SampleRng(c.seed, first, run.batch_gpu, run.device), 1 / run.rank_batch
            accumulate_gradients(
                run.student.evaluated,
                run.objective,
                state,
                batch,
                rng,
                trains.update,
                scale,
                *run.preprocessing,
            )

    # A step whose gradient is not finite leaves the weights as they are.
    with profile.part('optimizer'):
        run.averages.before_update()
        trains.update.step(learning_rate(c, progress.nimg, peak))
        state.end_step()
    progress.nimg += c.batch_size
    with profile.part('averages'):
        run.averages.update(progress.nimg, c.batch_size)


def accumulate_gradients(
    net,
    objective,
    loss_state: State,
    batch,
    rng: SampleRng,
    update: WeightUpdate,
    scale: float,
    encoder,
    augment_pipe=None,
    augment_dim: int = 0,
) -> None:
    """Add the gradient of `scale` × the sum of losses over a micro-batch.

    Args:
        batch: raw images [N, C, H, W] and labels [N, label_dim], on the host.
        encoder, augment_pipe, augment_dim: see `setup.Preprocessing`.
    """
    # Encode the images: pixels in [-1, 1], or latents that the encoder samples.
    raw, labels = (t.to(rng.device, non_blocking=True) for t in batch)
    noise_shape = encoder.noise_shape(raw.shape[1:])
    images = encoder.encode_latents(raw, rng.normal('latents', noise_shape) if noise_shape else None)

    # Augment. Without a pipe the labels are zeros, 'not augmented': every parameter has a gradient.
    augment_labels = images.new_zeros(len(images), augment_dim) if augment_dim else None
    if augment_pipe is not None:
        images, augment_labels = augment_pipe(images, generator=rng.generator('augment'))

    # Forward and backward pass.
    loss = objective.loss(net, images, labels, rng, loss_state, augment_labels)
    name = 'auxiliary' if loss_state.trains_auxiliary else objective.NAME
    training_stats.report(f'Loss/{name}', loss)
    (update.scaled_sum(loss) * scale).backward()


# ----------------------------------------------------------------------------
# The end of a tick.


def end_of_tick(
    run: Run,
    clock: Clock,
    prefetcher: Prefetcher,
    validator: Validator | None,
    stop: PreemptionHandler,
    done: bool,
) -> bool:
    """Validate, report, save, and begin the next tick.

    Returns: False if a signal asked to stop during validation; then all of this is still due.
    """
    c, progress, now, fids = run.c, run.progress, time.monotonic(), {}

    # Validate.
    if validator and progress.tick and (done or progress.tick % c.validation.every == 0):
        fids = evaluate(validator, run, stop)
        if fids is None:
            return False
    progress.fid = next(iter(fids.values()), None)

    # Report.
    stats = training_stats.collect()
    stats |= network_stats(run.trained, run.averages)
    stats |= tick_stats(run, clock, now, prefetcher.data_wait())
    remaining = clock.remaining(now, progress.nimg, c.total_nimg)
    run.log(tick_line(stats, f'Loss/{run.objective.NAME}', remaining))
    run.log.stats(stats)

    # Save.
    if c.sample_grid and is_due(c.snapshot_ticks, progress, done):
        show_samples(run)
    run.files.save(progress, checkpoint.snapshot_metadata(c, progress.nimg), fids, done)
    if not done:
        progress.begin_tick()
        clock.tick_start = time.monotonic()
        clock.maintenance = clock.tick_start - now
        clock.steady = clock.steady or (clock.tick_start, progress.nimg)
    return True


# ----------------------------------------------------------------------------
# The loop.


def prefetch(run: Run, ignore_signals: WorkersIgnoreSignals) -> Prefetcher:
    """This process's micro-batches, from the images seen on, by workers that ignore signals."""
    c, ranks = run.c, dict(rank=distributed.get_rank(), num_replicas=distributed.get_world_size())
    sampler = InfiniteSampler(len(run.dataset), c.batch_size, **ranks, seed=c.seed, start=run.progress.nimg)
    return Prefetcher(
        run.dataset, sampler, run.batch_gpu, c.workers, run.device, worker_init_fn=ignore_signals
    )


def training_loop(
    c: EasyDict,
    run_dir: str,
    dataset: ImageFolderDataset,
    teacher: torch.nn.Module | None = None,
    state: dict | None = None,
) -> bool:
    """Train until `c.total_nimg` images are seen or a signal asks to stop.

    Args:
        c: the configuration that train.py prints with --dry-run and writes to training_options.json.
        run_dir: existing folder for everything that the run writes.
        dataset: the training set that `c.dataset` describes.
        teacher: frozen network to distill, if `c.objective` needs one.
        state: training state to resume from; it is emptied.
    Returns: whether training is finished. If not, a state and `preempted.json` are in `run_dir`.
    """
    start_time = time.monotonic()
    run = set_up(c, run_dir, dataset, teacher, state)
    progress, log, rank = run.progress, run.log, distributed.get_rank()
    if nothing_to_do(run):
        return True

    # Build what feeds, stops and profiles the steps.
    hosts = distributed.AsyncAllReduce()
    profile_steps = c.profile_steps if rank == 0 else 0
    networks = profiled_networks(run)
    profile = StepProfile(profile_steps, run_dir, run.device, networks, say=log)
    with WorkersIgnoreSignals() as ignore_signals, PreemptionHandler(hosts) as stop, profile:
        prefetcher = prefetch(run, ignore_signals)
        # After the workers, which must not inherit the log's threads and sockets.
        start_log(run)

        # Evaluate before the first step, if that is configured.
        validator = build_validator(run) if c.validation else None
        if validator and not progress.begun and evaluate_at_start(validator, run, stop) is None:
            return stop_here(run, stop, hosts)
        progress.begun = True

        # Train.
        log(f'Training for {c.total_nimg / 1e3:g} kimg...')
        now = time.monotonic()
        clock = Clock(start_time, now, now - start_time)
        with misc.garbage_by_hand() as collect_garbage:
            if not repeat_steps(run, clock, prefetcher, validator, stop, hosts, profile, collect_garbage):
                return False

    hosts.close()
    log.close()
    describe_end(log, c, run_dir, dataset.label_space)
    log('Done.')
    return True


def repeat_steps(
    run: Run,
    clock: Clock,
    prefetcher: Prefetcher,
    validator: Validator | None,
    stop: PreemptionHandler,
    hosts: distributed.AsyncAllReduce,
    profile: StepProfile,
    collect_garbage: Callable[[int], None],
) -> bool:
    """Steps and ends of ticks until training is finished (True) or stopped by a signal (False)."""
    c, progress = run.c, run.progress
    skips = misc.AsyncScalar(run.device)
    done = False
    while not done:
        # Hosts learn of each other's signals and skipped steps one step late, so that none waits for another.
        stopping, skipped = hosts.exchange([stop.here(), skips.read(run.consecutive_skips)])
        if stopping:
            return stop_here(run, stop, hosts)
        if skipped >= c.max_bad_steps:
            give_up(run, skipped)

        # A run that was stopped at the end of a tick resumes with the work that is due there.
        if not progress.due:
            train_step(run, prefetcher, profile)
            collect_garbage(progress.nimg // c.batch_size)
            profile.step(progress.nimg)
            run.log.advance(progress.nimg)

        # The first tick ends after the first step, as in EDM.
        done = progress.nimg >= c.total_nimg
        tick_is_full = progress.nimg >= progress.tick_start_nimg + c.kimg_per_tick * 1e3
        progress.due = done or progress.tick == 0 or tick_is_full
        if progress.due and not end_of_tick(run, clock, prefetcher, validator, stop, done):
            return stop_here(run, stop, hosts)
    return True
