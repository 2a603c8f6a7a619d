"""The training loop, for teachers and students alike. Read it from top to bottom: set-up, step, tick, save."""
from __future__ import annotations

import json
import os
import sys
import time

import psutil
import torch
import tqdm

import validation
from dnnlib import EasyDict, UserError
from torch_utils import distributed, misc, training_stats
from torch_utils.flat import FlatParameters
from training import checkpoint
from training.augment import AugmentPipe
from training.consistency_ops import student_grid
from training.dataset import ImageFolderDataset, InfiniteSampler
from training.draws import SampleDraws
from training.loss import DIFFUSION_LOSSES
from training.loss_cd import ConsistencyDistillationLoss
from training.phema import WeightAverages


def training_loop(c: EasyDict, run_dir: str, dataset: ImageFolderDataset, teacher: torch.nn.Module | None = None, state: dict | None = None) -> None:
    """Train until `c.total_nimg` images were seen.

    Args:
        c: the configuration that train.py prints with --dry-run and writes to training_options.json.
        run_dir: existing folder for everything that the run writes.
        dataset: the training set that `c.dataset` describes.
        teacher: frozen network to distil, where `c.objective` needs one.
        state: training state to go on from.
    """
    start_time = time.time()
    device, rank, world_size = distributed.get_device(), distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(c.seed)
    torch.backends.cudnn.benchmark = c.cudnn_benchmark
    log = RunLog(run_dir, enabled=rank == 0, total_kimg=c.total_nimg / 1e3)

    # Data. Sample g of the run is the same image with the same noise, whichever process handles it.
    rank_batch = c.batch_size // world_size
    batch_gpu = min(c.batch_gpu or rank_batch, rank_batch)
    rounds = rank_batch // batch_gpu

    # Networks, loss, optimiser, averages.
    teacher = teacher.to(device) if teacher is not None else None
    net = build_network(c, teacher).to(device).train()
    loss_fn = build_loss(c, teacher)
    augment_pipe = AugmentPipe(p=c.augment) if c.augment > 0 else None
    flat = FlatParameters(net)
    optimizer = torch.optim.Adam([flat.weights], lr=c.lr, betas=tuple(c.betas), eps=c.eps, fused=True)
    averages = WeightAverages(net, flat, c.ema_halflife_nimg, c.ema_rampup_ratio, c.phema_stds)
    describe_run(log, c, net, dataset, rounds, batch_gpu)

    # Where we are.
    progress = EasyDict(nimg=0, tick=0, tick_start_nimg=0, fid=None, states={}, names={})
    if state is not None:
        progress.update(restore(c.resume, state, net, optimizer, averages))
        log(f'Resumed from {c.resume} at {progress.nimg / 1e3:.1f} kimg.')
        if progress.nimg >= c.total_nimg:
            log(f'Nothing to do: --duration is {c.total_nimg / 1e3:g} kimg.')
            log.close()
            return
    start_nimg = progress.nimg
    ddp = net
    if world_size > 1:  # buffers are constants
        device_ids = [device] if device.type == 'cuda' else None
        ddp = torch.nn.parallel.DistributedDataParallel(net, device_ids=device_ids, broadcast_buffers=False)
    sampler = InfiniteSampler(len(dataset), c.batch_size, rank=rank, num_replicas=world_size, seed=c.seed, start=start_nimg)
    loader = iter(torch.utils.data.DataLoader(dataset, sampler=sampler, batch_size=batch_gpu, num_workers=c.workers,
                                              pin_memory=device.type == 'cuda', prefetch_factor=2 if c.workers else None))
    validator = validation.Validator(c.validation, dataset, run_dir, device, dataset.image_shape, dataset.label_dim) if c.validation else None
    if validator and c.validation.teacher and teacher is not None and start_nimg == 0:
        log(validator.run(teacher, nimg=0, ema='teacher', steps=None))
    if validator and c.validation.at_start and start_nimg == 0:
        log(validator.run(averages.ema, nimg=0, ema='ema', metadata=snapshot_metadata(c, 0)))

    log(f'Training for {c.total_nimg / 1e3:g} kimg...')
    tick_start_time, maintenance_time = time.time(), time.time() - start_time
    while True:
        # One optimiser step.
        loss_fn.begin_step(progress.nimg)
        flat.weights.grad.zero_()
        for round_idx in range(rounds):
            with misc.gradient_sync(ddp, round_idx == rounds - 1):
                first = progress.nimg + rank * rank_batch + round_idx * batch_gpu
                accumulate_gradients(ddp, loss_fn, next_batch(loader), SampleDraws(c.seed, first, batch_gpu, device), augment_pipe,
                                     c.loss_scaling / rank_batch, c.network.kwargs.get('augment_dim', 0))
        lr = misc.learning_rate(c.lr, progress.nimg, c.total_nimg, c.lr_rampup_nimg, c.lr_schedule)
        progress.nimg += c.batch_size
        update_weights(flat, optimizer, averages, lr, progress.nimg, c.batch_size)
        log.advance(progress.nimg / 1e3)

        # A tick: report, validate, save. The first one follows the first step, as in EDM.
        done = progress.nimg >= c.total_nimg
        if not done and progress.tick and progress.nimg < progress.tick_start_nimg + c.kimg_per_tick * 1e3:
            continue
        now = time.time()
        stats = training_stats.collect() | tick_stats(progress, lr, averages, start_time, tick_start_time, maintenance_time, now, device)
        remaining = (c.total_nimg - progress.nimg) * (now - start_time) / (progress.nimg - start_nimg)
        log(tick_line(stats, f'Loss/{loss_fn.name}', remaining))
        log.stats(stats)

        maintenance_start = time.time()
        if validator and progress.tick and (done or progress.tick % c.validation.every == 0):
            record = validator.run(averages.ema, nimg=progress.nimg, ema='ema', metadata=snapshot_metadata(c, progress.nimg))
            log(record)
            progress.fid = record['fid']
        else:
            progress.fid = None
        save_all(c, run_dir, progress, net, optimizer, averages, done)
        if done:
            break
        progress.tick += 1
        progress.tick_start_nimg = progress.nimg
        tick_start_time = time.time()
        maintenance_time = tick_start_time - maintenance_start

    log.close()
    log('Done.')

