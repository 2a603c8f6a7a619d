"""The training loop, for teachers and students alike. Read it from top to bottom: set-up, step, tick, save."""
from __future__ import annotations

import os
import time

import psutil
import torch

from data.dataset import ImageFolderDataset, InfiniteSampler
from data.feed import Feed
from data.label_space import LabelSpace, listed, space_of
from dnnlib import EasyDict, NotFinite, UserError
from dnnlib.text import printable
from metrics.validator import Validator
from torch_utils import distributed, misc, training_stats
from torch_utils.flat import FlatParameters
from torch_utils.preemption import StopRequest, WorkerShield
from training import checkpoint, execution, resolution, run_files
from training.draws import SampleDraws, derive_seed
from training.networks import encoders
from training.networks.augment import AugmentPipe
from training.objectives import OBJECTIVES
from training.objectives.loss import DIFFUSION_LOSSES, Loss
from training.phema import WeightAverages
from training.profiling import StepProfile
from training.run_log import RunLog
from training.weight_update import WeightUpdate


def training_loop(c: EasyDict, run_dir: str, dataset: ImageFolderDataset, teacher: torch.nn.Module | None = None, state: dict | None = None) -> bool:
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
    device, rank, world_size = distributed.get_device(), distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(c.seed)
    torch.backends.cudnn.benchmark = c.cudnn_benchmark

    # Data. Sample g of the run is the same image with the same noise, whichever process handles it.
    rank_batch = c.batch_size // world_size
    batch_gpu = min(c.batch_gpu or rank_batch, rank_batch)
    rounds = rank_batch // batch_gpu

    # Networks, loss, optimiser, averages.
    misc.allow_tf32(c.tf32)
    teacher = execution.in_precision(teacher, c.precision).to(device) if teacher is not None else None
    net = execution.in_precision(build_network(c, teacher), c.precision).to(device).train()
    loss_fn = build_loss(c, teacher, device)
    encoder = encoders.build(c.encoder)
    augment_pipe = AugmentPipe(p=c.augment) if c.augment > 0 else None
    flat = FlatParameters(net)
    loss_fn.attach(net, flat)
    update = WeightUpdate(flat, tuple(c.betas), c.eps, c.loss_scaling, c.grad_clip, radam=c.optim == 'radam')
    averages = WeightAverages(net, flat, c.ema_halflife_nimg, c.ema_rampup_ratio, c.phema_stds, 'cpu' if c.ema_device == 'cpu' else None)
    speed_up(c, net, teacher, averages, loss_fn)
    torch.manual_seed(derive_seed(c.seed, 'process', rank))  # for whatever draws without `SampleDraws`

    # Where we are.
    progress, made_by = EasyDict(nimg=0, tick=0, tick_start_nimg=0, due=False, begun=False, fid=None, states={}, names={}, wandb_id=None), world_size
    if state is not None:
        earlier, made_by = run_files.restore(c.resume, state, net, update, averages, loss_fn, device)
        progress.update(earlier)
    start_nimg = progress.nimg
    log = RunLog(run_dir, enabled=rank == 0)
    files = run_files.RunFiles(c, run_dir, net, update, averages, loss_fn, log)
    describe_run(log, c, net, dataset, teacher, rounds, batch_gpu)
    if warning := resolution.unresolved_gap(c, teacher):
        log(warning)
    files.tidy()
    if state is not None:
        describe_resume(log, c, progress, made_by, world_size)
        if start_nimg >= c.total_nimg and not progress.due:
            log(f'Nothing to do: {c.total_nimg / 1e3:g} kimg is all that it was to see.')
            return True

    # Processes.
    ddp = net
    if world_size > 1:  # buffers are constants
        device_ids = [device] if device.type == 'cuda' else None
        ddp = torch.nn.parallel.DistributedDataParallel(net, device_ids=device_ids, broadcast_buffers=False)
    files.check_weights()
    hosts, bad_reading = distributed.HostAgreement(), misc.LateReading(device)
    sampler = InfiniteSampler(len(dataset), c.batch_size, rank=rank, num_replicas=world_size, seed=c.seed, start=start_nimg)
    profile = StepProfile(c.profile_steps if rank == 0 else 0, run_dir, device, profiled_networks(net, teacher), say=log)
    with WorkerShield() as shield, StopRequest(hosts) as stop, profile:
        feed = Feed(dataset, sampler, batch_gpu, c.workers, device, worker_init_fn=shield)
        redone = int(progress.due or not progress.begun)  # the evaluations at this very point, of which a killed run may have recorded some
        log.start(c.total_nimg, resumed_at=start_nimg - redone if state is not None else None, wandb=c.wandb and dict(c.wandb, id=progress.wandb_id),
                  config=c, tensorboard=c.tensorboard)  # after the workers, which must not inherit its threads and sockets
        progress.wandb_id = distributed.broadcast_object(log.wandb_id) or progress.wandb_id
        validator = build_validator(c, run_dir, dataset, net, device, resumed=state is not None) if c.validation else None
        if validator and not progress.begun and evaluate_at_start(validator, c, averages, loss_fn, teacher, files, stop) is None:
            return stop_here(progress, files, log, stop, hosts)
        progress.begun = True
        log(f'Training for {c.total_nimg / 1e3:g} kimg...')
        tick_start_time, maintenance_time = time.monotonic(), time.monotonic() - start_time
        while True:
            # The hosts hear of each other a step late, so that none waits.
            stopping, bad_in_a_row = hosts.exchange([stop.here(), bad_reading.read(update.bad_in_a_row)])
            if stopping:
                return stop_here(progress, files, log, stop, hosts)
            if bad_in_a_row >= c.max_bad_steps:
                give_up(c, progress, log, bad_in_a_row)

            # One optimiser step. A run that was stopped before the work at the end of a tick goes on with that work.
            if not progress.due:
                loss_fn.begin_step(progress.nimg)
                averages.let_weights_change()
                flat.weights.grad.zero_()
                for round_idx in range(rounds):
                    with misc.gradient_sync(ddp, round_idx == rounds - 1):
                        first = progress.nimg + rank * rank_batch + round_idx * batch_gpu
                        with profile.part('data'):
                            batch = next(feed)
                        with profile.part('gradients'):
                            accumulate_gradients(ddp, loss_fn, batch, SampleDraws(c.seed, first, batch_gpu, device), update, 1 / rank_batch,
                                                 encoder, augment_pipe, c.network.kwargs.get('augment_dim', 0))
                with profile.part('optimiser'):
                    update.step(learning_rate(c, progress.nimg))
                    loss_fn.end_step()
                progress.nimg += c.batch_size
                with profile.part('averages'):
                    averages.update(progress.nimg, c.batch_size)
                profile.step(progress.nimg)
                log.advance(progress.nimg)

            # A tick: validate, report, save. The first one follows the first step, as in EDM.
            done = progress.nimg >= c.total_nimg
            progress.due = done or progress.tick == 0 or progress.nimg >= progress.tick_start_nimg + c.kimg_per_tick * 1e3
            if not progress.due:
                continue
            now, fids = time.monotonic(), {}
            if validator and progress.tick and (done or progress.tick % c.validation.every == 0):
                fids = evaluate(validator, c, averages, loss_fn, progress.nimg, files, stop)
                if fids is None:  # asked to stop in the middle
                    return stop_here(progress, files, log, stop, hosts)
            progress.fid = next(iter(fids.values()), None)
            stats = training_stats.collect() | network_stats(update, averages) | tick_stats(
                progress, c, averages, start_time, tick_start_time, start_nimg, maintenance_time, now, device, feed.waited())
            log(tick_line(stats, f'Loss/{loss_fn.name}', (c.total_nimg - progress.nimg) * (now - start_time) / max(progress.nimg - start_nimg, 1)))
            log.stats(stats)
            files.save(progress, checkpoint.snapshot_metadata(c, progress.nimg), fids, done)
            if done:
                break
            progress.update(run_files.next_tick(progress))
            tick_start_time = time.monotonic()
            maintenance_time = tick_start_time - now

    hosts.close()
    log.close()
    log('Done.')
    return True

