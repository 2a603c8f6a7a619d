"""Training steps, sampling and validation on a stand-in for a GPU, as one program, of which `test_gpu_step` reads what it prints.

    python -m tests.gpu_steps DIGITS.zip FOLDER [CASE...]

Needs the environment of `gpu_stand_in.guarded_environment`. Prints one JSON object: for each case, of `CASES`, the
lines that made the host wait for the device, or mixed devices; for `memory: ...` the peak of a step, and for the stand-in
itself what it found.
"""

import contextlib
import functools
import io
import json
import os
import sys
from pathlib import Path

import torch

import generate
from benchmarks import gpu_stand_in, kernels
from metrics import lpips
from metrics.calc import compute_features
from metrics.detectors import Detector
from metrics.generated import GeneratedImages
from metrics.inception import FIDInception
from sampling import generation
from torch_utils import misc, training_stats
from training import command_line, configuration, dry_run, execution, networks, rounds, starting_point
from training.checkpoint import save_snapshot
from training.guidance import GuidedDenoiser
from training.networks import edm2, switched
from training.objectives import OBJECTIVES
from training.profiling import StepProfile
from training.setup import set_up
from training.training_loop import prefetch, train_step

CLASSES = 10
LARGER = '--cbase=64 --cres=1,2 --num_blocks=1 --attn_resolutions=8 --dropout=0.1 --phema=0.05,0.1'
MEMORY = {
    'plain': f'--arch=adm {LARGER} --augment=0',
    'FP16': f'--arch=adm {LARGER} --augment=0 --precision=fp16',
    'checkpointed': f'--arch=adm {LARGER} --augment=0 --checkpoint-activations',
    'averages on the host': f'--arch=adm {LARGER} --augment=0 --ema-device=cpu --precision=bf16',
    'EDM2': f'--arch=edm2 {LARGER} --precision=fp16',
    'a target network': f'--objective=cm-ct --arch=adm {LARGER} --augment=0 --mu0=0.9 --cm_loss=l2 --N=8',
    'a teacher': '--objective=mcd --phema=0.05,0.1 --precision=fp16 --anchor_hops=2 --S=4 --T_start=8 --T_end=8',
}
NETWORK = dict(model_channels=32, channel_mult=[1], num_blocks=1, attn_resolutions=[8], dropout=0.1)
# Two rounds of gradients a step, and schedules that change from the first step to the second.
COMMON = '--cond=1 --batch=32 --lr_rampup=0 --ema=10kimg --workers=0 --seed=0'
SIZE = '--cbase=32 --cres=1 --num_blocks=1 --attn_resolutions=8'
ADM = f'--arch=adm {SIZE} --augment=0'
MCD = '--objective=mcd --anchor_hops=2 --S=4 --T_start=8 --T_end=16 --T_anneal_kimg=0.032'
TRAINING = {
    'diffusion': f'--arch=adm {SIZE} --augment=0.1 --precision=fp16',
    'diffusion, labels dropped': f'{ADM} --label_dropout=0.1',
    'diffusion, edm2': f'--arch=edm2 {SIZE} --precision=fp16 --phema=0.05,0.1',
    'diffusion, vp': f'--arch=ddpmpp --precond=vp {SIZE} --precision=bf16 --grad-clip=1',
    'diffusion, ve': f'--arch=ncsnpp --precond=ve {SIZE} --optim=radam',
    'mcd': f'{MCD} --precision=fp16 --phema=0.05,0.1 --tf32',
    'mcd, averages on the host': f'{MCD} --precision=fp16 --hop=addim --ema-device=cpu',
    'mcd, half at the tops': f'{MCD} --precision=bf16 --keep_ties --top-mass=0.5 --checkpoint-activations',
    'mct': f'--objective=mct {ADM} --S=4 --T_start=8 --T_end=16 --T_anneal_kimg=0.032 --optim=radam --precision=fp16',
    'mcd, guided': f'{MCD} --precision=fp16 --guide=none-label --guidance=2 --guidance_interval=0.1,10',
    'direct': '--objective=direct --S=4 --substeps=2 --precision=fp16',
    'flowmap, tangent': '--objective=flowmap --target=tangent --jvp=difference --T=8 --precision=fp16',
    'flowmap': '--objective=flowmap --target=mixed --T=8 --reuse=2 --precision=fp16',
    'direct, guided': '--objective=direct --S=4 --substeps=2 --guide={folder}/guide.pkl --guidance=2',
    'pd': '--objective=pd --S=4 --S_start=8 --stage_steps=8 --precision=fp16',
    'cm-cd': '--objective=cm-cd --precision=fp16 --mu0=0.9',
    'cm-cd, lpips': '--objective=cm-cd --precision=fp16 --cm_loss=lpips --lpips=random',
    'cm-ct': f'--objective=cm-ct {ADM} --schedule_steps=4 --s1=8 --cm_loss=pseudo_huber',
    'ict': f'--objective=ict {ADM} --schedule_steps=4 --s0=4 --s1=16 --precision=fp16',
    'ect': f'--objective=ect {ADM} --stage_steps=1 --precision=fp16',
    'tcm': '--objective=tcm --stage_steps=1 --precision=fp16',
    'scd': '--objective=scd --tangent_warmup=4 --jvp=difference --precision=fp16',
    'scd, guided': '--objective=scd --guide={folder}/guide.pkl --guidance=2 --jvp=difference --precision=bf16',
    'mm': '--objective=mm --S=4 --precision=fp16',
    'mm, guided': '--objective=mm --S=4 --mm_times=uniform --guide={folder}/guide.pkl --guidance=2',
    'sid': '--objective=sid --precision=fp16 --ema-device=cpu',
    'sct': f'--objective=sct {ADM} --jvp=difference --tangent_weight=prior --checkpoint-activations',
}


