"""Presets of train.py: options by name for an objective, a network and a data set. `--list-presets` shows them.

Figures of others name their paper and its table, and are left out where the papers at hand give none. Imports
no PyTorch.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import click

from dnnlib import cli

WIDTH = 100  # columns of --list-presets

# ----------------------------------------------------------------------------
# Where numbers come from.

SYSTEM = 'README of github.com/EpiGenomicsCode/edm'
HEEK, SONG = 'Heek et al. 2024', 'Song et al. 2023'
ECT, TCM, ICT = 'Geng et al. 2024', 'Lee et al. 2025', 'Song & Dhariwal 2023'
SCM = 'Lu & Song 2025: noise levels, warm-up, normalization, second step; lengths and rates are ours'
MM = 'Salimans et al. 2024: Adam, rate, warm-up, clipping, batch and times; noise levels and length are ours'
SID = 'Zhou et al. 2024b: noise levels, alpha, rate and batch; length is ours'
HERE = 'the settings of make demo'  # of this repository


def released(fid: str) -> dict[str, str]:
    """The released student, whose README says how long it was trained, but no hours."""
    return dict(
        paper=SYSTEM, published=f'FID {fid} ({SYSTEM})', time='157 Mimg on 32 H100; hours not given there'
    )


def heek(fid: str, table: int = 1, steps_per_second: str = '') -> dict[str, str]:
    """Heek et al.'s FID and speed, which are of other networks, schedule and hardware."""
    source = f'of its own network (UViT, small, cosine schedule, aDDIM; {HEEK}, Table {table})'
    speed = f'200,000 steps at {steps_per_second} a second of its own network on 64 TPUv5e ({HEEK}, A.2)'
    return dict(
        paper=f'{HEEK}, with numbers of the {SYSTEM}' if table == 1 else f'{HEEK}; Salimans & Ho 2022',
        published=f'FID {fid} {source}',
        time=speed if steps_per_second else '',
    )


def song(one: str, two: str, table: int, steps: str) -> dict[str, str]:
    """Song et al.'s FID with one evaluation and with two."""
    return dict(
        paper=f'{SONG}, Table 3',
        published=f'FID {one} with 1 evaluation, {two} with 2 ({SONG}, Table {table})',
        time=f'{steps} GPUs; hours not given there',
    )


def lu(two: str) -> dict[str, str]:
    """Lu & Song's FID with two evaluations."""
    return dict(published=f'FID {two} with 2 evaluations of its own network (Lu & Song 2025, abstract)')


def salimans(eight: str) -> dict[str, str]:
    """Salimans et al.'s FID with eight evaluations."""
    return dict(published=f'FID {eight} with 8 evaluations of its own network (Salimans et al. 2024)')


# ----------------------------------------------------------------------------
# Networks that students start from.

EDM = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-'
EDM2 = 'https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img64-'
ADM_TEACHER = f'{EDM}imagenet-64x64-cond-adm.pkl'
VP_TEACHER, VE_TEACHER = f'{EDM}cifar10-32x32-uncond-vp.pkl', f'{EDM}cifar10-32x32-uncond-ve.pkl'

# ----------------------------------------------------------------------------
# Options that several presets share.

# fmt: off
DATA = {'imagenet64': dict(cond=True), 'cifar10': {}, 'digits': dict(cond=True, batch=128, workers=0, seed=0, lr_schedule='cosine')}
NETWORKS = {
    'adm': dict(arch='adm', precond='edm'), 'ddpmpp': dict(arch='ddpmpp', precond='edm'), 'ncsnpp': dict(arch='ncsnpp', precond='edm'),
    'edm2-s': dict(arch='edm2', cbase=192), 'edm2-m': dict(arch='edm2', cbase=256), 'edm2-l': dict(arch='edm2', cbase=320),
    'edm2-xl': dict(arch='edm2', cbase=384),
    'digits': dict(arch='adm', cbase=16, cres=[1, 2], num_blocks=1, attn_resolutions=[], dropout=0),
}
# The published command, without what names files, and the number of steps.
MCD = dict(
    batch=2048, batch_gpu=64, fp16=True, ema=50, ema_rampup=0.05, lr=8e-5, phema=[0.05, 0.10], phema_snap=60, sampling_mode='edm',
    dropout=0.20, dout_resolutions=[16, 8], duration=210, terminal_anchor=True, terminal_teacher_hop=True, teacher=ADM_TEACHER,
    T_start=64, T_end=1280, T_anneal_kimg=104800, rho=7, sigma_min=0.002, sigma_max=80, cd_loss='pseudo_huber',
    cd_weight_mode='sqrt_karras', val=True, val_every=20, val_at_start=False, val_teacher=False, snap=20, dump=20, workers=4)
