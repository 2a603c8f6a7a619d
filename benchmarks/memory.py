"""Memory of a consistency distillation step by part, from the tensors that a step holds, with random weights.

What the student's forward pass saves for the backward pass is counted tensor by tensor
(`torch.autograd.graph.saved_tensors_hooks`), for one image and for two: the difference is per image, the
remainder (weights rounded to half precision) is constant. Temporary tensors are not counted there. The peak of
whole steps is given beside the sum: of a GPU's allocator, or of a stand-in for one (`gpu_stand_in`).
"""

from __future__ import annotations

import contextlib
import gc
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_stand_in
from benchmarks.common import NOT_MEASURED, apart, block, table
from benchmarks.sizes import SIZES
from benchmarks.step import Training, Way
from dnnlib import cli

WAYS = {
    'plain': Way(),
    '--checkpoint-activations': Way(checkpoint_activations=True),
    '--precision=bf16': Way(precision='bf16'),
    '--ema-device=cpu': Way(),
    'all three': Way(precision='bf16', checkpoint_activations=True),
}
ON_HOST = ('--ema-device=cpu', 'all three')  # averages take no device memory


@dataclass(frozen=True)
class Parts:
    """Bytes on the device."""

    teacher: int
    student: int
    rounded: int
    gradients: int
    adam: int
    averages: int
    activations: int

    @property
    def sum(self) -> int:
        return sum(vars(self).values())


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def saved_bytes(training: Training, count: int) -> int:
    """Bytes that the student's forward pass over `count` images saves for its backward pass."""
    net, size, kept = training.student, training.size, {}
    images = torch.randn(count, size.channels, size.resolution, size.resolution, device=training.device)
    sigma, labels = (
        torch.ones(count, device=training.device),
        torch.zeros(count, size.classes, device=training.device),
    )
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        denoised = net(images, sigma, labels, dropout_masks=net.dropout_masks(count))
    total = sum(storage.nbytes() for storage in kept.values())
    del denoised
    return total


def parts_of(training: Training, way: Way, batch: int, averages_on_host: bool) -> Parts:
    """Memory of a step of `batch` images."""
    training.use(way)
    teacher = training.held_teacher if way.held else training.teacher
    # What does not depend on the batch is in both; the difference is one image's.
    one, two = saved_bytes(training, 1), saved_bytes(training, 2)
    moments = [
        value
        for state in training.update.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    return Parts(
        teacher=bytes_of(teacher.parameters()),
        student=training.flat.weights.nbytes,
        rounded=bytes_of(training.gradients[way.precision].vectors),
        gradients=training.flat.weights.grad.nbytes,
        adam=bytes_of(moments),
        averages=0 if averages_on_host else bytes_of(training.averages.vectors.values()),
        activations=one + (batch - 1) * (two - one),
    )


def measured_peak(size: str, name: str, batch: int) -> int:
    """Peak bytes of the GPU's allocator over a step, in this process."""
    device = torch.device('cuda')
    way = WAYS[name]
    training = Training(size, batch, device, averages_device=torch.device('cpu') if name in ON_HOST else None)
    training.use(way)
    if way.held:
        training.teacher = None  # a run holds only the one in half precision
    # The first step allocates what stays.
    training.step(0, inside=False)
    torch.cuda.reset_peak_memory_stats(device)
    training.step(1, inside=False)
    return torch.cuda.max_memory_allocated(device)


@click.command(cls=cli.Command)
@cli.option(
    '--size', type=click.Choice(list(SIZES)), default='imagenet64-adm', show_default=True, help='Network.'
)
@cli.option(
    '--batch',
    metavar='INT',
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help='Batch size per GPU.',
)
@cli.option('--measure', hidden=True)
def main(size, batch, measure):
    """Count the memory of a consistency distillation step by part."""
    on_gpu = torch.cuda.is_available()
    if measure is not None:
        with contextlib.nullcontext() if on_gpu else gpu_stand_in.gpu(track_memory=True):
            peak = measured_peak(size, measure, batch)
        click.echo(peak)
        if not on_gpu:
            gpu_stand_in.leave()
        return
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    training = Training(size, 1, device)
    training.step(0, inside=False)
    averages = ', '.join(training.averages.vectors)
    found = {name: parts_of(training, way, batch, name in ON_HOST) for name, way in WAYS.items()}
    del training
    gc.collect()  # its networks refer back to it

    # The peak of steps, in processes of their own.
    peaks = {}
    if on_gpu:
        torch.cuda.empty_cache()
    if on_gpu or not gpu_stand_in.why_unavailable():
        env = {} if on_gpu else dict(gpu_stand_in.guarded_environment(), PYTHONWARNINGS='ignore')
        arguments = f'--size={size}', f'--batch={batch}'
        peaks = {name: apart(__file__, *arguments, f'--measure={name}', env=env) for name in WAYS}
    unit, one = ('GB', 1e9) if found['plain'].sum > 1e9 else ('MB', 1e6)
    text = lambda count: f'{count / one:.2f}'
    rows = [
        [
            name,
            *map(text, vars(parts).values()),
            text(parts.sum),
            text(found['plain'].sum - parts.sum),
            text(peaks[name]) if name in peaks else NOT_MEASURED,
        ]
        for name, parts in found.items()
    ]
    click.echo(
        block(
            f'Memory of a step: {SIZES[size].title}, batch {batch}',
            f"{unit} ({one:.0e} bytes) by part. Activations are what the student's forward pass saves for "
            f'the backward pass, {batch} times that of one image (the difference between two images and '
            f'one); the rest, {text(replace(found["plain"], activations=0).sum)} {unit}, does not depend on '
            f'the batch. Averages: {averages}. In half precision the teacher holds its convolutions in it, and `rounded` '
            'are weights and gradients of a step in it. '
            '`peak` has temporary tensors too: '
            f'{"of the allocator in real steps" if on_gpu else "counted on a stand-in for a GPU"}.',
            table(
                [
                    '',
                    'teacher',
                    'student',
                    'rounded',
                    'gradients',
                    'Adam',
                    'averages',
                    'activations',
                    'sum',
                    'saved',
                    'peak',
                ],
                rows,
            ),
        )
    )


if __name__ == '__main__':
    main()