#----------------------------------------------------------------------------
# The step. Nothing here waits for the device.

def accumulate_gradients(net, loss_fn, batch, draws: SampleDraws, augment_pipe, scale: float, augment_dim: int = 0) -> None:
    """Forward and backward pass for a batch of (uint8 images [N, C, H, W], labels [N, label_dim]); the loss is `scale` × the sum over images.

    A network with augmentation labels gets zeros, 'not augmented', where there is no `augment_pipe`: DDP wants every parameter used.
    """
    images, labels = (t.to(draws.device, non_blocking=True) for t in batch)
    images = images.float() / 127.5 - 1
    augment_labels = images.new_zeros(len(images), augment_dim) if augment_dim else None
    if augment_pipe is not None:
        images, augment_labels = augment_pipe(images, generator=draws.generator('augment'))
    loss = loss_fn(net, images, labels, draws, augment_labels)
    training_stats.report(f'Loss/{loss_fn.name}', loss)
    (loss.sum() * scale).backward()


def next_batch(loader):
    """The loader's next batch. A worker's `UserError` arrives with the worker's traceback for a text: its last line is the message."""
    try:
        return next(loader)
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix('dnnlib.util.UserError: ')) from error


def update_weights(flat: FlatParameters, optimizer, averages: WeightAverages, lr: float, nimg: int, batch_size: int) -> None:
    """Optimiser step and weight averages, from the gradients that `flat` holds; `nimg` counts this step's images."""
    for group in optimizer.param_groups:
        group['lr'] = lr
    gradient = flat.weights.grad
    torch.nan_to_num(gradient, nan=0, posinf=1e5, neginf=-1e5, out=gradient)
    training_stats.report('Progress/grad_norm', gradient.norm())
    optimizer.step()
    averages.update(nimg, batch_size)

#----------------------------------------------------------------------------
# Set-up.

def build_network(c: EasyDict, teacher: torch.nn.Module | None) -> torch.nn.Module:
    """The network to train: from the teacher's weights where there is one, or from those of --transfer that fit."""
    net = checkpoint.NETWORKS[c.network.class_name](**c.network.kwargs)
    if teacher is not None:
        net.load_state_dict(teacher.state_dict())
        net.sigma_min, net.sigma_max = teacher.sigma_min, teacher.sigma_max
    net.requires_grad_(True)
    if hasattr(net, 'logvar_linear'):  # EDM2's uncertainty: no loss here asks for it, and DDP wants every parameter used
        net.logvar_linear.requires_grad_(False)
    if c.transfer:
        source, own = checkpoint.load_network(c.transfer).state_dict(), net.state_dict()
        fitting = {name: tensor for name, tensor in source.items() if name in own and own[name].shape == tensor.shape}
        if not fitting:
            raise UserError(f'--transfer={c.transfer} has no tensor that fits this network by name and shape')
        net.load_state_dict(fitting, strict=False)
    return net