#----------------------------------------------------------------------------
# The step. Nothing here waits for the device.

def accumulate_gradients(net, loss_fn, batch, draws: SampleDraws, update: WeightUpdate, scale: float, encoder, augment_pipe=None,
                         augment_dim: int = 0) -> None:
    """Forward and backward pass for a batch of (raw images [N, C, H, W], labels [N, label_dim]); the loss is `scale` × the sum over images.

    A network with augmentation labels gets zeros, 'not augmented', where there is no `augment_pipe`: DDP wants every parameter used.
    """
    raw, labels = (t.to(draws.device, non_blocking=True) for t in batch)
    noise_shape = encoder.noise_shape(raw.shape[1:])
    images = encoder.encode_latents(raw, draws.normal('latents', noise_shape) if noise_shape else None)
    augment_labels = images.new_zeros(len(images), augment_dim) if augment_dim else None
    if augment_pipe is not None:
        images, augment_labels = augment_pipe(images, generator=draws.generator('augment'))
    loss = loss_fn(net, images, labels, draws, augment_labels)
    training_stats.report(f'Loss/{loss_fn.name}', loss)
    (update.poison(loss) * scale).backward()


def learning_rate(c: EasyDict, nimg: int) -> float:
    """Of the step that follows `nimg` images."""
    return misc.learning_rate(c.lr, nimg, c.total_nimg, c.lr_rampup_nimg, c.lr_schedule, c.lr_ref_nimg)

