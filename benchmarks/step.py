"""Time of a consistency distillation step and its parts under each way of running the networks, with random
weights.

The step is that of the training loop (`accumulate_gradients`, `WeightUpdate`, `WeightAverages`), with T =
1280 as in the second half of training. Its parts are calls of the networks: teacher hop, self-target, student
forward, and backward, which includes that of the loss; `rest` is everything else.

Every way is measured in its own process, step by step in turns with the plain one, on the same images, noise
and edges; `plain` is eager FP32 without TensorFloat-32. On GPUs parts are timed in separate steps, because
timing them has to wait for the device within the step.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import NOT_MEASURED, NamesOf, apart, block, machine, median_ratio, table
from benchmarks.sizes import SIZES, Operations, operations
from dnnlib import EasyDict, cli
from torch_utils import misc
from torch_utils.flat import FlatParameters
from torch_utils.gradients import Gradients
from training import execution
from training.networks.encoders import StandardRGBEncoder
from training.objectives import OBJECTIVES, loss_cd
from training.phema import WeightAverages
from training.rng import SampleRng
from training.training_loop import accumulate_gradients
from training.weight_update import WeightUpdate

WARMUP = 3
PARTS = ('teacher hop', 'self-target', 'student forward', 'backward', 'rest', 'total')


@dataclass(frozen=True)
class Way:
    """A way of running the networks: see `training.execution`.

    Attributes:
        gpu: whether it requires a GPU.
    """

    precision: str = 'fp32'
    channels_last: bool = False
    compiled: bool = False
    checkpoint_activations: bool = False
    tf32: bool = False
    gpu: bool = False

    @property
    def held(self) -> bool:
        """Whether the teacher holds its weights in half precision, as in train.py."""
        return self.precision in ('fp16', 'bf16')


PLAIN = 'plain'
WAYS = {
    PLAIN: Way(),
    'channels_last': Way(channels_last=True),
    'compile': Way(compiled=True),
    'checkpoint': Way(checkpoint_activations=True),
    'bf16': Way(precision='bf16'),
    'fast': Way(channels_last=True, compiled=True),
    'tf32': Way(tf32=True, gpu=True),
    'fp16': Way(precision='fp16', gpu=True),
    'fp16-fast': Way(precision='fp16', channels_last=True, compiled=True, gpu=True),
}
OPTIONS = {
    PLAIN: 'plain',
    'channels_last': '--channels_last',
    'compile': '--compile',
    'checkpoint': '--checkpoint-activations',
    'bf16': '--precision=bf16',
    'fast': '--channels_last --compile',
    'tf32': '--tf32',
    'fp16': '--precision=fp16',
    'fp16-fast': '--precision=fp16 --channels_last --compile',
}

# Dense matrix products by vendors' data sheets, 10^12 operations per second: FP32 outside tensor cores; TF32;
# FP16 and BF16 with FP32 accumulation.
PEAKS = {
    r'NVIDIA A100.*': dict(fp32=19.5, tf32=156, half=312),
    r'NVIDIA H100 80GB HBM3': dict(fp32=67, tf32=494.7, half=989.4),
    r'NVIDIA H200': dict(fp32=67, tf32=494.7, half=989.4),
    r'NVIDIA L40S': dict(fp32=91.6, tf32=183, half=362),
    r'NVIDIA GeForce RTX 4090': dict(fp32=82.6, tf32=82.6, half=165.2),
}

# ----------------------------------------------------------------------------
# The step, and what is measured of it.


class Stopwatch:
    """Seconds of a step by part, and numbers of images that networks were evaluated on.

    Args:
        inside: whether to time parts, for which a GPU is waited for at both ends of each.
    """

    def __init__(self, device: torch.device, inside: bool):
        self.device, self.inside = device, inside
        self.parts, self.start = {}, self.now()
        self.images = {True: 0, False: 0}  # with gradients, without

    def now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, call: Callable, *args, **kwargs):
        """The result of `call`, whose time is added to a part."""
        if not self.inside:
            return call(*args, **kwargs)
        start = self.now()
        result = call(*args, **kwargs)
        self.parts[name] = self.parts.get(name, 0) + self.now() - start
        return result

    def stop(self) -> dict[str, float]:
        """Seconds of PARTS, zero for parts without work; only of the total if parts are not timed."""
        total = self.now() - self.start
        if not self.inside:
            return dict(total=total)
        return {
            **dict.fromkeys(PARTS, 0),
            **self.parts,
            'rest': total - sum(self.parts.values()),
            'total': total,
        }


class Timed:
    """A network whose calls are timed, from outside of what is compiled."""

    def __init__(self, net: torch.nn.Module, training: Training, is_teacher: bool):
        self._net, self._training, self._is_teacher = net, training, is_teacher

    def __getattr__(self, name):
        return getattr(self._net, name)

    def __call__(self, x, *args, **kwargs):
        differentiated = torch.is_grad_enabled()
        watch = self._training.watch
        watch.images[differentiated] += len(x)
        name = 'teacher hop' if self._is_teacher else 'student forward' if differentiated else 'self-target'
        return watch.timed(name, self._net, x, *args, **kwargs)


def phema_stds(size: str) -> list[float]:
    """Widths of the power-function averages of a training."""
    return [] if size == 'demo' else [0.05, 0.10]


class Training:
    """Networks, loss and optimizer as the training loop sets them up for a size, and a step.

    `averages_device`: see `WeightAverages`. `student` is what steps evaluate, of `net`, which trains.
    """

    def __init__(
        self, size: str, batch: int, device: torch.device, averages_device: torch.device | None = None
    ):
        self.size, self.batch, self.device, self.watch = SIZES[size], batch, device, None
        torch.backends.cudnn.benchmark = True  # as train.py does
        misc.keep_freed_memory()
        torch.manual_seed(0)
        with device:
            self.net = self.student = self.size.build().to(device).train()
            self.teacher = self.size.build().to(device).eval().requires_grad_(False)
        options = dict(OBJECTIVES['mcd'].options, T_anneal_kimg=0, sigma_data=0.5)
        self.loss_state = loss_cd.setup(EasyDict(options), Timed(self.teacher, self, is_teacher=True))

        # Random data; only their shapes matter.
        images = torch.randint(
            256, [batch, self.size.channels, self.size.resolution, self.size.resolution], dtype=torch.uint8
        )
        data = images, torch.eye(self.size.classes)[torch.randint(self.size.classes, [batch])]
        self.data = [values.pin_memory() for values in data] if device.type == 'cuda' else data

        # Optimizer and averages.
        self.flat = FlatParameters(self.net)
        self.gradients = {'fp32': Gradients(self.net, self.flat)}
        self.update = WeightUpdate(self.flat, (0.9, 0.999), 1e-8)
        self.averages = WeightAverages(self.net, self.flat, 5e5, 0.05, phema_stds(size), averages_device)
        self.held_teacher, self.compiled, self.precision = None, set(), 'fp32'

    def use(self, way: Way) -> None:
        """Run the networks this way from now on; what was compiled stays, but is used only if wanted."""
        if way.held and self.held_teacher is None:
            self.held_teacher = execution.hold_in_half(
                execution.in_precision(copy.deepcopy(self.teacher), way.precision)
            )
        teacher = self.held_teacher if way.held else self.teacher
        if way.precision not in self.gradients:
            rounded = execution.rounded_parameters(execution.in_precision(self.net, way.precision))
            self.gradients[way.precision] = Gradients(self.net, self.flat, *rounded)
        self.precision, self.student = way.precision, self.gradients[way.precision].net
        for net in (self.student, teacher):
            execution.in_precision(net, way.precision)
            execution.run_with(
                net,
                channels_last=way.channels_last,
                checkpoint_activations=way.checkpoint_activations,
                compiled=way.compiled and net not in self.compiled,
            )
        self.compiled |= {self.student, teacher} if way.compiled else set()
        self.loss_state.teacher = Timed(teacher, self, is_teacher=True)
        # What another way has compiled must not run here.
        torch.compiler.set_stance('default' if way.compiled else 'force_eager')
        misc.allow_tf32(way.tf32)

    def step(self, number: int, inside: bool, watch: Stopwatch | None = None) -> dict:
        """Perform a step; returns its seconds by part, and on how many images networks were evaluated."""
        self.watch = watch = watch or Stopwatch(self.device, inside)
        # As in training/training_loop.py: train_step.
        with timed_backward(watch):
            self.loss_state.begin_step(number * self.batch)
            self.averages.begin_step()
            gradients = self.gradients[self.precision]
            gradients.begin_step()
            rng = SampleRng(0, number * self.batch, self.batch, self.device)
            with gradients.round(last=True):
                accumulate_gradients(
                    Timed(self.student, self, is_teacher=False),
                    loss_cd,
                    self.loss_state,
                    self.data,
                    rng,
                    self.update,
                    1 / self.batch,
                    StandardRGBEncoder(),
                )
            self.averages.before_update()
            self.update.step(1e-5)
            self.loss_state.end_step()
            self.averages.update((number + 1) * self.batch, self.batch)
        return dict(watch.stop(), plain_images=watch.images[False], differentiated_images=watch.images[True])


@contextlib.contextmanager
def timed_backward(watch: Stopwatch) -> Iterator[None]:
    """Time `Tensor.backward` as a part within the context."""
    backward = torch.Tensor.backward

    torch.Tensor.backward = lambda *args, **kwargs: watch.timed('backward', backward, *args, **kwargs)
    try:
        yield
    finally:
        torch.Tensor.backward = backward


# ----------------------------------------------------------------------------
# Measuring.


def measure(size: str, way: str, batch: int, steps: int, device: torch.device) -> dict:
    """Total seconds of the first steps, and each later step, by way; the plain way and another in turns."""
    training, rows = Training(size, batch, device), {name: [] for name in dict.fromkeys([PLAIN, way])}
    warmup = min(WARMUP, steps)
    for number in range(warmup + steps):
        # The order alternates, so that neither way always comes second.
        for name in rows if number % 2 else reversed(rows):
            training.use(WAYS[name])
            on_gpu = device.type == 'cuda'
            row = training.step(number, inside=not on_gpu)
            # Timing parts synchronizes with a GPU, so the whole is timed by a step without that.
            if on_gpu and number >= warmup:
                row = dict(training.step(number, inside=True), whole=row['total'])
            rows[name].append(row)
    return {
        name: dict(first=sum(row['total'] for row in steps[:warmup]), steps=steps[warmup:])
        for name, steps in rows.items()
    }


@functools.cache
def peak(device: torch.device, precision: str, tf32: bool) -> float | None:
    """Operations per second of large matrix products: by data sheet for a GPU, None if it is unknown;
    measured for a CPU."""
    if device.type == 'cuda':
        kind = 'half' if precision in ('fp16', 'bf16') else 'tf32' if tf32 else 'fp32'
        figures = next(
            (
                peaks
                for pattern, peaks in PEAKS.items()
                if re.fullmatch(pattern, torch.cuda.get_device_name(device))
            ),
            None,
        )
        return figures and figures[kind] * 1e12

    # The fastest of several products.
    best = 0
    for side in (512, 1024, 1536):
        a, b = torch.randn(2, side, side, dtype=torch.bfloat16 if precision == 'bf16' else torch.float32)
        for _ in range(6):
            start = time.perf_counter()
            a @ b
            # Two operations for each of side³ products.
            best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def ways_for(size: str, device: torch.device, compile_large: bool) -> list[str]:
    """The ways that can be measured on this device."""
    on_gpu = device.type == 'cuda'
    feasible = [
        name
        for name, way in WAYS.items()
        if on_gpu or not (way.gpu or (way.compiled and SIZES[size].large and not compile_large))
    ]
    if size == 'imagenet64-adm' and not on_gpu:
        feasible.remove('checkpoint')  # takes a minute per step
    return feasible


# ----------------------------------------------------------------------------
# Tables.


def total(step: dict) -> float:
    """Seconds of an entire step without timing of its parts."""
    return step.get('whole', step['total'])


def share_of_peak(steps: list[dict], net: Operations, at_most: float | None) -> str:
    """Operations of the networks relative to what the device can do in that time; median over steps."""
    if at_most is None:
        return 'n/a'
    shares = [
        net.of_step(step['plain_images'], step['differentiated_images']) / total(step) / at_most
        for step in steps
    ]
    return f'{statistics.median(shares):.1%}'


def parts_table(runs: dict[str, dict]) -> str:
    """Table of the parts of a step: median milliseconds and shares, by way."""
    header, rows = [''], [[part] for part in PARTS]
    for name, run in runs.items():
        header += [OPTIONS[name] + ', ms', 'share']
        for row, part in zip(rows, PARTS):
            row.append(f'{statistics.median(step[part] for step in run["steps"]) * 1e3:.2f}')
            row.append(f'{statistics.median(step[part] / step["total"] for step in run["steps"]):.1%}')
    return table(header, rows)


def ways_table(
    results: dict[str, dict], ways: list[str], batch: int, net: Operations, peaks: dict[str, float | None]
) -> str:
    """Table of ways, measured or not."""
    # The plain way was measured beside every other one; ratios are between the two in the same process.
    rows = []
    for name in ways:
        if name not in results:
            rows.append([OPTIONS[name]] + [NOT_MEASURED] * 7)
            continue
        run, plain = results[name][name], results[name][PLAIN]
        times, beside = ([total(step) for step in each['steps']] for each in (run, plain))
        rows.append(
            [
                OPTIONS[name],
                f'{run["first"]:.1f} s',
                f'{min(times) * 1e3:.2f} ms',
                f'{statistics.median(times) * 1e3:.2f} ms',
                f'{batch / statistics.median(times):.4g}',
                f'{min(beside) / min(times):.3f}',
                f'{median_ratio(beside, times):.3f}',
                share_of_peak(run['steps'], net, peaks[name]),
            ]
        )
    return table(
        [
            '',
            'first steps',
            'least',
            'median',
            'images/s',
            'times faster, least',
            'times faster, median',
            'of the peak',
        ],
        rows,
    )


def describe_peaks(device: torch.device, peaks: dict[str, float | None]) -> str:
    """What speeds are compared with."""
    if device.type == 'cuda':
        return "the vendor's number for dense products in that precision, where known"
    figures = ', '.join(
        f'{peaks[name] / 1e9:.0f} in {what}'
        for name, what in ((PLAIN, 'FP32'), ('bf16', 'BF16'))
        if name in peaks
    )
    return (
        f'the fastest matrix product measured in the same run ({figures}; 10^9 operations per second), which '
        'convolutions may exceed'
    )


def describe(
    size: str,
    batch: int,
    steps: int,
    net: Operations,
    device: torch.device,
    results: dict[str, dict],
    ways: list[str],
    peaks: dict,
) -> str:
    """The block of RESULTS.md."""
    prose = (
        f'{net.parameters:,} parameters; per image {net.forward / 1e9:.3g} GFLOP for a forward pass and '
        f'{net.backward / 1e9:.3g} for a backward pass; {steps} steps. `rest` is everything but the '
        'networks: random numbers, noise, arithmetic of hops, loss, statistics, optimizer, averages. Each '
        'way of running the networks is measured in turns with the plain one (eager FP32), step by step, in '
        'a process of its own: `times faster` is the ratio within that process, of the least times and as '
        f'the median over pairs of steps. `first steps` is the total of the first {min(WARMUP, steps)}, with '
        'compilation from an empty cache. `of the peak`: operations of the networks, without recomputed '
        f'activations, relative to {describe_peaks(device, peaks)}.'
    )
    shown = next(results[name] for name in ('fp16-fast', 'fast', 'bf16', *results) if name in results)
    return block(
        f'A step: {SIZES[size].title}, batch {batch}',
        prose,
        parts_table(shown),
        ways_table(results, ways, batch, net, peaks),
    )


@click.command(cls=cli.Command)
@cli.option('--size', type=click.Choice(list(SIZES)), default='demo', show_default=True, help='Network.')
@cli.option(
    '--batch', metavar='INT', type=click.IntRange(min=1), help="Batch size.  [default: the size's own]"
)
@cli.option(
    '--steps',
    metavar='INT',
    type=click.IntRange(min=1),
    help="Number of steps to time for each way.  [default: the size's own]",
)
@cli.option(
    '--ways',
    metavar='LIST',
    type=NamesOf(WAYS),
    help=f'Ways of running the networks, of {", ".join(WAYS)}.  [default: what suits the device]',
)
@cli.option('--compile-large', is_flag=True, help='Also compile large networks on a CPU.')
@cli.option('--measure', 'way', hidden=True)
@cli.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')
def main(size, batch, steps, ways, compile_large, way, as_json):
    """Time a consistency distillation step and its parts under several ways of running the networks."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    batch, steps = batch or SIZES[size].batch_on(device), steps or SIZES[size].steps_on(device)
    if way is not None:
        click.echo(json.dumps(measure(size, way, batch, steps, device)))
        return

    # What to measure; the plain way always is.
    ways = ways and list(dict.fromkeys([PLAIN, *ways]))
    selected = ways or ways_for(size, device, compile_large)
    if device.type == 'cpu' and (useless := [name for name in selected if WAYS[name].gpu]):
        raise click.UsageError(f'--ways={",".join(useless)}: requires a GPU, and there is none.')
    peaks = {name: peak(device, WAYS[name].precision, WAYS[name].tf32) for name in selected}
    net, results = operations(SIZES[size]), {}

    # A process for each, with an empty compilation cache.
    for name in [name for name in selected if name != PLAIN] or [PLAIN]:
        with tempfile.TemporaryDirectory() as cache:
            results[name] = apart(
                __file__,
                f'--measure={name}',
                f'--size={size}',
                f'--batch={batch}',
                f'--steps={steps}',
                env=dict(TORCHINDUCTOR_CACHE_DIR=cache),
            )
    results.setdefault(PLAIN, next(iter(results.values())))
    if as_json:
        click.echo(
            json.dumps(
                dict(
                    device=machine(), size=size, batch=batch, operations=vars(net), peaks=peaks, ways=results
                )
            )
        )
        return
    click.echo(describe(size, batch, steps, net, device, results, ways or list(WAYS), peaks))


if __name__ == '__main__':
    main()
