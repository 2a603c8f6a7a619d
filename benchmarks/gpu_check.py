"""What only a GPU can show, in ten minutes on one: `make gpu-check`.

Checks of correctness come first, then runs of the scripts, then speeds. Each prints a line, `ok`, `FAILED` or
`slow` (works, but less fast than it should), and the facts that it found; what a command printed is in --outdir.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, NamesOf, machine
from benchmarks.step import WAYS, Training
from dnnlib import UserError, cli
from torch_utils import misc
from torch_utils.flat import FlatParameters
from training.networks.edm import keep_mask
from training.phema import WeightAverages
from training.rng import SampleRng
from training.weight_update import DYNAMIC_START, WeightUpdate

MINUTES = 10.0
MFU_AIM, SPEEDUP_AIM = 0.40, 1.6  # of ImageNet-64's ADM in FP16: of the peak, and times plain


class Slow(Exception):
    """Correct, but less fast than it should be."""


@dataclass
class Session:
    """What checks share.

    Attributes:
        device: the GPU, or the CPU to try the script.
        outdir: folder for what commands print and write.
        deadline: when the last check must have ended, by `time.monotonic`.
        facts: what the present check found, for its line.
    """

    device: torch.device
    outdir: Path
    deadline: float
    facts: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == 'cuda'

    def command(self, name: str, *words) -> str:
        """Standard output of `python WORDS` in the repository. Raises: RuntimeError if it fails or is late."""
        hidden = {} if self.on_gpu else dict(CUDA_VISIBLE_DEVICES='')
        path, seconds = self.outdir / f'{name}.txt', self.deadline - time.monotonic()
        arguments = [sys.executable, '-W', 'ignore', *map(str, words)]
        with open(path, 'w') as file:
            file.write(f'$ {shlex.join(["python", *arguments[3:]])}\n')
            file.flush()
            try:
                done = subprocess.run(
                    arguments,
                    cwd=ROOT,
                    env={**os.environ, 'PYTHONPATH': str(ROOT), **hidden},
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                    timeout=max(seconds, 1),
                )
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f'not done when the time was over, see {path}') from error
            file.write(done.stdout)
        if done.returncode:
            raise RuntimeError(f'exit status {done.returncode}, see {path}')
        return done.stdout


# ----------------------------------------------------------------------------
# Checks in this process.


def noise_is_the_same_however_a_batch_is_split(s: Session) -> None:
    whole = SampleRng(1, 64, 64, s.device).normal('noise', [3, 16, 16])
    halves = [SampleRng(1, first, 32, s.device).normal('noise', [3, 16, 16]) for first in (64, 96)]
    assert torch.equal(whole, torch.cat(halves))


def dropout_keeps_the_right_share_and_repeats(s: Session) -> None:
    masks = [
        keep_mask([16, 64, 32, 32], 0.8, s.device, SampleRng(1, 0, 16, s.device).generator('dropout'))
        for _ in range(2)
    ]
    share = masks[0].float().mean().item()
    s.facts.append(f'{share:.4f} kept of 0.8')
    # A million values: five standard deviations are 0.002.
    assert torch.equal(*masks) and abs(share - 0.8) < 0.002


def averages_on_the_host_equal_those_on_the_device(s: Session) -> None:
    """While the weights change at once after every copy."""
    net = torch.nn.Linear(1024, 1024).to(s.device)
    flat = FlatParameters(net)
    here, there = (
        WeightAverages(net, flat, 500.0, None, [0.1], device) for device in (None, torch.device('cpu'))
    )
    for step in range(1, 101):
        for averages in (here, there):
            averages.before_update()
        with torch.no_grad():
            flat.weights.add_(torch.randn_like(flat.weights), alpha=0.1)
        for averages in (here, there):
            averages.update(step * 64, 64)
    for name, vector in here.vectors.items():
        difference = (vector.cpu() - there.vectors[name].cpu()).abs().max().item()
        s.facts.append(f'{name} {difference:.1e}')
        assert difference < 1e-5


def a_step_that_is_not_finite_changes_nothing(s: Session) -> None:
    """And halves the loss scale; its count arrives on the host."""
    for optim in ('adam', 'radam'):
        flat = FlatParameters(torch.nn.Linear(64, 64).to(s.device))
        update, skips = WeightUpdate(flat, (0.9, 0.999), 1e-8, None, optim=optim), misc.AsyncScalar(s.device)
        before = flat.weights.detach().clone()
        flat.weights.grad.fill_(1.0)[5] = float('nan')
        update.step(1e-3)
        assert torch.equal(before, flat.weights.detach()) and update.scale.item() == DYNAMIC_START / 2
        flat.weights.grad.fill_(1.0)
        skips.read(update.consecutive_skips)
        if s.on_gpu:
            torch.cuda.synchronize()
        assert skips.read(update.consecutive_skips) == 1
        update.step(1e-3)
        moved = (before - flat.weights.detach())[: 64 * 64]
        assert moved.min() > 0 and update.consecutive_skips.item() == 0


def kernels_of_a_step(s: Session) -> None:
    """By the profiler, beside what the stand-in counts for the demo's network (benchmarks/RESULTS.md)."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.__main__ import read_blocks

    training = Training('demo', 128, s.device)
    training.use(WAYS['plain'])
    training.step(0, inside=False)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if s.on_gpu else [])]
    with profile(activities=activities) as trace:
        training.step(1, inside=False)
    kernels = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    counted = re.search(r'\| total \| ([0-9,]+)', read_blocks(ROOT / 'benchmarks' / 'RESULTS.md')['kernels'])
    s.facts.append(f'{len(kernels):,} kernels; counted on a stand-in {counted[1]}')
    assert kernels or not s.on_gpu


