"""Small real data sets that scikit-learn brings along, as test beds for demo.py and compare.py: a network,
options, and metrics that suit them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dnnlib import EasyDict
from dnnlib.downloads import file_sha256, pinned
from experiments.runner import Metric, Runner
from training.objectives import OBJECTIVES

RESAMPLES = 200  # of each row's intervals, which small feature extractors make quick
COMMON = ['--workers=0', '--lr_schedule=cosine']
# All students alike; runs as short as these need a ramp-up.
STUDENT = ['--lr=1e-3', '--ema=20kimg', '--ema_rampup=0.05', '--lr_rampup=5']
# Per objective: pseudo-Huber because LPIPS was trained on photographs of many times the size, but the squared distance
# for cm-cd, whose chain of 17 edges it does not keep in motion; s1 such that about 2,000 steps can follow the growth of the
# grid; stored solutions of DPM-Solver++, which take half of the evaluations of Heun's; differences, which cost less than half
# of forward mode on CPUs.
PER_OBJECTIVE = {
    'mcd': ['--keep_ties', '--top-mass=0.5'],
    'direct': ['--top-mass=1'],
    'flowmap': ['--lr=2e-3', '--solver=dpmpp'],
    'cm-cd': ['--cm_loss=l2'],
    'cm-ct': ['--cm_loss=pseudo_huber', '--s1=20'],
    'ict': ['--s1=160'],
    'scd': ['--jvp=difference'],
    'sct': ['--jvp=difference'],
    'mm': ['--lr=1e-4'],
    'sid': ['--lr=1e-4'],
}


@dataclass(frozen=True)
class Bundled:
    """A data set that dataset_tool.py makes without a download, and how networks are trained on it.

    Attributes:
        name: `--source` of dataset_tool.py, and `--data` of compare.py.
        resolution, channels, classes: of the data set.
        making: further options of dataset_tool.py.
        held_out: options that make images of the same kind which training never sees; None if there are none.
        network: options of train.py that make the networks.
        teacher: options of the teacher's training besides those of the network.
        teacher_steps: optimizer steps of the teacher's training.
        batch: training batch size.
        images: number of images per measured model.
    """

    name: str
    resolution: int
    channels: int
    classes: int
    making: tuple[str, ...]
    held_out: tuple[str, ...] | None
    network: tuple[str, ...]
    teacher: tuple[str, ...]
    teacher_steps: int
    batch: int = 128
    images: int = 6000

    @property
    def metrics(self) -> dict[str, str]:
        """Descriptions of the metrics by name, the first the one that plots show."""
        held_out = {} if self.held_out is None else {'held-out': 'the classifier, against held-out images'}
        return {
            'classifier': f'{self.name} classifier, trained here',
            'pca': 'PCA of raw pixels',
            'random': 'fixed random convolution',
            **held_out,
        }

    def dataset(self, label_space) -> EasyDict:
        """What checks of a teacher need to know of the data set, before it is made."""
        return EasyDict(
            resolution=self.resolution,
            num_channels=self.channels,
            holds_latents=False,
            label_space=label_space,
        )


TEACHER = ('--lr=2e-3', '--ema=40kimg', '--augment=0', '--lr_rampup=20')
SMALL = ('--num_blocks=1', '--attn_resolutions=none', '--dropout=0')
DIGITS = Bundled(
    name='digits',
    resolution=8,
    channels=1,
    classes=10,
    making=(),
    held_out=None,
    network=('--arch=adm', '--cbase=16', '--cres=1,2', *SMALL),
    teacher=TEACHER,
    teacher_steps=4000,
)
PHOTOS = Bundled(
    name='photos',
    resolution=16,
    channels=3,
    classes=2,
    making=('--resolution=16x16',),
    held_out=('--resolution=16x16', '--split=test'),
    network=('--arch=adm', '--cbase=16', '--cres=1,2,2', *SMALL),
    teacher=TEACHER,
    teacher_steps=8000,
)
BUNDLED = {each.name: each for each in (DIGITS, PHOTOS)}


def student_options(objective: str, S: int | None = None) -> list[str]:
    """Options for a student of an objective, of S steps if their number is fixed; docs/results.md has the
    reasons.

    The digits' teacher is best with 12 to 16 Heun steps. mcd's grid therefore has at least 16 edges
    throughout, 10 if only two segments share them, and the sub-steps over all segments add up to at least 12.
    The photographs' students take the same options.
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


def prepare(bundled: Bundled, runner: Runner) -> tuple[Path, dict[str, Metric]]:
    """Make what is missing of the data set, the detectors and their reference statistics.

    Returns: the path of the data set; the metrics, the classifier's first.
    """
    data, file = runner.path(f'{bundled.name}.zip'), lambda name: str(runner.path('rulers', name))
    of_held_out = runner.path(f'{bundled.name}-test.zip')

    # Data sets, then detectors, which are trained on the first.
    for path, options in ((data, bundled.making), (of_held_out, bundled.held_out)):
        if options is not None and not path.exists():
            runner.run('data', 'dataset_tool.py', f'--source={bundled.name}', f'--dest={path}', *options)
    detector_names = [name for name in bundled.metrics if name != 'held-out']
    if not all(Path(file(f'{name}.pt')).exists() for name in detector_names):
        runner.run(
            'rulers', '-m', 'metrics.small_detectors', f'--data={data}', f'--outdir={runner.path("rulers")}'
        )

    # Detectors are programs, which the scripts run only under a digest.
    metrics = {}
    for name in bundled.metrics:
        detector = file(f'{"classifier" if name == "held-out" else name}.pt')
        metrics[name] = Metric(file(f'{name}.npz'), pinned(detector, file_sha256(detector)))
        if not Path(metrics[name].ref).exists():
            # Of all images, for recall and coverage.
            features = ['--features=10000'] if name == 'classifier' else []
            runner.run(
                'rulers',
                'fid.py',
                'ref',
                f'--data={of_held_out if name == "held-out" else data}',
                f'--dest={metrics[name].ref}',
                f'--detector={metrics[name].detector}',
                '--batch=256',
                *features,
            )
    return data, metrics