#----------------------------------------------------------------------------
# Set-up.

def build_network(c: EasyDict, teacher: torch.nn.Module | None) -> torch.nn.Module:
    """The network to train: from the teacher's weights where there is one, or from those of --transfer that fit."""
    net = checkpoint.NETWORKS[c.network.class_name](**c.network.kwargs)
    if teacher is not None:
        net.load_state_dict(teacher.state_dict())
        net.sigma_min, net.sigma_max = teacher.sigma_min, teacher.sigma_max
    net.requires_grad_(True)
    if hasattr(net, 'logvar_linear') and c.loss.get('kind') != 'edm2':  # EDM2's uncertainty: DDP wants every parameter used that has a gradient
        net.logvar_linear.requires_grad_(False)
    if c.transfer:
        origin, ours = checkpoint.load_network(c.transfer), LabelSpace.recorded(net.label_dim, c.dataset)
        source, own = origin.state_dict(), net.state_dict()
        if origin.label_dim == ours.dim and space_of(origin).differs(ours):
            distributed.print0(printable(f'Warning: --transfer={c.transfer} was trained with {space_of(origin)}, and these data have {ours}: '
                                         'what it learned of labels means something else here.'))
        fitting = {name: tensor for name, tensor in source.items() if name in own and own[name].shape == tensor.shape}
        if not fitting:
            raise UserError(f'--transfer={c.transfer} has no tensor that fits this network by name and shape')
        net.load_state_dict(fitting, strict=False)
        if len(fitting) < len(own):
            distributed.print0(f'Warning: {len(fitting)} of this network\'s {len(own)} tensors are in --transfer={c.transfer} in the same shape; the '
                               'others start at random. (Options such as --arch and --cbase are not taken from the snapshot.)')
    return net


def speed_up(c: EasyDict, net: torch.nn.Module, teacher: torch.nn.Module | None, averages: WeightAverages, loss_fn: Loss) -> None:
    """Let the networks run as the configuration says. Compilation itself waits for the first calls."""
    options = dict(channels_last=c.channels_last, checkpoint_activations=c.checkpoint_activations, compiled=c.compiled)
    at_hand = [average for average in averages.networks.values() if execution.is_on_gpu(average) == execution.is_on_gpu(net)]
    for network in (net, *at_hand, *loss_fn.networks(), *([] if teacher is None else [teacher])):
        execution.run_with(network, **options)
    if teacher is not None and loss_fn.sampled(net) is net:  # else snapshots hold the teacher too, as it is
        execution.hold_in_half(teacher)
    loss_fn.few_sizes = c.compiled