def the_peak_of_memory(s: Session) -> None:
    """ImageNet-64's ADM in FP16, beside the sum of parts that benchmarks/memory.py counts."""
    from benchmarks import memory

    size, batch = ('imagenet64-adm', 64) if s.on_gpu else ('demo', 2)
    counted = sum(memory.parts_of(size, '--precision=bf16', batch).values())  # FP16 takes as much
    if s.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        training = Training(size, batch, s.device)
        training.use(WAYS['fp16'])
        training.teacher = None  # a run holds only the one in half precision
        for number in range(2):
            training.step(number, inside=False)
        peak = torch.cuda.max_memory_allocated()
        s.facts.append(f'{peak / 1e9:.1f} GB, counted {counted / 1e9:.1f}')
        if peak > 1.3 * counted:
            raise Slow('temporary tensors take more than expected')


# ----------------------------------------------------------------------------
# Runs of the scripts.

NETWORK = '--arch=adm --cbase=16 --cres=1,2 --num_blocks=1 --attn_resolutions=none --dropout=0'
RUN = '--cond=1 --batch=128 --tick=6.4 --snap=1 --dump=1 --ema=10kimg --lr_rampup=1 --augment=0 --seed=0 --nosubdir'


def train(s: Session, name: str, *words, launcher: tuple[str, ...] = ()) -> Path:
    """A run in a folder of its own."""
    folder = s.outdir / name
    script = [*launcher, 'train.py', f'--outdir={folder}', f'--data={s.outdir / "digits.zip"}']
    s.command(name, *script, *RUN.split(), '--workers=2', *words)
    return folder


def last_snapshot(folder: Path) -> Path:
    return max(folder.glob('network-snapshot-*.pkl'))


def steps_wait_for_nothing(s: Session) -> None:
    """PyTorch itself raises where the host would wait."""
    out = s.command(
        'waits', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/test_step.py', '-k', 'gpu'
    )
    s.facts.append(out.strip().splitlines()[-1])


