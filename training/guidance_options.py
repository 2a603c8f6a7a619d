"""The options of guidance, for sampling and for training. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import click

from dnnlib import cli
from dnnlib.options import opt
from dnnlib.schema import ListOf, Real
from training.saved_files import Snapshot

NONE_LABEL = 'none-label'  # in place of a snapshot: the network itself, without its label


class Guide(Snapshot):
    """A snapshot, or `none-label`."""

    def convert(self, value, param, ctx):
        return value if value == NONE_LABEL else super().convert(value, param, ctx)


class Interval(cli.NumberList):
    """Two rising noise levels LO,HI; LO may be 0."""

    schema = ListOf(Real(0, cli.SIGMA.max), 2, 2)

    def __init__(self):
        super().__init__(cli.Number(min=0, max=cli.SIGMA.max))

    def convert(self, value, param, ctx):
        levels = super().convert(value, param, ctx)
        if len(levels) != 2 or not levels[0] < levels[1]:
            self.fail(f'{cli.shown(value)} is not two noise levels LO,HI with LO below HI', param, ctx)
        return levels


@dataclass(frozen=True)
class GuidanceOptions:
    """How a diffusion model is guided, see `guidance.GuidedDenoiser`."""

    heading: ClassVar[str] = 'Guidance of diffusion models'

    guide: str | None = opt(
        None,
        Guide(),
        'Guide a diffusion model, in training the teacher: D_weak + w (D - D_weak), where D_weak is that of '
        'an unconditional, smaller or less trained snapshot, or with none-label of the model without its '
        'label (classifier-free guidance; needs training with --label_dropout).',
        flags=('--guide', '--gnet'),
        metavar='PKL|DIR|URL|none-label',
        key='guide',
    )
    guidance: float | None = opt(None, cli.FACTOR, 'Weight w of --guide; 1 has no effect.', key='guidance')
    guidance_interval: list[float] | None = opt(
        None,
        Interval(),
        'Noise levels at which --guide has an effect; at others w = 1.',
        metavar='LO,HI',
        default_text='all',
        key='guidance_interval',
    )

    def check_guidance(self) -> None:
        """Raises: click.UsageError if an option lacks another."""
        given = dict(guidance=self.guidance, guidance_interval=self.guidance_interval)
        stray = [f'--{name}' for name, value in given.items() if value is not None]
        if self.guide is None and stray:
            raise click.UsageError(
                f'{", ".join(stray)} needs --guide=PKL, or --guide={NONE_LABEL} (classifier-free guidance).'
            )
        if self.guide is not None and self.guidance is None:
            raise click.UsageError(f'--guide={self.guide} needs a weight: --guidance=W, such as 2.')

    def words(self) -> list[str]:
        """The options as on a command line."""
        limits = self.guidance_interval and ','.join(map(repr, self.guidance_interval))
        given = dict(guide=self.guide, guidance=self.guidance, guidance_interval=limits)
        return [f'--{name}={value}' for name, value in given.items() if value is not None]

    @property
    def guide_cost(self) -> int:
        """Network evaluations for each evaluation of the guided model."""
        return 1 if self.guide is None or self.guidance == 1 else 2


UNGUIDED = GuidanceOptions()


def checked(**values) -> GuidanceOptions:
    """The options of a command line. Raises: click.UsageError."""
    options = GuidanceOptions(**values)
    options.check_guidance()
    return options
