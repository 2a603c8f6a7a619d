"""The training loop, for teachers and students alike: the step, the end of a tick, and what repeats them.
`setup` builds what they work on."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil
import torch

from data.dataset import ImageFolderDataset, InfiniteSampler
from data.prefetcher import Prefetcher
from dnnlib import EasyDict, NotFinite
from metrics.validator import Validator
from torch_utils import distributed, misc, training_stats
from torch_utils.preemption import PreemptionHandler, WorkersIgnoreSignals
from training import checkpoint, execution, run_files
from training.objectives.loss import State
from training.phema import WeightAverages
from training.profiling import StepProfile
from training.rng import SampleRng
from training.run_files import Progress
from training.run_log import RunLog
from training.setup import Run, profiled_networks, set_up
from training.weight_update import WeightUpdate

# ----------------------------------------------------------------------------
# The step. Nothing here waits for the device.


def train_step(run: Run, feed: Prefetcher, profile: StepProfile) -> None:
    """One optimizer step: gradients over all micro-batches of all processes, then new weights and new
    averages."""
    c, progress = run.c, run.progress

    # The objective's schedule (its grid, its stage) follows from the images seen so far.
    run.loss_state.begin_step(progress.nimg)
    run.averages.let_weights_change()
    run.flat.weights.grad.zero_()

    # Gradients accumulate over micro-batches; with the last one they are averaged over processes.
    for i in range(run.rounds):
        first = progress.nimg + distributed.get_rank() * run.rank_batch + i * run.batch_gpu
        with profile.part('data'):
            batch = next(feed)
        with profile.part('gradients'), misc.gradient_sync(run.ddp, i == run.rounds - 1):
            rng = SampleRng(c.seed, first, run.batch_gpu, run.device)
            accumulate_gradients(
                run.ddp,
                run.objective,
                run.loss_state,
                batch,
                rng,
                run.update,
                1 / run.rank_batch,
                run.encoder,
                run.augment_pipe,
                c.network.kwargs.get('augment_dim', 0),
            )

    # A step whose gradient is not finite leaves the weights as they are.
    with profile.part('optimizer'):
        run.update.step(learning_rate(c, progress.nimg))
        run.loss_state.end_step()
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
    """Forward and backward pass for a batch of (raw images [N, C, H, W], labels [N, label_dim]); the loss is
    `scale` × the sum over images.

    A network with augmentation labels gets zeros, 'not augmented', where there is no `augment_pipe`: DDP
    wants every parameter used.
    """
    raw, labels = (t.to(rng.device, non_blocking=True) for t in batch)
    noise_shape = encoder.noise_shape(raw.shape[1:])
    images = encoder.encode_latents(raw, rng.normal('latents', noise_shape) if noise_shape else None)
    augment_labels = images.new_zeros(len(images), augment_dim) if augment_dim else None
    if augment_pipe is not None:
        images, augment_labels = augment_pipe(images, generator=rng.generator('augment'))
    loss = objective.loss(net, images, labels, rng, loss_state, augment_labels)
    training_stats.report(f'Loss/{objective.NAME}', loss)
    (update.mark_nonfinite(loss) * scale).backward()


def learning_rate(c: EasyDict, nimg: int) -> float:
    """Of the step that follows `nimg` images."""
    return misc.learning_rate(c.lr, nimg, c.total_nimg, c.lr_rampup_nimg, c.lr_schedule, c.lr_ref_nimg)


# ----------------------------------------------------------------------------
# The end of a tick.


@dataclass
class Clock:
    """When things began, by `time.monotonic`, and how many seconds went into evaluating and saving before the
    tick."""

    start: float
    tick_start: float
    maintenance: float


def end_of_tick(
    run: Run, clock: Clock, feed: Prefetcher, validator: Validator | None, stop: PreemptionHandler, done: bool
) -> bool:
    """Validate, report, save, and go on to the next tick. Returns: False, with all of that still to do, where
    a signal asked to stop meanwhile."""
    c, progress, now, fids = run.c, run.progress, time.monotonic(), {}

    # Validate.
    if validator and progress.tick and (done or progress.tick % c.validation.every == 0):
        fids = evaluate(validator, run, stop)
        if fids is None:
            return False
    progress.fid = next(iter(fids.values()), None)

    # Report.
    stats = training_stats.collect()
    stats |= network_stats(run.update, run.averages)
    stats |= tick_stats(
        progress,
        c,
        run.averages,
        clock.start,
        clock.tick_start,
        run.start_nimg,
        clock.maintenance,
        now,
        run.device,
        feed.data_wait(),
    )
    sec_per_image = (now - clock.start) / max(progress.nimg - run.start_nimg, 1)
    run.log(tick_line(stats, f'Loss/{run.objective.NAME}', (c.total_nimg - progress.nimg) * sec_per_image))
    run.log.stats(stats)

    # Save.
    run.files.save(progress, checkpoint.snapshot_metadata(c, progress.nimg), fids, done)
    if not done:
        progress.begin_tick()
        clock.tick_start = time.monotonic()
        clock.maintenance = clock.tick_start - now
    return True


# ----------------------------------------------------------------------------
# The loop.


def training_loop(
    c: EasyDict,
    run_dir: str,
    dataset: ImageFolderDataset,
    teacher: torch.nn.Module | None = None,
    state: dict | None = None,
) -> bool:
    """Train until `c.total_nimg` images were seen, or until a signal asks to stop.

    Args:
        c: the configuration that train.py prints with --dry-run and writes to training_options.json.
        run_dir: existing folder for everything that the run writes.
        dataset: the training set that `c.dataset` describes.
        teacher: frozen network to distil, where `c.objective` needs one.
        state: training state to go on from; it is emptied.
    Returns: whether the training is finished. Where it is not, a state and `preempted.json` are in `run_dir`.
    """
    start_time = time.monotonic()
    run = set_up(c, run_dir, dataset, teacher, state)
    progress, log, rank = run.progress, run.log, distributed.get_rank()
    if run.resumed and progress.nimg >= c.total_nimg and not progress.due:
        log(f'Nothing to do: {c.total_nimg / 1e3:g} kimg is all that it was to see.')
        return True

    hosts, bad_reading = distributed.AsyncAllReduce(), misc.AsyncScalar(run.device)
    sampler = InfiniteSampler(
        len(dataset),
        c.batch_size,
        rank=rank,
        num_replicas=distributed.get_world_size(),
        seed=c.seed,
        start=progress.nimg,
    )
    profile = StepProfile(
        c.profile_steps if rank == 0 else 0,
        run_dir,
        run.device,
        profiled_networks(run.net, run.teacher),
        say=log,
    )
    with WorkersIgnoreSignals() as shield, PreemptionHandler(hosts) as stop, profile:
        feed = Prefetcher(dataset, sampler, run.batch_gpu, c.workers, run.device, worker_init_fn=shield)
        start_log(run)  # after the workers, which must not inherit its threads and sockets
        validator = build_validator(run) if c.validation else None
        if validator and not progress.begun and evaluate_at_start(validator, run, stop) is None:
            return stop_here(run, stop, hosts)
        progress.begun = True
        log(f'Training for {c.total_nimg / 1e3:g} kimg...')
        now = time.monotonic()
        clock = Clock(start_time, now, now - start_time)
        while True:
            # Hosts learn of each other's signals one step late, so that none waits for another.
            stopping, bad_in_a_row = hosts.exchange([stop.here(), bad_reading.read(run.update.bad_in_a_row)])
            if stopping:
                return stop_here(run, stop, hosts)
            if bad_in_a_row >= c.max_bad_steps:
                give_up(run, bad_in_a_row)

            # A run that was stopped at the end of a tick resumes with the work that is due there.
            if not progress.due:
                train_step(run, feed, profile)
                profile.step(progress.nimg)
                log.advance(progress.nimg)

            # The first tick ends after the first step, as in EDM.
            done = progress.nimg >= c.total_nimg
            progress.due = (
                done
                or progress.tick == 0
                or progress.nimg >= progress.tick_start_nimg + c.kimg_per_tick * 1e3
            )
            if progress.due and not end_of_tick(run, clock, feed, validator, stop, done):
                return stop_here(run, stop, hosts)
            if done:
                break

    hosts.close()
    log.close()
    log('Done.')
    return True


def start_log(run: Run) -> None:
    """Begin statistics, W&B and TensorBoard, or go on with them where the run stands."""
    c, progress = run.c, run.progress
    redone = int(
        progress.due or not progress.begun
    )  # evaluations at this very point, of which a killed run may have recorded some
    run.log.start(
        c.total_nimg,
        resumed_at=progress.nimg - redone if run.resumed else None,
        wandb=c.wandb and dict(c.wandb, id=progress.wandb_id),
        config=c,
        tensorboard=c.tensorboard,
    )
    progress.wandb_id = distributed.broadcast_object(run.log.wandb_id) or progress.wandb_id


def build_validator(run: Run) -> Validator:
    """What evaluates the averages in training. A resumed run makes the images of interrupted evaluations
    again."""
    c, net = run.c, run.net
    options = EasyDict(c.validation, overwrite=c.validation.overwrite or run.resumed)
    image_shape = [net.img_channels, net.img_resolution, net.img_resolution]
    return Validator(
        options, run.dataset, run.dir, run.device, image_shape, run.dataset.label_space, c.encoder
    )


# ----------------------------------------------------------------------------
# Stopping.


def stop_here(run: Run, stop: PreemptionHandler, hosts: distributed.AsyncAllReduce) -> bool:
    """Save where the run is, in the middle of a tick or not, and leave a note; returns that the training is
    not finished."""
    progress, files, log = run.progress, run.files, run.log
    hosts.close()
    signal_name = next(name for name in distributed.gather_objects(stop.requested) if name)
    log(f'{signal_name}: stopping at {progress.nimg / 1e3:.1f} kimg.')
    saved = files.save_state(progress, progress.position())
    state = saved or run_files.newest_state(progress)
    if state:  # else there is nothing to come back to
        files.leave_note(signal_name, progress.nimg, state)
    log(
        f'{f"Saved {saved}" if saved else "The state could not be saved"}; '
        f'{f"--resume={files.run_dir} goes on from {state}" if state else "there is none to resume from"}.'
    )
    log.close()
    return False


def give_up(run: Run, bad_in_a_row: int) -> None:
    """End all processes because the numbers stay broken; nothing is saved, so that the states that are there
    stay."""
    run.log.close(exit_code=1)
    newest = run_files.newest_state(run.progress)
    cure = f'resume from {newest}' if newest else 'start again'
    distributed.fail_together(
        f'{bad_in_a_row} steps in a row had a loss or gradient that is not finite, up to {run.progress.nimg / 1e3:.1f} kimg; none of them changed '
        f'the weights. Lower --lr, set --grad-clip, or use --precision=bf16 or fp32, and {cure}.'
    )


# ----------------------------------------------------------------------------
# Evaluating.


def evaluate(validator: Validator, run: Run, stop: PreemptionHandler) -> dict | None:
    """FID of each average of --val_emas, by name, the same on all processes; None, and nothing recorded,
    where a signal asked to stop meanwhile.

    An average whose images are not finite has None for its FID. That is recorded and told, and training goes
    on.
    """
    c, nimg, records = run.c, run.progress.nimg, {}
    for name in c.validation.emas:
        net = sampling_network(run, name)
        records[name] = validator.run(
            net, nimg=nimg, ema=name, metadata=checkpoint.snapshot_metadata(c, nimg), stop=stop
        )
        if records[name] is None:
            return None
    for name, record in records.items():
        _, grid = run.files.attempt(picture, validator, sampling_network(run, name), nimg, name, run.log)
        run.log.evaluation(record, grid)
    return distributed.broadcast_object({name: record['fid'] for name, record in records.items()})


def sampling_network(run: Run, name: str) -> torch.nn.Module:
    """What makes images with the average of that name. Copies on the device exist one at a time."""
    average = execution.run_with(run.averages.on_device(name), channels_last=run.c.channels_last)
    return run.loss_state.sampling_network(average)


def picture(validator: Validator, net, nimg: int, name: str, log: RunLog) -> str | None:
    """The path of `sample_grid`; None, and a line in the log, where images of it are not finite."""
    try:
        return validator.sample_grid(net, nimg, name)
    except NotFinite as error:
        log(f'Warning: no picture of samples ({name}): {error}.')
        return None


def evaluate_at_start(validator: Validator, run: Run, stop: PreemptionHandler) -> dict | None:
    """What --val_teacher and --val_at_start ask for; None where a signal asked to stop meanwhile."""
    if run.c.validation.teacher and run.teacher is not None:
        record = validator.run(run.teacher, nimg=0, ema='teacher', steps=None, stop=stop)
        if record is None:
            return None
        run.log.evaluation(record)
    return evaluate(validator, run, stop) if run.c.validation.at_start else {}


# ----------------------------------------------------------------------------
# Reporting.


def network_stats(update: WeightUpdate, averages: WeightAverages) -> dict[str, dict]:
    """How far each average is from the weights, relative to them, and what became of broken steps. Waits for
    the device."""
    weights = update.weights.detach()
    vectors = {name: vector.detach().to(weights.device) for name, vector in averages.vectors.items()}
    values = {
        f'EMA/{name}_distance': torch.dist(vector, weights) / weights.norm()
        for name, vector in vectors.items()
    }
    values |= {'Progress/loss_scale': update.scale, 'Progress/bad_steps': update.bad_steps}
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
    """Progress, timing and resources of a tick, in the form of `training_stats.collect`. All times are in
    seconds."""
    tick_time, seen = now - tick_start_time, progress.nimg - max(progress.tick_start_nimg, start_nimg)
    a_second = lambda amount: (
        amount / tick_time if tick_time > 0 else 0.0
    )  # clocks of machines that were put to sleep may stand still
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
        'Timing/images_per_sec': a_second(seen),
        'Timing/maintenance_sec': maintenance_time,
        'Timing/data_wait_share': a_second(data_wait),
        'Resources/cpu_mem_gb': psutil.Process(os.getpid()).memory_info().rss / 2**30,
        'Resources/peak_gpu_mem_gb': torch.cuda.max_memory_allocated(device) / 2**30
        if device.type == 'cuda'
        else 0,
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