def build_loss(c: EasyDict, teacher: torch.nn.Module | None, device: torch.device):
    """The loss function of `c.objective`."""
    if (objective := OBJECTIVES[c.objective]).loss:
        options = dict(c.loss)
        if 'lpips' in options:
            from metrics import lpips
            weights = options.pop('lpips')
            with distributed.main_process_first():
                options['perceptual'] = lpips.load(weights, device) if options['cm_loss'] == 'lpips' else None
        return objective.loss_class()(*([teacher] if objective.teacher else []), **options)
    return DIFFUSION_LOSSES[c.loss.kind](**{name: value for name, value in c.loss.items() if name != 'kind'})


def build_validator(c: EasyDict, run_dir: str, dataset, net, device, resumed: bool) -> Validator:
    """What evaluates the averages of `net` in training. A resumed run makes the images of interrupted evaluations again."""
    options = EasyDict(c.validation, overwrite=c.validation.overwrite or resumed)
    image_shape = [net.img_channels, net.img_resolution, net.img_resolution]
    return Validator(options, dataset, run_dir, device, image_shape, dataset.label_space, c.encoder)


def profiled_networks(net: torch.nn.Module, teacher: torch.nn.Module | None) -> dict[tuple[str, str], torch.nn.Module]:
    """Names of the networks' calls with gradients and without, for `StepProfile`."""
    return {('student', 'self-target'): net, **({} if teacher is None else {('teacher', 'teacher'): teacher})}


def describe_run(log: RunLog, c: EasyDict, net, dataset, teacher, rounds: int, batch_gpu: int) -> None:
    """Say what is about to be trained on what."""
    params = sum(p.numel() for p in net.parameters())
    steps = c.ema_halflife_nimg / c.batch_size
    subset = f', a random {dataset.num_images} of its {dataset.num_files}' if dataset.num_images < dataset.num_files else ''
    log(f'Data: {len(dataset)} images of {dataset.image_shape}, {dataset.label_space}, from {c.dataset.path}{subset}')
    if dataset.unused_labels:
        log(f'Warning: {dataset.unused_labels} labels in dataset.json are of no image in {c.dataset.path}. Is it complete?')
    if about := dataset.about_others():
        log(f'Note: {about}.')
    if dataset.unturned:
        log(f'Note: {len(dataset.unturned)} images carry an EXIF orientation, which is ignored: training sees their pixels as they are stored. '
            'dataset_tool.py --exif=apply turns them.')
    if warning := dataset.label_space.warning():
        log(f'Warning: {warning}')
    if teacher is not None and (untaught := sorted({*space_of(teacher).absent} - {*dataset.label_space.absent})):
        log(f'Warning: the training set of {c.teacher} has no images of classes {listed(untaught)}, of which these data have some: '
            'what the teacher says of them was never trained.')
    log(f'Network: {type(net).__name__} / {type(net.model).__name__}, {params:,} parameters')
    log(f'Batch: {c.batch_size} images in {rounds} round(s) of {batch_gpu} on {distributed.get_world_size()} process(es)')
    log(f'EMA half-life: {c.ema_halflife_nimg:,.0f} images = {steps:,.0f} steps')
    if steps < 100:
        log(f'Warning: an EMA with a half-life of {steps:.3g} steps averages next to nothing; --ema is in Mimg (--ema=500kimg says it otherwise).')
    remaining = 0.0 if c.ema_rampup_ratio else 0.5 ** (c.total_nimg / c.ema_halflife_nimg)
    if remaining > 0.01:
        log(f'Warning: with a half-life of {c.ema_halflife_nimg:,.0f} images throughout, {remaining:.0%} of the average will still be the weights '
            'that training began with; shorten --ema, or set --ema_rampup=0.05.')
    missing = [r for r in c.network.kwargs.get('dout_resolutions') or [] if not any(name.startswith(f'{r}x{r}_') for name in net.model.enc)]
    if missing:
        log(f'Warning: --dout_resolutions names {", ".join(map(str, missing))}, which this network does not have.')

