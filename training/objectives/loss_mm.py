"""Moment matching (Salimans et al. 2024, Algorithm 2): a student of k steps of ancestral sampling. Experimental.

The student's images, noised again as sampling would noise them, shall have the teacher's denoised images on average.
What they have on average is what an auxiliary denoiser learns, which trains in turn with the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import click

from dnnlib.lazy import lazy_import
from dnnlib.options import opt, recorded
from dnnlib.schema import OneOf
from training.choices import MM_TIMES
from training.objectives.auxiliary import AlternatingState
from training.objectives.loss import denoiser, report_levels
from training.objectives.options import (
    STUDENT,
    AuxiliaryNetwork,
    GuidedTeacher,
    Objective,
    SpacedGrid,
    StudentSteps,
)

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
grids = lazy_import('training.grids')
misc = lazy_import('torch_utils.misc')
ops = lazy_import('training.consistency_ops')

NAME = 'mm'


@dataclass(frozen=True)
class MomentMatchingConfig(AuxiliaryNetwork, StudentSteps, SpacedGrid, GuidedTeacher):
    """Options of --objective=mm."""

    heading: ClassVar[str] = 'Moment matching (--objective=mm; experimental)'
    sampling: ClassVar[tuple[str, ...]] = ('sampler',)

    sampler: str = recorded('ancestral', OneOf(('ancestral',)))
    sigma_grid: str = 'cosine'
    mm_times: str = opt(
        'grid',
        click.Choice(MM_TIMES),
        'Time t at which the student denoises, given the time s of the moments: uniform in [s, s + 1/S] as '
        'published, or the next time above s at which sampling evaluates it (mm).',
    )

    def __post_init__(self):
        super().__post_init__()
        if self.S == 1 and self.mm_times == 'uniform':
            raise click.UsageError(
                '--mm_times=uniform with --S=1 does not train the one step that sampling takes: use '
                '--mm_times=grid.'
            )

    def cost(self) -> float:
        # In both turns the teacher, one network without gradients, and the other with them.
        return self.guide_cost + 1 + 3


# fmt: off
OBJECTIVE = Objective(
    MomentMatchingConfig,
    teacher='diffusion',
    # Rates and batch of the paper's ImageNet models; the length is ours.
    defaults=dict(STUDENT, beta1=0.0, beta2=0.99, lr=2e-6, lr_rampup=2048, lr_schedule='linear', grad_clip=1.0, duration=409.6),
    auxiliary=True,
)
# fmt: on


class MomentMatchingState(AlternatingState):
    """Turns, and the pairs of times.

    Args:
        c: S, mm_times; sigma_min, sigma_max, rho, sigma_grid of the levels sigma(u), u in [0, 1]; and those of
            `AlternatingState`.
    """

    def draw_levels(self, rng) -> tuple[Tensor, Tensor]:
        """[N] float64 sigma(s) and sigma(t): s ~ U(0, 1), and t above it by up to 1/S."""
        c = self.c
        s, up = (torch.from_numpy(rng.uniform(purpose)) for purpose in ('time', 'time step'))
        t = (s + up / c.S).clamp(max=1) if c.mm_times == 'uniform' else (s * c.S).ceil() / c.S
        levels = grids.level_at(torch.stack([s, t]), c.sigma_min, c.sigma_max, c.rho, c.sigma_grid)
        return tuple(misc.upload(levels.numpy(), rng.device))


def setup(c, teacher, net=None, perceptual=None) -> MomentMatchingState:
    return MomentMatchingState(c, teacher)


def loss(net, images: Tensor, labels, rng, state: MomentMatchingState, augment_labels=None) -> Tensor:
    """Auxiliary network's turn: w(s) (|x − g(z_s)|² + |D(z_s) − g(z_s)|²). Student's turn: w(s) xᵀ sg[g(z_s) − D(z_s)].

    x = G(z_t) is the student's image, z_s a sample of the state at s given z_t and x, D the teacher, g the auxiliary
    network, w(s) = 1/sigma² + 1/sigma_d²   (Salimans et al. 2024, Algorithm 2). The student's loss has the gradient
    that matters, and no meaning as a number.

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    student, auxiliary = state.networks_of(net, labels, augment_labels, rng)
    teacher = denoiser(state.teacher, labels, augment_labels)

    # Data: z_t = y + sigma_t n.
    sigma_s, sigma_t = state.draw_levels(rng)
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    z_t = y + ops.expand_like(sigma_t, y) * noise

    # Student: an image, from which ancestral sampling steps down to z_s.
    x = student(z_t, sigma_t)
    with torch.no_grad():
        step_noise = rng.normal('step noise', images.shape[1:])
        z_s = ops.ancestral_step(z_t, x, sigma_t, sigma_s, step_noise)

        # Teacher: the image on average, were z_s a noised image of the data.
        D = teacher(z_s, sigma_s)
    g = auxiliary(z_s, sigma_s)

    # Loss.
    weight = ops.edge_weight(sigma_s, sigma_s, 'edm', c.sigma_data)
    if state.trains_auxiliary:
        values = weight * (ops.image_distance(x - g, 'l2') + ops.image_distance(D - g, 'l2'))
        report_levels(sigma_s, values.detach())
        return values
    return weight * (x * (g - D)).flatten(1).sum(dim=1)