def build(arch: str) -> torch.nn.Module:
    torch.manual_seed(0)
    classes = {'adm': networks.EDMPrecond, 'two networks': networks.EDMPrecond, 'edm2': edm2.Precond}
    return classes[arch](8, 1, CLASSES, **NETWORK)


def write_teachers(folder: Path) -> None:
    """A diffusion model, a guide for it, and what `tcm` starts from, a consistency model."""
    net = build('adm').eval()
    save_snapshot(folder / 'diffusion.pkl', net, objective='diffusion', nimg=0, kimg=0, label_dropout=0.1)
    save_snapshot(folder / 'guide.pkl', build('edm2').eval(), objective='diffusion', nimg=0, kimg=0)
    sampling = dict(solver='cm', sigmas=[80.0, 2.0, 0.0])
    save_snapshot(folder / 'consistency.pkl', net, objective='ect', nimg=0, kimg=0, **sampling)


def configured(options: str, data: str, folder: Path):
    """(configuration, training set, teacher) of a run with these options."""
    words = [f'--outdir={folder}', f'--data={data}', *COMMON.split()]
    words += [word.format(folder=folder) for word in options.split()]
    objective = command_line.objective_in(words) or 'diffusion'
    words += [] if objective == 'pd' else ['--duration=0.000128']
    if (kind := OBJECTIVES[objective].teacher) is not None:
        words.append(f'--teacher={folder / kind}.pkl')
    o = command_line.parse(words)
    if objective == 'pd':
        o = next(rounds.rounds(o, str(folder)))
    dataset = configuration.open_dataset(o.run)
    teacher = starting_point.load_teacher(o, dataset) if o.teacher else None
    teacher = starting_point.guided_teacher(o, teacher)
    o = configuration.resolve_defaults(o, dataset, teacher, None)
    return configuration.configure(o, dataset, teacher), dataset, teacher


def waits_in_training(case: str, data: str, folder: Path) -> list[str]:
    """Of the step after each network's first: the first allocates what stays, and makes the first edges."""
    c, dataset, teacher = configured(TRAINING[case], data, folder)
    with gpu_stand_in.gpu() as device, contextlib.redirect_stdout(io.StringIO()):
        run = set_up(c, str(folder), dataset, teacher, None)
        prefetcher, profile = prefetch(run, None), StepProfile(0, '', run.device, {}, print)
        for _ in run.trained:
            train_step(run, prefetcher, profile)
        # Statistics that are queued are also taken in.
        training_stats.AT_ONCE, skips = 1, misc.AsyncScalar(run.device)
        device.reset()
        skips.read(run.consecutive_skips)
        for _ in run.trained:
            train_step(run, prefetcher, profile)
        found = device.findings.lines()
        assert next(run.student.net.parameters()).is_cuda and sum(device.kernels.values()) > 100
        run.averages.flush()
    training_stats.AT_ONCE = 32
    training_stats.reset()
    return found


