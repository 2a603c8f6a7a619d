"""Score identity distillation (Zhou et al. 2024b): a student of one step, learned without data. Experimental.

Where the student's images are distributed as the teacher's, the two have the same denoiser at every noise level. That
of the student's images is an auxiliary network's, which trains on them in turn with the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from data.label_space import parse_ranges
from dnnlib import cli
from dnnlib.lazy import lazy_import
from dnnlib.options import opt, recorded
from dnnlib.schema import Maybe, Text
from training.objectives.auxiliary import AlternatingState
from training.objectives.loss import denoiser, report_levels
from training.objectives.options import (
    STUDENT,
    AuxiliaryNetwork,
    GuidedTeacher,
    LogNormal,
    NoiseGrid,
    Objective,
)

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
grids = lazy_import('training.grids')
misc = lazy_import('torch_utils.misc')
ops = lazy_import('training.consistency_ops')
times = lazy_import('training.objectives.time_schedules')

NAME = 'sid'
MOST_CLASSES = 1 << 20
LEAST_SCALE = 1e-5  # of the mean distance that a loss is divided by


@dataclass(frozen=True)
class ScoreIdentityConfig(AuxiliaryNetwork, LogNormal, NoiseGrid, GuidedTeacher):
    """Options of --objective=sid. P_mean and P_std are of the auxiliary network's noise levels."""

    heading: ClassVar[str] = 'Score identity distillation (--objective=sid; experimental)'

    P_mean: float | None = -1.2
    P_std: float | None = 1.2
    sigma_init: float = opt(2.5, cli.SIGMA, 'Noise level of the one step, in training and in sampling (sid).')
    alpha: float = opt(
        1.2, cli.FACTOR, "Factor on the squared difference of the two networks in the student's loss (sid)."
    )
    u_max: float = opt(
        0.8,
        cli.Number(0, 1, min_open=True),
        "Share of the Karras noise levels, from the lowest up, that the student's loss is taken at (sid).",
    )
    classes: str | None = recorded(None, Maybe(Text(longest=1 << 20)))

    def cost(self) -> float:
        # Student and auxiliary network; or the student, and forward and backward passes of both denoisers, without
        # gradients of their weights.
        return ((1 + 3) + (3 + 2 * self.guide_cost + 2)) / 2

    def first_cost(self) -> float:
        # More turns of the auxiliary network, which are cheaper.
        return self.aux_ahead * (4 - self.cost())


OBJECTIVE = Objective(
    ScoreIdentityConfig,
    teacher='diffusion',
    # Rates of the paper's CIFAR-10 models; the length is ours.
    defaults=dict(STUDENT, beta1=0.0, lr=1e-5, lr_rampup=0, batch=256, ema=0.5e6, duration=100.0),
    auxiliary=True,
)


class ScoreIdentityState(AlternatingState):
    """Turns, labels and noise levels.

    Args:
        c: sigma_init, alpha, u_max; sigma_min, sigma_max, rho; P_mean, P_std; classes, those with images, such as
            '0-2,5', or None for labels that are no classes; and those of `AlternatingState`.
    """

    def __init__(self, c, teacher):
        super().__init__(c, teacher)
        self.present = None if c.classes is None else torch.tensor(parse_ranges(c.classes, MOST_CLASSES))

    def draw_labels(self, labels: Tensor | None, rng) -> Tensor | None:
        """[N, label_dim] one-hot, uniform over the classes that have images. Vectors stay those of the data."""
        if labels is None or self.present is None:
            return labels
        drawn = self.present[torch.from_numpy(rng.uniform('label') * len(self.present)).long()]
        one_hot = torch.nn.functional.one_hot(drawn, labels.shape[1])
        return misc.upload(one_hot.float().numpy(), labels.device)

    def draw_sigma(self, rng, device) -> Tensor:
        """[N] float64 noise levels of the loss of the network whose turn it is."""
        c = self.c
        if self.trains_auxiliary:
            return times.lognormal_times(misc.upload(rng.normal_on_host('sigma'), device), c.P_mean, c.P_std)
        u = misc.upload(rng.uniform('sigma') * c.u_max, device)
        return grids.level_at(u, c.sigma_min, c.sigma_max, c.rho)


def setup(c, teacher, net=None, perceptual=None) -> ScoreIdentityState:
    return ScoreIdentityState(c, teacher)


def loss(net, images: Tensor, labels, rng, state: ScoreIdentityState, augment_labels=None) -> Tensor:
    """Auxiliary network's turn: EDM's loss on the student's images x, w(sigma) |x − g(z)|². Student's turn:

    (D(z) − g(z))ᵀ ((D(z) − x) − alpha (D(z) − g(z))) / mean|x − D(z)|,

    z = x + sigma n, D the teacher, g the auxiliary network, and gradients through both; the divisor, of each image, has
    none   (Zhou et al. 2024b, Algorithm 1).

    Args: see `training.objectives.loss`. Of the images only the shape matters.
    Returns: [N] float64.
    """
    c, shape = state.c, images.shape[1:]
    labels = state.draw_labels(labels, rng)
    student, auxiliary = state.networks_of(net, labels, augment_labels, rng, through=True)

    # Student: an image from noise alone.
    sigma_init = torch.full([len(images)], c.sigma_init, dtype=torch.float64, device=images.device)
    x = student(c.sigma_init * rng.normal('noise', shape).double(), sigma_init)

    # The same image, noised.
    sigma = state.draw_sigma(rng, images.device)
    z = x + ops.expand_like(sigma, x) * rng.normal('image noise', shape)

    # Loss.
    if state.trains_auxiliary:
        weight = ops.edge_weight(sigma, sigma, 'edm', c.sigma_data)
        values = weight * ops.image_distance(x - auxiliary(z, sigma), 'l2')
        report_levels(sigma, values.detach())
        return values
    D, g = denoiser(state.teacher, labels, augment_labels)(z, sigma), auxiliary(z, sigma)
    scale = (x - D).detach().abs().flatten(1).mean(dim=1).clamp(min=LEAST_SCALE)
    return ((D - g) * ((D - x) - c.alpha * (D - g))).flatten(1).sum(dim=1) / scale
