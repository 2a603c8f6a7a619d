"""One round of progressive distillation (Salimans & Ho 2022): a student of S steps learns to take in one step
what its teacher takes in two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from dnnlib import cli
from dnnlib.lazy import lazy_import
from dnnlib.options import opt
from training.objectives.edge_schedule import EdgeSchedule
from training.objectives.loss import denoiser, dropout_masks
from training.objectives.options import EDM2_STUDENT, Objective, Stages, Students, TeacherHop, usage_errors

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
ops = lazy_import('training.consistency_ops')
times = lazy_import('training.objectives.time_schedules')

NAME = 'pd'


def check_two_steps(student_grid: str, hop: str | Callable) -> None:
    """Raises: ValueError unless two steps of the teacher lead from one level of the student to the next."""
    if student_grid != 'full':
        raise ValueError(
            f'--student_grid={student_grid}: the rounds of pd are nested on full grids only; leave it out.'
        )
    if hop not in ('ddim', 'addim') and not callable(hop):
        raise ValueError(f'--hop={hop}: the teacher of pd takes its own steps, ddim or addim.')


@dataclass(frozen=True)
class ProgressiveConfig(Stages, Students, TeacherHop):
    """Options of --objective=pd."""

    S: int = 1
    student_grid: str = 'full'
    hop: str = 'ddim'
    cd_loss: str = 'l2'
    cd_weight_mode: str = 'truncated-snr'
    stage_steps: int | None = 50_000
    S_start: int = opt(
        512,
        cli.STEPS,
        'Sampling steps of the first student (pd), halved from round to round down to --S; its teacher is '
        'sampled in twice as many.',
        record=False,
    )

    def __post_init__(self):
        super().__post_init__()
        try:
            # Every round halves the number of steps: S_start is S times a power of two.
            times.halving_rounds(self.S_start, self.S, self.stage_steps)
        except ValueError as error:
            raise click.UsageError(
                f'--S_start={self.S_start}, --S={self.S}: {error}. Give a --S_start that is --S times a '
                'power of two.'
            ) from error
        with usage_errors():
            check_two_steps(self.student_grid, self.hop)

    def cost(self) -> float:
        # Two teacher steps, and the student's forward and backward pass. Only the first round's teacher is
        # guided.
        lengths = [steps for _, steps in times.halving_rounds(self.S_start, self.S, self.stage_steps)]
        return 2 + 3 + 2 * (self.guide_cost - 1) * lengths[0] / sum(lengths)


# fmt: off
OBJECTIVE = Objective(
    ProgressiveConfig,
    teacher='diffusion',
    defaults=dict(optim='adam', lr=2e-4, lr_rampup=0, lr_schedule='linear', beta2=0.999, batch=128, ema=0.5e6,
                  ema_rampup=0.05, augment=0.0),
    edm2=EDM2_STUDENT,
)
# fmt: on


def halving_edges(
    S: int, sigma_min: float, sigma_max: float, rho: float, spacing: str = 'karras'
) -> ops.Edges:
    """What progressive distillation to S steps learns (Salimans & Ho 2022, Algorithm 2): the student takes in
    one step what the teacher takes in two, from fine[2i] to fine[2i+1] and on to fine[2i+2].

    fine is the `full` grid of 2S steps; every second level of it is the `full` grid of S steps, whose very
    numbers stand here, because the student is sampled at them.

    Returns: [S] columns sigma_t = fine[2i], sigma_s = fine[2i+1], sigma_b = fine[2i+2], of the kind GENERAL.
    """
    coarse, fine = (ops.student_grid(n, sigma_min, sigma_max, rho, 'full', spacing) for n in (S, 2 * S))
    return ops.Edges(coarse[:-1], fine[1::2], coarse[1:], torch.arange(S), torch.full([S], ops.GENERAL))


class HalvingSchedule(EdgeSchedule):
    """Edges from each level of the student's `full` grid to the next by way of the level between them,
    equally likely.

    Args:
        c: S, student_grid, sigma_grid, rho, sigma_min, sigma_max of the student's grid, whose levels are
            every second one of the teacher's; hop, `ddim` or `addim`, and xvar_frac of aDDIM; cd_loss,
            cd_weight_mode, sigma_data.
        teacher: D(x, sigma, class_labels), frozen; evaluated only at the levels of the grid of 2 S steps.
    Raises: ValueError for grids that are not nested, and other hops.
    """

    def __init__(self, c, teacher):
        check_two_steps(c.student_grid, c.hop)
        super().__init__(c, teacher)

    def stage_after(self, nimg: int) -> int:
        return self.c.S

    def edges_at(self, stage: int):
        c = self.c
        edges = halving_edges(stage, c.sigma_min, c.sigma_max, c.rho, c.sigma_grid)
        return edges, torch.full([len(edges)], 1 / len(edges), dtype=torch.float64)


def setup(c, teacher, net=None, perceptual=None) -> HalvingSchedule:
    return HalvingSchedule(c, teacher)


def loss(net, images: Tensor, labels, rng, state: HalvingSchedule, augment_labels=None) -> Tensor:
    """Distance of the student's image from the one that leads where two steps of the teacher lead, x_b.

    w(sigma_t) ℓ(student(x_t; sigma_t) − x*), x* = inv_ddim(x_b, x_t, sigma_t, sigma_b)   (Salimans & Ho 2022,
    Algorithm 2).

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    student = denoiser(net, labels, augment_labels, dropout_masks(net, rng))
    teacher = denoiser(state.teacher, labels, augment_labels)

    # One step of the student sigma_t -> sigma_b per image; the teacher takes two, by way of sigma_s.
    edges = state.draw(rng)
    sigma_t, sigma_s, sigma_b = edges.sigma_t, edges.sigma_s, edges.sigma_b

    # Data: x_t = y + sigma_t n.
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(sigma_t, y) * noise

    with torch.no_grad():
        # Teacher: two solver steps.
        x_s = ops.teacher_hop(teacher, x_t, sigma_t, sigma_s, c.hop, None, y, c.xvar_frac)
        x_b = ops.teacher_hop(teacher, x_s, sigma_s, sigma_b, c.hop, None, y, c.xvar_frac)

        # Target: the denoised image from which one DDIM step leads to the same place.
        x_star = ops.inv_ddim(x_b, x_t, sigma_t, sigma_b, check=False)

    # Loss.
    distance = ops.image_distance(student(x_t, sigma_t) - x_star, c.cd_loss)
    values = ops.edge_weight(sigma_t, sigma_s, c.cd_weight_mode, c.sigma_data) * distance
    state.report(edges, values.detach())
    return values