def memory_of_training(options: str, data: str, folder: Path) -> dict[str, float]:
    """Peak of the step after each network's first, and what --dry-run says of it, in MB."""
    c, dataset, teacher = configured(options, data, folder)
    with gpu_stand_in.gpu(track_memory=True) as device, contextlib.redirect_stdout(io.StringIO()):
        said = dry_run.memory_facts(c, starting_point.on_meta(c.network), teacher)
        run = set_up(c, str(folder), dataset, teacher, None)
        prefetcher, profile = prefetch(run, None), StepProfile(0, '', run.device, {}, print)
        for _ in run.trained:
            train_step(run, prefetcher, profile)
        device.reset()
        for _ in run.trained:
            train_step(run, prefetcher, profile)
        run.averages.flush()
    training_stats.reset()
    return dict(said=said['device_total'] * dry_run.GIB / 1e6, peak=device.peak / 1e6)


def waits_beyond_the_first(device: gpu_stand_in.StandIn, call) -> list[str]:
    """What waits more often in `call(3)` batches than in one: waits at the beginning and at the end do not count."""
    counted = []
    for batches in (1, 3):
        device.reset()
        call(batches)
        counted.append(device.findings)
    counted[1].waits.subtract(counted[0].waits)
    counted[1].waits = +counted[1].waits
    return counted[1].lines()


class Nowhere:
    """A destination of images that are not written."""

    parts = None

    def __getattr__(self, name):
        return lambda *args: None


def waits_in_sampling(arch: str, solver: str) -> list[str]:
    """Of generate.py, by batch."""
    with gpu_stand_in.gpu() as device, contextlib.redirect_stdout(io.StringIO()):
        arch, _, guide = arch.partition(' guided by ')
        net = execution.in_precision(build(arch).eval().requires_grad_(False), 'fp16').to('cuda')
        net.metadata = {}
        if arch == 'two networks':
            net = switched.Switched(net, build('adm').eval().requires_grad_(False).to('cuda'), 1.0)
        if guide:
            weak = None if guide == 'itself' else build(guide).eval().requires_grad_(False).to('cuda')
            net = GuidedDenoiser(net, weak, 2.0, (0.001, 10.0))
        arguments = dict(choose_labels=generation.uniform_labels, solver=solver, steps=2)
        return waits_beyond_the_first(
            device,
            lambda batches: generate.generate_all(
                net, list(range(8 * batches)), 8, Nowhere(), Nowhere(), False, arguments, fill=True
            ),
        )


def waits_in_validation() -> list[str]:
    """Of validation and fid.py, by batch: features of generated images."""
    with gpu_stand_in.gpu() as device:
        net = execution.in_precision(build('adm').eval().requires_grad_(False), 'fp16').to('cuda')
        net.metadata = {}
        inception = FIDInception().eval().requires_grad_(False).to('cuda')
        detector = Detector(inception, 'Inception', '', torch.device('cuda', 0))
        images = lambda batches: GeneratedImages(
            net, range(8 * batches), 8, generation.uniform_labels, solver='euler', steps=2
        )
        return waits_beyond_the_first(
            device, lambda batches: compute_features(images(batches), {'': detector}, 8)
        )


SAMPLING = [
    ('adm', 'heun'),
    ('adm', 'student'),
    ('adm', 'cm'),
    ('adm', 'addim'),
    ('two networks', 'cm'),
    ('adm', 'ipndm'),
    ('adm', 'dpmpp'),
    ('edm2', 'euler'),
    ('adm guided by itself', 'heun'),
    ('adm guided by edm2', 'dpmpp'),
]

# ----------------------------------------------------------------------------
# What the stand-in must see, must not see, and counts. A call with a tensor [4], and what is found.

