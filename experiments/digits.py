"""Scikit-learn's digits as a test bed for demo.py and compare.py: a network, options, and metrics that suit
them."""

from __future__ import annotations

from pathlib import Path

from dnnlib.downloads import file_sha256, pinned
from experiments.runner import Metric, Runner
from training.objectives import OBJECTIVES

METRICS = dict(
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
# All students alike; runs as short as these need a ramp-up.
STUDENT = ['--lr=1e-3', '--ema=20kimg', '--ema_rampup=0.05', '--lr_rampup=5']
# Per objective: pseudo-Huber because LPIPS was trained on photographs, and s1 such that about 2,000 steps can
# follow the growth of the grid.
PER_OBJECTIVE = {
    'mcd': ['--keep_ties', '--top-mass=0.5'],
    'direct': ['--top-mass=1'],
    'cm-cd': ['--cm_loss=pseudo_huber'],
    'cm-ct': ['--cm_loss=pseudo_huber', '--s1=20'],
    'ict': ['--s1=160'],
}


def student_options(objective: str, S: int | None = None) -> list[str]:
    """Options for a student of an objective, of S steps if their number is fixed; docs/results.md has the
    reasons.

    The digits' teacher is best with 12 to 16 Heun steps. mcd's grid therefore has at least 16 edges
    throughout, 10 if only two segments share them, and the sub-steps over all segments add up to at least 12.
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
        *PER_OBJECTIVE.get(objective, []),
        *edges,
        *substeps,
    ]


def prepare(runner: Runner) -> tuple[Path, dict[str, Metric]]:
    """Make what is missing of the data set, the detectors and their reference statistics.

    Returns: the path of the data set; the metrics, the classifier's first.
    """
    data, file = runner.path('digits.zip'), lambda name: str(runner.path('rulers', name))
    metrics = {name: Metric(file(f'{name}.npz'), file(f'{name}.pt')) for name in METRICS}

    # Data set, then detectors, which are trained on it.
    if not data.exists():
        runner.run('data', 'dataset_tool.py', '--source=digits', f'--dest={data}')
    if not all(Path(metric.detector).exists() for metric in metrics.values()):
        runner.run('rulers', '-m', 'metrics.rulers', f'--data={data}', f'--outdir={runner.path("rulers")}')

    # Detectors are programs, which the scripts run only under a digest.
    metrics = {
        name: metric._replace(detector=pinned(metric.detector, file_sha256(metric.detector)))
        for name, metric in metrics.items()
    }
    for metric in metrics.values():
        if not Path(metric.ref).exists():
            runner.run(
                'rulers',
                'fid.py',
                'ref',
                f'--data={data}',
                f'--dest={metric.ref}',
                f'--detector={metric.detector}',
                '--batch=256',
            )
    return data, metrics
