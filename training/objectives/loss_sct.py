"""Continuous-time consistency training (Lu & Song 2025): as distillation (`loss_scd`), with the velocity of each
image's own noise in place of a teacher's, which is its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnnlib.lazy import lazy_import
from training.objectives import continuous_time as continuous
from training.objectives.continuous_time import ContinuousConfig, ContinuousState
from training.objectives.loss import denoiser, dropout_masks
from training.objectives.options import CONTINUOUS, Objective

if TYPE_CHECKING:
    from torch import Tensor

ops = lazy_import('training.consistency_ops')
tangents = lazy_import('training.objectives.tangents')

NAME = 'sct'


@dataclass(frozen=True)
class ContinuousTrainingConfig(ContinuousConfig):
    """Options of --objective=sct."""


# fmt: off
OBJECTIVE = Objective(
    ContinuousTrainingConfig,
    defaults=dict(CONTINUOUS, dropout=0.2),
    differentiates=True,
)
# fmt: on


def setup(c, teacher=None, net=None, perceptual=None) -> ContinuousState:
    return ContinuousState(c, None, net)


def loss(net, images: Tensor, labels, rng, state: ContinuousState, augment_labels=None) -> Tensor:
    """Distance of the network from itself moved by the tangent, see `loss_scd.loss`   (Lu & Song 2025, Algorithm 1).

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c, masks = state.c, dropout_masks(net, rng)
    student = continuous.network_and_weight(net, c, labels, augment_labels, masks)
    frozen = denoiser(continuous.differentiable(net, c.jvp), labels, augment_labels, masks)

    # Data: X = cos t y + sin t z.
    sigma = state.draw_sigma(rng, images.device)
    t = tangents.time_of(sigma, c.sigma_data)
    y, z = images.double(), c.sigma_data * rng.normal('noise', images.shape[1:]).double()
    X = tangents.noisy(y, z, t)

    # Student: its derivative along the image's own velocity, times cos t sin t, and the tangent.
    dX = tangents.noise_velocity(y, z, t)
    rate = tangents.rate(t)
    F = continuous.velocity_field(frozen, c.sigma_data)
    F_now, dF = tangents.derivative(F, (X, t), (ops.expand_like(rate, X) * dX, rate), c.jvp)
    g = tangents.tangent(X, F_now, dX, dF, t, c.sigma_data, state.warmup)

    # Loss.
    F_trained, log_weight = student(X, t)
    step = F_trained - F_trained.detach() - tangents.normalized(g, c.tangent_c)
    values = log_weight.exp() * step.square().flatten(1).mean(dim=1) - log_weight
    continuous.report(state, sigma, g, log_weight.detach(), values.detach())
    return values
