"""The digits as a test bed, of demo.py and compare.py: a network and options that suit them, and rulers that
mean something on them."""

from __future__ import annotations

from pathlib import Path

from dnnlib.downloads import file_sha256, pinned
from experiments.runner import Ruler, Runner
from training.objectives import OBJECTIVES

RULERS = dict(
    classifier='digits classifier, trained here', pca='PCA of raw pixels', random='fixed random convolution'
)
BATCH = 128
NETWORK = [
    '--arch=adm',
    '--cbase=16',
    '--cres=1,2',
    '--num_blocks=1',
    '--attn_resolutions=none',
    '--dropout=0',
]
COMMON = ['--workers=0', '--lr_schedule=cosine']
TEACHER_STEPS, TEACHER = 4000, [*NETWORK, '--lr=2e-3', '--ema=40kimg', '--augment=0', '--lr_rampup=20']
STUDENT = [
    '--lr=1e-3',
    '--ema=20kimg',
    '--ema_rampup=0.05',
    '--lr_rampup=5',
]  # runs as short as these, and all alike, want a ramp-up
OWN = {
    'mcd': ['--keep_ties', '--top-mass=0.5'],
    'direct': ['--top-mass=1'],
    'cm-cd': ['--cm_loss=pseudo_huber'],
    'cm-ct': ['--cm_loss=pseudo_huber', '--s1=20'],  # LPIPS has seen photographs
    'ict': ['--s1=160'],
}  # grids that 2,000 steps can follow


def student_options(objective: str, S: int | None = None) -> list[str]:
    """What suits a student, of S steps where it has a number of its own; why, is in docs/results.md.

    A teacher of digits is best in 12 to 16 Heun steps: so many edges has the grid of distillation throughout,
    fewer where only two segments share them, and so many are the sub-steps over all segments.
    """
    own = OBJECTIVES[objective].options
    substeps = [f'--{name}={max(2, -(-12 // S))}' for name in ('substeps', 'anchor_hops') if name in own]
    edges = (
        [f'--{name}={10 if S == 2 else max(16, S)}' for name in ('T_start', 'T_end')]
        if objective == 'mcd'
        else []
    )
    return [
        *STUDENT,
        *(['--student_grid=full'] if 'student_grid' in own else []),
        *OWN.get(objective, []),
        *edges,
        *substeps,
    ]


def prepare(runner: Runner) -> tuple[Path, dict[str, Ruler]]:
    """Data, rulers and their reference statistics, where they are not there yet; returns the data set and the
    rulers, the classifier first."""
    data, file = runner.path('digits.zip'), lambda name: str(runner.path('rulers', name))
    rulers = {name: Ruler(file(f'{name}.npz'), file(f'{name}.pt')) for name in RULERS}
    if not data.exists():
        runner.run('data', 'dataset_tool.py', '--source=digits', f'--dest={data}')
    if not all(Path(ruler.detector).exists() for ruler in rulers.values()):
        runner.run('rulers', '-m', 'metrics.rulers', f'--data={data}', f'--outdir={runner.path("rulers")}')
    rulers = {
        name: ruler._replace(detector=pinned(ruler.detector, file_sha256(ruler.detector)))
        for name, ruler in rulers.items()
    }
    for ruler in rulers.values():
        if not Path(ruler.ref).exists():
            runner.run(
                'rulers',
                'fid.py',
                'ref',
                f'--data={data}',
                f'--dest={ruler.ref}',
                f'--detector={ruler.detector}',
                '--batch=256',
            )
    return data, rulers