MCT = {name: value for name, value in MCD.items() if name not in ('teacher', 'terminal_anchor', 'terminal_teacher_hop', 'val_teacher')}
# All numbers that the paper of the reimplementation gives; the rounds are as long as by default.
PD = dict(batch=2048, hop='addim', S=1, teacher=ADM_TEACHER)
# Song et al. 2023, Table 3. Their EMA at 64x64 decays by 0.999943 a step of 2048 images: a half-life of 25 Mimg.
CM_64 = dict(mu0=0.95, batch=2048, lr=8e-6, ema='25Mimg', fp16=True, dropout=0)
CD_64, CT_64 = dict(CM_64, N=40, duration=1228.8, teacher=ADM_TEACHER), dict(CM_64, s0=2, s1=200, duration=1638.4)
CM_32 = dict(batch=512, lr=4e-4, duration=409.6)
CD_32, CT_32 = dict(CM_32, N=18, mu0=0, teacher=VE_TEACHER), dict(CM_32, mu0=0.9, s0=2, s1=150)
# ECT's EDM2 models, whose rate, dropout and stages follow from the width; TCM's second stages.
ECT_64 = dict(batch_gpu=32, tf32=True, mid_t=1.526, clip_denoised=False, tick=6.4, snap=500, dump=500)
TCM_64 = dict(batch=1024, lr_decay=8000, ema=7.097, fp16=True, phema=[0.1])
SCM_64 = dict(batch=2048, P_std=1.6, fp16=True, dropout=0)
MM_64 = dict(S=8, mm_times='uniform', batch=2048, lr=2e-6, lr_rampup=2048, lr_schedule='linear', beta1=0.0, beta2=0.99,
             grad_clip=1.0, fp16=True, dropout=0, teacher=ADM_TEACHER)
# The demo's students of digits.
DIGITS = dict(lr=1e-3, ema='20kimg', ema_rampup=0.05, lr_rampup=5, student_grid='full')
MCD_8, DIRECT_8 = dict(DIGITS, keep_ties=True, top_mass=0.5), dict(DIGITS, top_mass=1)
# fmt: on
SMALL = (
    'for any preset, as in --preset=cifar10-cm-cd,small-gpu: less memory, the same batch; where the loss '
    'needs FP32 (ict, ect), add --fp16=False'
)

# ----------------------------------------------------------------------------
# The table.


@dataclass(frozen=True)
class Preset:
    """A line of the table.

    Attributes:
        objective: its name; None for options that go with any preset.
        network, data: keys of NETWORKS and DATA.
        own: options by name, besides those of network and data. Files of your own are never among them.
        paper: whose settings these are.
        published: figures of others, with their source; empty: none in the papers at hand.
        time: how long it takes, with its source; empty: not given there.
        needs: the preset whose snapshot --teacher has to name, where none is offered for download.
    """

    objective: str | None
    network: str | None
    data: str | None
    own: Mapping[str, object]
    paper: str
    published: str = ''
    time: str = ''
    needs: str = ''

    @property
    def options(self) -> dict[str, object]:
        """{option: value}."""
        if self.objective is None:
            return dict(self.own)
        return dict(objective=self.objective) | DATA[self.data] | NETWORKS.get(self.network, {}) | self.own