def describe_resume(log: RunLog, c: EasyDict, progress: EasyDict, made_by: int, world_size: int) -> None:
    """Say where a resumed run goes on, and what cannot be as if it had never stopped."""
    log(f'Resumed from {c.resume} at {progress.nimg / 1e3:.1f} kimg.')
    if made_by != world_size:
        log(f'Warning: that state was made by {made_by} process(es), now there are {world_size}: every image is seen as before, but sums are '
            'rounded differently, so the result will not be bit for bit that of an uninterrupted run.')

#----------------------------------------------------------------------------
# Stopping, evaluating, reporting.

def stop_here(progress: EasyDict, files: run_files.RunFiles, log: RunLog, stop: StopRequest, hosts: distributed.HostAgreement) -> bool:
    """Save where the run is, in the middle of a tick or not, and leave a note; returns that the training is not finished."""
    hosts.close()
    signal_name = next(name for name in distributed.gather_objects(stop.requested) if name)
    log(f'{signal_name}: stopping at {progress.nimg / 1e3:.1f} kimg.')
    saved = files.save_state(progress, dict(progress))
    state = saved or run_files.newest_state(progress)
    if state:  # else there is nothing to come back to
        files.leave_note(signal_name, progress.nimg, state)
    log(f'{f"Saved {saved}" if saved else "The state could not be saved"}; '
        f'{f"--resume goes on from {state}" if state else "there is none to resume from"}.')
    log.close()
    return False


def give_up(c: EasyDict, progress: EasyDict, log: RunLog, bad_in_a_row: int) -> None:
    """End all processes because the numbers stay broken; nothing is saved, so that the states that are there stay."""
    log.close(exit_code=1)
    newest = run_files.newest_state(progress)
    cure = f'resume from {newest}' if newest else 'start again'
    distributed.fail_together(f'{bad_in_a_row} steps in a row had a loss or gradient that is not finite, up to {progress.nimg / 1e3:.1f} kimg; '
                              f'none of them changed the weights. Lower --lr, set --grad-clip, or use --precision=bf16 or fp32, and {cure}.')


def evaluate(validator: Validator, c: EasyDict, averages: WeightAverages, loss_fn, nimg: int, files: run_files.RunFiles,
             stop: StopRequest) -> dict | None:
    """FID of each average of --val_emas, by name, the same on all processes; None, and nothing recorded, where a signal asked to stop meanwhile.

    An average whose images are not finite has None for its FID. That is recorded and told, and training goes on.
    """
    records, grids = {}, {}
    sampled = lambda name: loss_fn.sampled(execution.run_with(averages.on_device(name), channels_last=c.channels_last))  # of copies, one at a time
    for name in c.validation.emas:
        records[name] = validator.run(sampled(name), nimg=nimg, ema=name, metadata=checkpoint.snapshot_metadata(c, nimg), stop=stop)
        if records[name] is None:
            return None
    for name, record in records.items():
        files.guarded(lambda: grids.update({name: picture(validator, sampled(name), nimg, name, files.log)}))  # noqa: B023  (called at once)
        files.log.evaluation(record, grids.get(name))
    return distributed.broadcast_object({name: record['fid'] for name, record in records.items()})


def picture(validator: Validator, net, nimg: int, name: str, log: RunLog) -> str | None:
    """The path of `sample_grid`; None, and a line in the log, where images of it are not finite."""
    try:
        return validator.sample_grid(net, nimg, name)
    except NotFinite as error:
        log(f'Warning: no picture of samples ({name}): {error}.')
        return None


