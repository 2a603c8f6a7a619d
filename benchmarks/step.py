"""Time of a consistency distillation step and its parts, and of sampling, for a network of a named size with random weights.

The step is the training loop's own (`accumulate_gradients`, `WeightUpdate`, `WeightAverages`). Its parts are measured inside it, by timing every
call of the networks: teacher hop, self-target, student forward, backward; `rest` is what remains: drawing, noising, hops' arithmetic, loss,
statistics, optimiser, weight averages. The backward pass of the loss itself counts as backward. T is 1280, as in the second half of training.
"""
from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli
from torch_utils.flat import FlatParameters
from training import networks, samplers
from training.draws import SampleDraws
from training.encoders import StandardRGBEncoder
from training.loss_cd import ConsistencyDistillationLoss
from training.phema import WeightAverages
from training.training_loop import accumulate_gradients
from training.weight_update import WeightUpdate

SIZES = {
    'demo': (8, 1, 10, 128, dict(model_type='DhariwalUNet', model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], dropout=0)),
    'cifar10-ddpmpp': (32, 3, 10, 32, dict(model_type='SongUNet', model_channels=128, channel_mult=[2, 2, 2], dropout=0.13)),
    'imagenet64-adm': (64, 3, 1000, 64, dict(model_type='DhariwalUNet', model_channels=192, channel_mult=[1, 2, 3, 4], dropout=0.2,
                                             dout_resolutions=[16, 8])),
}


class Stopwatch:
    """Seconds by part; waits for the device at both ends of what it times."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, {}

    def now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wrap(self, module: torch.nn.Module, part):
        """Add the time of every forward call of `module` to the part that `part()` names."""
        starts = []
        module.register_forward_pre_hook(lambda *_: starts.append(self.now()))
        module.register_forward_hook(lambda *_: self.add(part(), self.now() - starts.pop()))

    def add(self, part: str, seconds: float) -> None:
        self.parts[part] = self.parts.get(part, 0) + seconds


def build(size: str, batch: int | None, device: torch.device, fp16: bool):
    """Teacher, student, loss and one batch of a named size."""
    resolution, channels, classes, default_batch, kwargs = SIZES[size]
    batch = batch or default_batch
    torch.manual_seed(0)
    student = networks.EDMPrecond(resolution, channels, classes, use_fp16=fp16, **kwargs).to(device).train()
    teacher = networks.EDMPrecond(resolution, channels, classes, use_fp16=fp16, **kwargs).to(device).eval().requires_grad_(False)
    loss_fn = ConsistencyDistillationLoss(
        teacher, S=8, T_start=64, T_end=1280, T_anneal_kimg=0, rho=7.0, sigma_min=0.002, sigma_max=80.0, student_grid='edm', sampling_mode='edm',
        cd_loss='pseudo_huber', cd_weight_mode='sqrt_karras', sigma_data=0.5, terminal_anchor=True, terminal_teacher_hop=True, sync_dropout=True)
    images = torch.randint(256, [batch, channels, resolution, resolution], dtype=torch.uint8)
    labels = torch.eye(classes)[torch.randint(classes, [batch])]
    return teacher, student, loss_fn, (images, labels)


def time_step(size: str, batch: int | None, steps: int, device: torch.device, fp16: bool) -> dict:
    """Median seconds of the step's parts, after warm-up."""
    teacher, student, loss_fn, data = build(size, batch, device, fp16)
    watch = Stopwatch(device)
    watch.wrap(teacher, lambda: 'teacher hop')
    watch.wrap(student, lambda: 'student forward' if torch.is_grad_enabled() else 'self-target')
    backward = torch.Tensor.backward

    def timed_backward(tensor, *args, **kwargs):
        start = watch.now()
        backward(tensor, *args, **kwargs)
        watch.add('backward', watch.now() - start)

    flat = FlatParameters(student)
    update = WeightUpdate(flat, (0.9, 0.999), 1e-8, loss_scale=None if fp16 else 1.0)
    averages = WeightAverages(student, flat, 5e5, 0.05, [0.05, 0.10] if size != 'demo' else [])
    rows, count, warmup = [], len(data[0]), 2
    torch.Tensor.backward = timed_backward
    try:
        for step in range(warmup + steps):
            watch.parts.clear()
            start = watch.now()
            loss_fn.begin_step(step * count)
            flat.weights.grad.zero_()
            accumulate_gradients(student, loss_fn, data, SampleDraws(0, step * count, count, device), update, 1 / count, StandardRGBEncoder())
            update.step(1e-5)
            averages.update((step + 1) * count, count)
            total = watch.now() - start
            rows.append(dict(watch.parts, rest=total - sum(watch.parts.values()), total=total))
    finally:
        torch.Tensor.backward = backward
    medians = {part: statistics.median(row.get(part, 0) for row in rows[warmup:]) for part in rows[-1]}
    return dict(size=size, batch=count, parameters=sum(p.numel() for p in student.parameters()), seconds=medians,
                rest_share=statistics.median(row['rest'] / row['total'] for row in rows[warmup:]), images_per_second=count / medians['total'])


@torch.no_grad()
def time_sampling(size: str, batch: int | None, repeats: int, device: torch.device, fp16: bool) -> dict:
    """Images per second of 8-step student sampling, and the sampler's share of its time that is not the network's."""
    teacher, _, _, (images, labels) = build(size, batch, device, fp16)
    watch = Stopwatch(device)
    watch.wrap(teacher, lambda: 'network')
    latents, labels = torch.randn(images.shape, device=device), labels.to(device)
    rows = []
    for _ in range(1 + repeats):
        watch.parts.clear()
        start = watch.now()
        samplers.sample(teacher, latents, labels, 'student', 8)
        total = watch.now() - start
        rows.append((total, 1 - watch.parts['network'] / total))
    total, overhead = (statistics.median(column) for column in zip(*rows[1:]))
    return dict(size=size, batch=len(latents), nfe=8, images_per_second=len(latents) / total, overhead_share=overhead)


@click.command(cls=cli.Command)
@cli.option('--size', type=click.Choice(list(SIZES)), default='demo', show_default=True, help='Network.')
@cli.option('--batch', metavar='INT', type=click.IntRange(min=1), help="Images a step.  [default: the size's own]")
@cli.option('--steps', metavar='INT', type=click.IntRange(min=1), default=30, show_default=True, help='Steps to time.')
@cli.option('--fp16', is_flag=True, help='Half precision inside the networks, on GPUs.')
@cli.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')
def main(size, batch, steps, fp16, as_json):
    """Time a consistency distillation step and 8-step sampling."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    name = torch.cuda.get_device_name() if device.type == 'cuda' else f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    step = time_step(size, batch, steps, device, fp16)
    sampling = time_sampling(size, batch, max(steps // 5, 1), device, fp16)
    if as_json:
        click.echo(json.dumps(dict(device=name, torch=torch.__version__, step=step, sampling=sampling)))
        return
    click.echo(f'{name}, torch {torch.__version__}; {size}, {step["parameters"]:,} parameters, batch {step["batch"]}')
    for part, seconds in step['seconds'].items():
        click.echo(f'  {part:<16} {seconds * 1e3:9.2f} ms  {seconds / step["seconds"]["total"]:6.1%}')
    click.echo(f'  rest {step["rest_share"]:.1%} of the step; {step["images_per_second"]:.4g} images/s')
    click.echo(f'  sampling, 8 evaluations: {sampling["images_per_second"]:.4g} images/s, {sampling["overhead_share"]:.1%} outside the network')


if __name__ == '__main__':
    main()