# fmt: off
PRESETS = {
    # ImageNet-64, from EDM's ADM. Below 8 steps on the full grid: the other one's last step is at sigma_min.
    'imagenet64-mcd8': Preset('mcd', 'adm', 'imagenet64', dict(MCD, S=8, val_steps=8, seed=1959836853), **released('2.3')),
    'imagenet64-mcd16': Preset('mcd', 'adm', 'imagenet64', dict(MCD, S=16), **heek('1.5', steps_per_second='2.5')),
    'imagenet64-mcd4': Preset('mcd', 'adm', 'imagenet64', dict(MCD, S=4, student_grid='full'), **heek('1.7', steps_per_second='2.5')),
    'imagenet64-mcd2': Preset('mcd', 'adm', 'imagenet64', dict(MCD, S=2, student_grid='full'), **heek('2.0', steps_per_second='2.5')),
    'imagenet64-mcd1': Preset('mcd', 'adm', 'imagenet64', dict(MCD, S=1), **heek('4.3', steps_per_second='2.5')),
    'imagenet64-mct8': Preset('mct', 'adm', 'imagenet64', dict(MCT, S=8, transfer=ADM_TEACHER), **heek('1.5', steps_per_second='2.7')),
    'imagenet64-pd': Preset('pd', 'adm', 'imagenet64', PD, **heek('10.7, 4.7, 2.4, 1.8 with 1, 2, 4, 8 evaluations', table=3)),
    'imagenet64-cm-cd': Preset('cm-cd', 'adm', 'imagenet64', CD_64, **song('6.20', '4.70', table=2, steps='600,000 steps on 64')),
    'imagenet64-cm-ct': Preset('cm-ct', 'adm', 'imagenet64', CT_64, **song('13.0', '11.1', table=2, steps='800,000 steps on 64')),
    'imagenet64-scd': Preset('scd', 'adm', 'imagenet64', dict(SCM_64, teacher=ADM_TEACHER), SCM),
    'imagenet64-sct': Preset('sct', 'adm', 'imagenet64', dict(SCM_64, transfer=ADM_TEACHER), SCM, **lu('1.48')),
    'imagenet64-mm8': Preset('mm', 'adm', 'imagenet64', MM_64, MM, **salimans('1.24')),
    # ImageNet-64, from EDM2's networks.
    'imagenet64-edm2-s-ect': Preset('ect', 'edm2-s', 'imagenet64', dict(ECT_64, transfer=f'{EDM2}s-1073741-0.075.pkl'), ECT),
    'imagenet64-edm2-m-ect': Preset('ect', 'edm2-m', 'imagenet64', dict(ECT_64, transfer=f'{EDM2}m-2147483-0.060.pkl'), ECT),
    'imagenet64-edm2-l-ect': Preset('ect', 'edm2-l', 'imagenet64', dict(ECT_64, transfer=f'{EDM2}l-1073741-0.040.pkl'), ECT),
    'imagenet64-edm2-xl-ect': Preset('ect', 'edm2-xl', 'imagenet64', dict(ECT_64, transfer=f'{EDM2}xl-0671088-0.040.pkl'), ECT),
    'imagenet64-edm2-s-tcm': Preset('tcm', 'edm2-s', 'imagenet64', dict(TCM_64, lr=5e-4, duration=122.88), TCM, needs='imagenet64-edm2-s-ect'),
    'imagenet64-edm2-xl-tcm': Preset('tcm', 'edm2-xl', 'imagenet64', dict(TCM_64, lr=1e-4, duration=40.96), TCM, needs='imagenet64-edm2-xl-ect'),
    # CIFAR-10.
    'cifar10-cm-cd': Preset('cm-cd', 'ncsnpp', 'cifar10', CD_32, **song('3.55', '2.93', table=1, steps='800,000 steps on 8')),
    'cifar10-cm-ct': Preset('cm-ct', 'ncsnpp', 'cifar10', CT_32, **song('8.70', '5.83', table=1, steps='800,000 steps on 8')),
    'cifar10-ict': Preset('ict', 'ncsnpp', 'cifar10', {}, ICT),
    'cifar10-ect': Preset('ect', 'ddpmpp', 'cifar10', dict(mid_t=0.821, transfer=VP_TEACHER), ECT),
    'cifar10-tcm': Preset('tcm', 'ddpmpp', 'cifar10', dict(batch=1024, duration=204.8), TCM, needs='cifar10-ect'),
    'cifar10-scd': Preset('scd', 'ddpmpp', 'cifar10', dict(teacher=VP_TEACHER), SCM),
    'cifar10-sct': Preset('sct', 'ddpmpp', 'cifar10', dict(transfer=VP_TEACHER), SCM, **lu('2.06')),
    'cifar10-sid': Preset('sid', 'ddpmpp', 'cifar10', dict(dropout=0, teacher=VP_TEACHER), SID),
    # Digits: minutes on a CPU.
    'digits-teacher': Preset('diffusion', 'digits', 'digits', dict(lr=2e-3, ema='40kimg', augment=0, lr_rampup=20, duration=0.512), HERE),
    'digits-mcd8': Preset('mcd', None, 'digits', dict(MCD_8, S=8, T_start=16, T_end=16, anchor_hops=2, duration=0.16), HERE, needs='digits-teacher'),
    'digits-mcd4': Preset('mcd', None, 'digits', dict(MCD_8, S=4, T_start=16, T_end=16, anchor_hops=3, duration=0.128), HERE, needs='digits-teacher'),
    'digits-mcd2': Preset('mcd', None, 'digits', dict(MCD_8, S=2, T_start=10, T_end=10, anchor_hops=6, duration=0.1024), HERE, needs='digits-teacher'),
    'digits-direct8': Preset('direct', None, 'digits', dict(DIRECT_8, S=8, substeps=2, duration=0.128), HERE, needs='digits-teacher'),
    'digits-direct2': Preset('direct', None, 'digits', dict(DIRECT_8, S=2, substeps=6, duration=0.0576), HERE, needs='digits-teacher'),
    'digits-direct1': Preset('direct', None, 'digits', dict(DIRECT_8, S=1, substeps=12, duration=0.0384), HERE, needs='digits-teacher'),
    # For any of them.
    'small-gpu': Preset(None, None, None, dict(batch_gpu=16, fp16=True, checkpoint_activations=True, ema_device='cpu'), paper=SMALL),
}
# fmt: on