def evaluate_at_start(validator: Validator, c: EasyDict, averages: WeightAverages, loss_fn, teacher, files: run_files.RunFiles,
                      stop: StopRequest) -> dict | None:
    """What --val_teacher and --val_at_start ask for; None where a signal asked to stop meanwhile."""
    if c.validation.teacher and teacher is not None:
        record = validator.run(teacher, nimg=0, ema='teacher', steps=None, stop=stop)
        if record is None:
            return None
        files.log.evaluation(record)
    return evaluate(validator, c, averages, loss_fn, 0, files, stop) if c.validation.at_start else {}


def network_stats(update: WeightUpdate, averages: WeightAverages) -> dict[str, dict]:
    """How far each average is from the weights, relative to them, and what became of broken steps. Waits for the device."""
    weights = update.weights.detach()
    vectors = {name: vector.detach().to(weights.device) for name, vector in averages.vectors.items()}
    values = {f'EMA/{name}_distance': torch.dist(vector, weights) / weights.norm() for name, vector in vectors.items()}
    values |= {'Progress/loss_scale': update.scale, 'Progress/bad_steps': update.bad_steps}
    return {name: dict(num=1, mean=value.item(), std=0) for name, value in values.items()}


def tick_stats(progress: EasyDict, c: EasyDict, averages: WeightAverages, start_time: float, tick_start_time: float, start_nimg: int,
               maintenance_time: float, now: float, device: torch.device, data_wait: float) -> dict[str, dict]:
    """Progress, timing and resources of a tick, in the form of `training_stats.collect`. All times are in seconds."""
    tick_time, seen = now - tick_start_time, progress.nimg - max(progress.tick_start_nimg, start_nimg)
    a_second = lambda amount: amount / tick_time if tick_time > 0 else 0.0  # clocks of machines that were put to sleep may stand still
    values = {'Progress/tick': progress.tick, 'Progress/nimg': progress.nimg, 'Progress/kimg': progress.nimg / 1e3,
              'Progress/step': progress.nimg // c.batch_size, 'Progress/lr': learning_rate(c, progress.nimg - c.batch_size),
              'Progress/ema_halflife_kimg': averages.halflife_at(progress.nimg) / 1e3,
              'Timing/total_sec': now - start_time, 'Timing/sec_per_tick': tick_time, 'Timing/sec_per_kimg': tick_time / max(seen, 1) * 1e3,
              'Timing/images_per_sec': a_second(seen), 'Timing/maintenance_sec': maintenance_time, 'Timing/data_wait_share': a_second(data_wait),
              'Resources/cpu_mem_gb': psutil.Process(os.getpid()).memory_info().rss / 2**30,
              'Resources/peak_gpu_mem_gb': torch.cuda.max_memory_allocated(device) / 2**30 if device.type == 'cuda' else 0}
    return {name: dict(num=1, mean=value, std=0) for name, value in values.items()}


def tick_line(stats: dict, loss_name: str, remaining_sec: float) -> str:
    """The console line of a tick."""
    mean = lambda name: stats[name]['mean']
    fields = [f'tick {mean("Progress/tick"):<5.0f}', f'kimg {mean("Progress/kimg"):<9.1f}',
              f'loss {stats.get(loss_name, {}).get("mean", float("nan")):<9.4g}',
              f'time {misc.format_time(mean("Timing/total_sec")):<8}', f'img/s {mean("Timing/images_per_sec"):<8.4g}',
              f'sec/kimg {mean("Timing/sec_per_kimg"):<7.3g}', f'data {mean("Timing/data_wait_share"):<6.1%}',
              f'maint {mean("Timing/maintenance_sec"):<5.1f}',
              f'mem {mean("Resources/cpu_mem_gb"):<5.2f}', f'gpu {mean("Resources/peak_gpu_mem_gb"):<5.2f}',
              f'ETA {misc.format_time(remaining_sec)}']
    return ' '.join(fields)