def build_loss(c: EasyDict, teacher: torch.nn.Module | None):
    """The loss function of `c.objective`."""
    if c.objective == 'mcd':
        return ConsistencyDistillationLoss(teacher, **c.loss)
    return DIFFUSION_LOSSES[c.loss.kind]()


def snapshot_metadata(c: EasyDict, nimg: int) -> dict:
    """Plain data that a snapshot carries, so that samplers know what the network is."""
    metadata = dict(objective=c.objective, kimg=nimg / 1e3, nimg=nimg)
    if c.objective == 'mcd':
        grid = {name: c.loss[name] for name in ('S', 'sigma_min', 'sigma_max', 'rho', 'student_grid', 'sigma_data')}
        sigmas = student_grid(grid['S'], grid['sigma_min'], grid['sigma_max'], grid['rho'], grid['student_grid'])
        metadata.update(grid, sigmas=sigmas.tolist())
    return metadata


def describe_run(log: RunLog, c: EasyDict, net, dataset, rounds: int, batch_gpu: int) -> None:
    """Say what is about to be trained on what."""
    params = sum(p.numel() for p in net.parameters())
    steps = c.ema_halflife_nimg / c.batch_size
    log(f'Data: {len(dataset)} images of {dataset.image_shape}, {dataset.label_dim} classes, from {c.dataset.path}')
    log(f'Network: {type(net).__name__} / {type(net.model).__name__}, {params:,} parameters')
    log(f'Batch: {c.batch_size} images in {rounds} round(s) of {batch_gpu} on {distributed.get_world_size()} process(es)')
    log(f'EMA half-life: {c.ema_halflife_nimg:,.0f} images = {steps:,.0f} steps')
    if steps < 100:
        log(f'Warning: an EMA with a half-life of {steps:.3g} steps averages next to nothing; --ema is in Mimg (--ema=500kimg says it otherwise).')
    missing = [r for r in c.network.kwargs.get('dout_resolutions') or [] if not any(name.startswith(f'{r}x{r}_') for name in net.model.enc)]
    if missing:
        log(f'Warning: --dout_resolutions names {", ".join(map(str, missing))}, which this network does not have.')

#----------------------------------------------------------------------------
# Reporting.

def tick_stats(progress: EasyDict, lr: float, averages: WeightAverages, start_time: float, tick_start_time: float, maintenance_time: float,
               now: float, device: torch.device) -> dict[str, dict]:
    """Progress, timing and resources of a tick, in the form of `training_stats.collect`."""
    tick_time, seen = now - tick_start_time, progress.nimg - progress.tick_start_nimg
    values = {'Progress/tick': progress.tick, 'Progress/kimg': progress.nimg / 1e3, 'Progress/lr': lr,
              'Progress/ema_halflife_kimg': averages.halflife_at(progress.nimg) / 1e3, 'Timing/total_sec': now - start_time,
              'Timing/sec_per_tick': tick_time, 'Timing/sec_per_kimg': tick_time / seen * 1e3, 'Timing/images_per_sec': seen / tick_time,
              'Timing/maintenance_sec': maintenance_time, 'Resources/cpu_mem_gb': psutil.Process(os.getpid()).memory_info().rss / 2**30,
              'Resources/peak_gpu_mem_gb': torch.cuda.max_memory_allocated(device) / 2**30 if device.type == 'cuda' else 0}
    return {name: dict(num=1, mean=value, std=0) for name, value in values.items()}


def tick_line(stats: dict, loss_name: str, remaining_sec: float) -> str:
    """The console line of a tick."""
    mean = lambda name: stats[name]['mean']
    fields = [f'tick {mean("Progress/tick"):<5.0f}', f'kimg {mean("Progress/kimg"):<9.1f}',
              f'loss {mean(loss_name):<9.4g}',
              f'time {misc.format_time(mean("Timing/total_sec")):<8}', f'img/s {mean("Timing/images_per_sec"):<8.4g}',
              f'sec/kimg {mean("Timing/sec_per_kimg"):<7.3g}', f'maint {mean("Timing/maintenance_sec"):<5.1f}',
              f'mem {mean("Resources/cpu_mem_gb"):<5.2f}', f'gpu {mean("Resources/peak_gpu_mem_gb"):<5.2f}',
              f'ETA {misc.format_time(remaining_sec)}']
    return ' '.join(fields)