def a_teacher_and_a_student_train_and_resume(s: Session) -> None:
    """The student under torchrun, with averages on the host; resumed with twice the length."""
    s.command('digits', 'dataset_tool.py', '--source=digits', f'--dest={s.outdir / "digits.zip"}')
    half = '--precision=fp16' if s.on_gpu else '--precision=bf16'
    teacher = last_snapshot(train(s, 'teacher', *NETWORK.split(), half, '--duration=0.0256'))
    student = ['--consistency=True', f'--teacher={teacher}', '--S=4', half, '--phema=0.1', '--ema-device=cpu']
    launcher = '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1'
    folder = train(s, 'student', *student, '--duration=0.0128', launcher=launcher)
    s.command('resume', 'train.py', f'--resume={folder}', '--duration=0.0256', '--resume-override')
    ticks = [json.loads(line) for line in (folder / 'stats.jsonl').read_text().splitlines()]
    losses = [tick['Loss/cd']['mean'] for tick in ticks]
    s.facts.append(f'loss {losses[0]:.3g} to {losses[-1]:.3g}')
    assert len(losses) >= 4 and losses[-1] < losses[0]


def a_run_repeats_bit_for_bit(s: Session) -> None:
    """Two runs of --deterministic, and what it costs."""
    import hashlib

    digests, seconds = [], {}
    for name, words in (('first', ['--deterministic']), ('second', ['--deterministic']), ('free', [])):
        folder = train(s, name, *NETWORK.split(), '--duration=0.0256', *words)
        tensors = json.loads((folder / 'stats.jsonl').read_text().splitlines()[-1])
        seconds[name] = tensors['Timing/sec_per_kimg']['mean']
        digests.append(hashlib.sha256(snapshot_bytes(last_snapshot(folder))).hexdigest())
    s.facts.append(f'{seconds["second"]:.3g} s per kimg, {seconds["free"]:.3g} without the option')
    assert digests[0] == digests[1]


def snapshot_bytes(path: Path) -> bytes:
    """The tensors of a snapshot's network."""
    from training.checkpoint import load_network

    return b''.join(tensor.numpy().tobytes() for tensor in load_network(path).state_dict().values())


def samples_agree_compiled_and_eager(s: Session) -> None:
    """At most a few of 255 levels apart."""
    import numpy as np

    network, images = last_snapshot(s.outdir / 'student'), []
    for name, words in (('eager', []), ('compiled', ['--compile'] if s.on_gpu else [])):
        dest = s.outdir / f'{name}.npz'
        s.command(
            f'generate-{name}',
            'generate.py',
            f'--network={network}',
            f'--dest={dest}',
            '--seeds=0-255',
            '--batch=64',
            *words,
        )
        images.append(np.load(dest)['arr_0'].astype(int))
    difference = abs(images[0] - images[1]).max()
    s.facts.append(f'largest difference {difference} of 255')
    assert difference <= 8


# ----------------------------------------------------------------------------
# Speeds.


def a_half_precision_step_is_fast(s: Session) -> None:
    """ImageNet-64's ADM: share of the peak, and times plain; `benchmarks/step.py` without compilation."""
    from benchmarks.step import peak, total

    size, way = ('imagenet64-adm', 'fp16') if s.on_gpu else ('demo', 'bf16')
    small = [] if s.on_gpu else ['--batch=4']
    out = s.command(
        'step', 'benchmarks/step.py', f'--size={size}', f'--ways={way}', '--steps=5', '--json', *small
    )
    found = json.loads(out)
    fast, plain = (min(map(total, found['ways'][way][name]['steps'])) for name in (way, 'plain'))
    step, net = found['ways'][way][way]['steps'][0], found['operations']
    operations = step['plain_images'] * net['forward'] + step['differentiated_images'] * (
        net['forward'] + net['backward']
    )
    at_most = peak(s.device, WAYS[way].precision, tf32=False)
    share = operations / fast / at_most if at_most else None
    s.facts.append(f'{fast * 1e3:.1f} ms, {plain / fast:.2f} times plain')
    s.facts.append('peak of this GPU unknown' if share is None else f'{share:.1%} of the peak')
    if s.on_gpu and (plain / fast < SPEEDUP_AIM or (share is not None and share < MFU_AIM)):
        raise Slow(f'aims: {MFU_AIM:.0%} of the peak, {SPEEDUP_AIM} times plain')