WAITS = {
    'item': (lambda x: x.sum().item(), 'item()'),
    'a truth value': (lambda x: bool(x.sum() > 0), 'item()'),
    'an index': (lambda x: [0, 1, 2, 3][x.argmax()], 'item()'),
    'a list': (lambda x: x.tolist(), 'copy to pageable memory'),
    'a copy to the host': (lambda x: x.cpu(), 'copy to pageable memory'),
    'a copy into pageable memory': (
        lambda x: torch.empty(4).copy_(x, non_blocking=True),
        'copy to pageable memory',
    ),
    'a blocking copy into pinned memory': (
        lambda x: torch.empty(4, pin_memory=True).copy_(x),
        'copy to pinned memory',
    ),
    'an upload': (lambda x: x + torch.ones(4).to('cuda'), 'blocking copy from pageable memory'),
    'an upload without pinning': (
        lambda x: torch.ones(4).to('cuda', non_blocking=True),
        'copy from pageable memory',
    ),
    'a blocking upload': (
        lambda x: torch.ones(4).pin_memory().to('cuda'),
        'blocking copy from pinned memory',
    ),
    'a constant': (lambda x: torch.tensor([1.0, 2.0], device='cuda'), 'blocking copy from pageable memory'),
    'a mask as an index': (lambda x: x[x > 0], 'indexing by a mask'),
    'nonzero': (lambda x: x.nonzero(), 'nonzero()'),
    'equality': (lambda x: torch.equal(x, x), 'equal()'),
    'synchronize': (lambda x: torch.cuda.synchronize(), 'torch.cuda.synchronize()'),
}


def found_in(call) -> list[str]:
    with gpu_stand_in.gpu() as device, contextlib.suppress(RuntimeError):
        call(torch.ones(4, device='cuda'))
    return device.findings.lines()


def no_wait(x) -> None:
    pinned = torch.ones(4, pin_memory=True).to('cuda', non_blocking=True) * torch.tensor(2.0)
    torch.empty(4, pin_memory=True).copy_(pinned, non_blocking=True)
    x[torch.arange(4).pin_memory().to('cuda', non_blocking=True)] = 0
    torch.randn(4, device='cuda', generator=torch.Generator('cuda').manual_seed(0))
    torch.ones(3).sum().item()  # of the host


def counts() -> dict:
    with gpu_stand_in.gpu(track_memory=True) as device:
        x, w, b = (torch.ones(shape, device='cuda') for shape in ([2, 4, 8, 8], [4, 4, 3, 3], [4]))
        device.reset()
        y = torch.nn.functional.conv2d(x, w, b, padding=1).flatten(1).t()
        found = dict(kernels=dict(device.kernels), layouts=dict(device.layouts))
        found['with output'] = device.allocated
        del y
        return found | dict(without=device.allocated, peak=device.peak)


def channels_last() -> dict[str, bool]:
    """Whether networks on the GPU run in that format, plainly and compiled."""
    found = {}
    with gpu_stand_in.gpu():
        for arch in ('adm', 'edm2'):
            net = build(arch).to('cuda')
            found[arch] = execution.run_with(net, channels_last=True).channels_last
            found[f'{arch}, compiled'] = execution.run_with(
                net, channels_last=True, compiled=True
            ).channels_last
    return found


# {case: what it calls with the data set and the folder}
CASES = {
    **{case: functools.partial(waits_in_training, case) for case in TRAINING},
    **{f'memory: {case}': functools.partial(memory_of_training, options) for case, options in MEMORY.items()},
    **{
        f'generate {arch} {solver}': lambda *_, given=(arch, solver): waits_in_sampling(*given)
        for arch, solver in SAMPLING
    },
    'validation': lambda *_: waits_in_validation(),
    **{f'wait: {name}': lambda *_, call=call: found_in(call) for name, (call, _) in WAITS.items()},
    'no wait': lambda *_: found_in(no_wait),
    'mixed devices': lambda *_: found_in(lambda x: x + torch.ones(4)),
    'counts': lambda *_: counts(),
    'channels last': lambda *_: channels_last(),
    'kernels': lambda *_: kernels.count('demo', 'plain'),
}


def main(data: str, folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    lpips.load = lambda paths, device: lpips.LPIPS().to(device)
    configuration.check_perceptual = lambda c: None
    write_teachers(Path(folder))
    print(json.dumps({case: CASES[case](data, Path(folder)) for case in cases or CASES}))


if __name__ == '__main__':
    main(*sys.argv[1:])
    gpu_stand_in.leave()
    # Without the interpreter's own end, which one run in five did not survive ('terminate called'): threads of
    # the stand-in's device outlive it.
    sys.stdout.flush()
    os._exit(0)