def options_of_presets(names: str) -> dict[str, object]:
    """{option: value} of presets joined by commas, of which later ones take precedence.

    Raises: click.UsageError for an unknown name, or two presets of objectives.
    """
    found, chosen = {}, []
    for name in names.split(','):
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, 1)
            similar = f' Did you mean {close[0]}?' if close else ''
            raise click.UsageError(
                f'--preset: there is no preset {cli.shown(name)}.{similar} --list-presets shows all.'
            )
        # Of two values of an option the later preset's.
        if PRESETS[name].objective:
            chosen.append(name)
        found |= PRESETS[name].options
    if len(chosen) > 1:
        raise click.UsageError(
            f'--preset={names}: {" and ".join(chosen)} each name an objective. Take one of them; only '
            'small-gpu goes with another preset.'
        )
    return found


def objective_of_presets(names: str) -> str | None:
    """The objective of known presets; None if they name none."""
    return options_of_presets(names).get('objective')


def table(spelled: Callable[[str, object], str]) -> str:
    """What --list-presets prints; `spelled(name, value)` is an option as on a command line."""
    return '\n\n'.join(described(name, preset, spelled) for name, preset in PRESETS.items())


def described(name: str, preset: Preset, spelled: Callable[[str, object], str]) -> str:
    """A preset in a few lines: origin, start, time, figures, options."""
    options = dict(preset.options)
    # The network that it starts from is an entry of its own.
    start = options.pop('teacher', None) or options.pop('transfer', None)
    lines = dict(paper=preset.paper)
    if preset.objective:
        needed = f'a snapshot of --preset={preset.needs}' if preset.needs else 'random weights'
        here = 'README.md and docs/results.md' if preset.data == 'digits' else 'not trained'
        lines['starts from'] = start or needed
        lines['time'] = preset.time
        lines['published'] = f'{preset.published or "no figure in the papers at hand"}; here: {here}'
    lines['options'] = ' '.join(spelled(option, value) for option, value in options.items())

    # One entry a paragraph, its lines aligned.
    paragraphs = [
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f'  {title}:'.ljust(16),
            subsequent_indent=' ' * 16,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for title, text in lines.items()
        if text
    ]
    return '\n'.join([name, *paragraphs])