def a_compiled_step_runs(s: Session) -> None:
    """CIFAR-10's DDPM++ with channels last and compilation, which takes a minute or two."""
    if not s.on_gpu:
        return
    out = s.command(
        'step-fast', 'benchmarks/step.py', '--size=cifar10-ddpmpp', '--ways=fp16-fast', '--steps=5'
    )
    s.facts += [line for line in out.splitlines() if line.startswith('| --precision=fp16 --channels_last')][
        -1:
    ]


CHECKS: tuple[Callable[[Session], None], ...] = (
    noise_is_the_same_however_a_batch_is_split,
    dropout_keeps_the_right_share_and_repeats,
    averages_on_the_host_equal_those_on_the_device,
    a_step_that_is_not_finite_changes_nothing,
    kernels_of_a_step,
    the_peak_of_memory,
    steps_wait_for_nothing,
    a_teacher_and_a_student_train_and_resume,
    samples_agree_compiled_and_eager,
    a_run_repeats_bit_for_bit,
    a_half_precision_step_is_fast,
    a_compiled_step_runs,
)
BY_NAME = {check.__name__: check for check in CHECKS}


def run_check(s: Session, check: Callable[[Session], None]) -> str:
    """Run a check and print its line. Returns: ok, slow, FAILED, or skipped for want of time."""
    s.facts = []
    start = time.monotonic()
    if start > s.deadline:
        outcome = 'skipped'
    else:
        try:
            check(s)
            outcome = 'ok'
        except Slow as aims:
            outcome = 'slow'
            s.facts.append(str(aims))
        except Exception as error:  # noqa: BLE001  (the other checks go on)
            outcome = 'FAILED'
            s.facts.append(f'{type(error).__name__} {error}'.strip())
            with open(s.outdir / f'{check.__name__}.error.txt', 'w') as file:
                traceback.print_exc(file=file)
    took, facts = time.monotonic() - start, '; '.join(s.facts)
    text = f'{outcome:8}{check.__name__.replace("_", " ")} ({took:.0f} s){": " if facts else ""}{facts}'
    click.echo(text)
    with open(s.outdir / 'report.txt', 'a') as file:
        file.write(f'{text}\n')
    return outcome


@click.command(cls=cli.Command)
@cli.option('--outdir', metavar='DIR', type=cli.PATH, default='gpu-check', show_default=True,
            help='New folder for the report and what commands print and write.')  # fmt: skip
@cli.option(
    '--only', 'names', metavar='LIST', type=NamesOf(BY_NAME), help='Checks to run, by name.  [default: all]'
)
@cli.option('--minutes', metavar='FLOAT', type=cli.POSITIVE, default=MINUTES, show_default=True,
            help='Skip the remaining checks after this time.')  # fmt: skip
@cli.option('--device', type=click.Choice(['cuda', 'cpu']), default='cuda', show_default=True,
            help='cpu: try the script itself, with small networks; shows nothing of a GPU.')  # fmt: skip
@cli.option('--list', 'listing', is_flag=True, help='Print the names of the checks and exit.')
def main(outdir, names, minutes, device, listing):
    """Check what only a GPU can show, in ten minutes on one."""
    if listing:
        click.echo('\n'.join(BY_NAME))
        return
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('There is no GPU that PyTorch can use. --device=cpu tries the script itself.')
    folder = Path(outdir)
    if folder.exists():
        raise UserError(f'--outdir={outdir} exists: choose another folder, or remove it.')
    folder.mkdir(parents=True)
    s = Session(torch.device(device), folder.resolve(), time.monotonic() + 60 * minutes)
    click.echo(machine())
    (folder / 'report.txt').write_text(f'{machine()}\n')
    outcomes = [run_check(s, BY_NAME[name]) for name in names or BY_NAME]
    if bad := [outcome for outcome in outcomes if outcome in ('FAILED', 'skipped')]:
        raise UserError(f'{len(bad)} of {len(outcomes)} checks failed or were skipped, see {folder}.')


if __name__ == '__main__':
    main()
