"""Consistency training (Song et al. 2023, Algorithm 3): the network is trained to agree with its average at
the next lower level of the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from dnnlib import cli
from dnnlib.lazy import lazy_import
from dnnlib.options import opt
from training.objectives.consistency_model import CM_LOSSES, MU_SCHEDULES, ConsistencyModelState
from training.objectives.loss import student_and_target
from training.objectives.options import (
    CONSISTENCY_MODEL,
    EDM2_STUDENT,
    Config,
    ConsistencySampling,
    GrowingGrid,
    Objective,
    SyncDropout,
)

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
ops = lazy_import('training.consistency_ops')

NAME = 'cm-ct'


@dataclass(frozen=True)
class SongConfig(ConsistencySampling, SyncDropout, GrowingGrid):
    """Options of --objective=cm-ct, and of cm-cd besides its teacher."""

    N: int | None = opt(
        None,
        cli.LEVELS,
        'Number of grid nodes throughout training, with --mu0 as the decay (cm-cd, cm-ct).',
        default_text='cm-cd 18, unless --s0, --s1 or --schedule_steps let it grow; cm-ct: growing',
    )
    mu0: float = opt(
        0.9,
        cli.Number(0, 1, max_open=True),
        'Decay of the target network at the start (cm-cd, cm-ct); 0: the target is the network itself.',
    )
    mu_schedule: str = opt(
        'adaptive',
        click.Choice(MU_SCHEDULES),
        'The decay rises with the number of nodes (adaptive), or stays (cm-cd, cm-ct).',
        idle=('mu0', 0),
    )
    cm_loss: str = opt(
        'lpips',
        click.Choice(CM_LOSSES),
        "Distance between the network's image and its target (cm-cd, cm-ct).",
    )
    lpips: str | None = opt(
        None,
        cli.PATHS,
        "Weights of --cm_loss=lpips: torchvision's VGG16 and the lpips package's heads, joined by a comma; "
        'or one TorchScript file. '
        f'{cli.PROGRAM}',
        metavar='FILES|URLS',
        default_text='the published ones',
        needs=('cm_loss', 'lpips'),
    )

    @property
    def grows(self) -> bool:
        return self.N is None

    @classmethod
    def from_given(cls, given: Mapping[str, object]) -> Config:
        # --N and the options of a growing grid exclude each other.
        growing = sorted(given.keys() & {'s0', 's1', 'schedule_steps'})
        if 'N' in given and growing:
            raise click.UsageError(f'--N is a grid that stays as it is: leave out --{growing[0]}, or --N.')
        if 'mu_schedule' in given and (cls.N or 'N' in given) and not growing:
            raise click.UsageError(
                '--mu_schedule is for grids that grow: give --s0, --s1 or --schedule_steps as well, and no '
                '--N.'
            )
        # For cm-cd, whose N has a default, an option of a growing grid turns that off.
        return super().from_given(given | (dict(N=None) if growing else {}))


OBJECTIVE = Objective(SongConfig, defaults=CONSISTENCY_MODEL, edm2=EDM2_STUDENT, boundary=True)


def setup(c, teacher=None, net=None, perceptual=None) -> ConsistencyModelState:
    """Options: those of `ConsistencyModelState`."""
    return ConsistencyModelState(c, None, net, perceptual)


def loss(net, images: Tensor, labels, rng, state: ConsistencyModelState, augment_labels=None) -> Tensor:
    """Distance between the network at t and its target network at s, on one trajectory.

    ℓ(student(x_t; sigma_t), target(x_s; sigma_s))   (Song et al. 2023, Algorithm 3).

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    student, target = student_and_target(net, labels, augment_labels, rng, c.sync_dropout, state.target)

    # Neighbors sigma_t > sigma_s on the grid.
    edges = state.draw(rng)
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(edges.sigma_t, y) * noise

    with torch.no_grad():
        # Data: the same noise at the lower end of the edge.
        x_s = y + ops.expand_like(edges.sigma_s, y) * noise

        # Target network at the lower end.
        x_star = target(x_s, edges.sigma_s)

    # Loss.
    values = state.image_distance(student(x_t, edges.sigma_t), x_star)
    state.report(edges, values.detach())
    return values