class RunLog:
    """Lines to the console and log.txt, statistics to stats.jsonl, a progress bar where the output is a terminal; rank 0 only."""

    def __init__(self, run_dir: str, enabled: bool, total_kimg: float):
        self.run_dir, self.enabled = run_dir, enabled
        self.bar = tqdm.tqdm(total=total_kimg, unit='kimg', disable=not enabled or not sys.stderr.isatty(), dynamic_ncols=True, leave=False,
                             bar_format='{percentage:3.0f}%|{bar}| {n:.1f}/{total:g} kimg {remaining}')

    def __call__(self, line: str | dict) -> None:
        if self.enabled:
            line = json.dumps(line) if isinstance(line, dict) else line
            with tqdm.tqdm.external_write_mode(file=sys.stdout):
                print(line, flush=True)
            self._append('log.txt', line)

    def stats(self, stats: dict) -> None:
        """One object a tick."""
        if self.enabled:
            self._append('stats.jsonl', json.dumps(dict(stats, timestamp=time.time())))

    def _append(self, name: str, line: str) -> None:
        with open(os.path.join(self.run_dir, name), 'a', encoding='utf-8') as file:
            file.write(line + '\n')

    def advance(self, kimg: float) -> None:
        """Move the progress bar."""
        self.bar.update(kimg - self.bar.n)

    def close(self) -> None:
        """Remove the progress bar."""
        self.bar.close()

#----------------------------------------------------------------------------
# Saving and restoring.

def file_stem(progress: EasyDict) -> str:
    """`<kimg:06d>` for the files saved now, with `-<nimg>` appended where files of another moment of this run have the same kimg."""
    stem = f'{progress.nimg // 1000:06d}'
    if progress.names.setdefault(stem, progress.nimg) != progress.nimg:
        stem += f'-{progress.nimg}'
    return stem


def save_all(c: EasyDict, run_dir: str, progress: EasyDict, net, optimizer, averages: WeightAverages, done: bool) -> None:
    """Write the snapshots and the state that are due at this tick; rank 0 writes, all wait."""
    due = lambda every: bool(every) and (done or progress.tick % every == 0)
    snapshot_due, phema_due = due(c.snapshot_ticks), bool(averages.phema) and due(c.phema_snapshot_ticks)
    state_due = due(c.state_dump_ticks) and (progress.tick > 0 or done)
    if distributed.is_main() and (snapshot_due or phema_due or state_due):
        stem = file_stem(progress)
        common = dict(snapshot_metadata(c, progress.nimg), dataset_kwargs=dict(c.dataset))
        path = os.path.join(run_dir, f'network-snapshot-{stem}')
        if snapshot_due:
            checkpoint.save_snapshot(f'{path}.pkl', averages.ema, **common, ema='ema', ema_halflife_kimg=c.ema_halflife_nimg / 1e3, fid=progress.fid)
        if phema_due:
            for std, average in averages.phema.items():
                checkpoint.save_snapshot(f'{path}-{std:.3f}.pkl', average, **common, ema=f'phema-{std:.3f}', ema_std=std)
        if state_due:
            save_state(c, run_dir, progress, stem, net, optimizer, averages)
    distributed.barrier()


def states_to_keep(states: dict[str, float | None]) -> set[str]:
    """Of saved states, {stem: validation FID or None} from the oldest to the newest: the two newest, and the one with the least FID."""
    measured = {stem: fid for stem, fid in states.items() if fid is not None}
    return {*list(states)[-2:], *([min(measured, key=measured.get)] if measured else [])}


def save_state(c, run_dir, progress: EasyDict, stem: str, net, optimizer, averages) -> None:
    """Write a training state, then delete those that are not to be kept."""
    progress.states = {**{s: fid for s, fid in progress.states.items() if s != stem}, stem: progress.fid}
    keep = states_to_keep(progress.states)
    stale = [s for s in progress.states if s not in keep]
    progress.states = {s: fid for s, fid in progress.states.items() if s in keep}
    # A resumed run continues with the tick after this one.
    position = dict(progress, tick=progress.tick + 1, tick_start_nimg=progress.nimg)
    checkpoint.save_state(os.path.join(run_dir, f'training-state-{stem}.pt'), dict(
        net=dict(net.state_dict()), optimizer=optimizer.state_dict(), averages=averages.state_dict(), progress=position, options=json.dumps(c)))
    for old in stale:
        path = os.path.join(run_dir, f'training-state-{old}.pt')
        if os.path.exists(path):
            os.remove(path)


def restore(path: str, state: dict, net, optimizer, averages: WeightAverages) -> dict:
    """Put a training state into the given objects; returns its `progress`."""
    try:
        net.load_state_dict(state['net'])
        optimizer.load_state_dict(state['optimizer'])
        averages.load_state_dict(state['averages'])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'--resume={path} is the state of another run or network ({reason}): resume with the options it was made with') from error
    return state['progress']
