"""Continuous-time consistency distillation (Lu & Song 2025): the network's output is kept constant along the
teacher's ODE by its derivative, without a second noise level to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnnlib.lazy import lazy_import
from training.objectives import continuous_time as continuous
from training.objectives.continuous_time import ContinuousConfig, ContinuousState
from training.objectives.loss import denoiser, dropout_masks
from training.objectives.options import CONTINUOUS, GuidedTeacher, Objective

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
ops = lazy_import('training.consistency_ops')
tangents = lazy_import('training.objectives.tangents')

NAME = 'scd'


@dataclass(frozen=True)
class ContinuousDistillationConfig(ContinuousConfig, GuidedTeacher):
    """Options of --objective=scd."""

    def cost(self) -> float:
        return self.guide_cost + super().cost()


OBJECTIVE = Objective(ContinuousDistillationConfig, teacher='diffusion', defaults=CONTINUOUS)


def setup(c, teacher, net=None, perceptual=None) -> ContinuousState:
    return ContinuousState(c, teacher, net)


def loss(net, images: Tensor, labels, rng, state: ContinuousState, augment_labels=None) -> Tensor:
    """Distance of the network from itself moved by the tangent.

    (1/d) e^w(t) |F − sg[F + g/(|g| + c)]|² − w(t) for images of d values, F the network in TrigFlow's coordinates,
    w(t) its own estimate or 0   (Lu & Song 2025, Algorithm 1 and Eq. 8). Of distillation and, without a teacher, of
    training (`loss_sct`). With S segments F is told the lower end r of the one that holds sigma, where its step ends.
    Unlike other losses here a mean over an image's values, as in the paper: w, which the network learns, would otherwise
    grow with d.

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c, masks = state.c, dropout_masks(net, rng)

    # A step from sigma to r; two-time networks are told where it ends.
    sigma = state.draw_sigma(rng, images.device)
    r = state.lower_ends(sigma)
    t, s = (tangents.time_of(level, c.sigma_data) for level in (sigma, r))
    end = dict(r=r) if c.S is not None else {}
    student = continuous.network_and_weight(net, c, labels, augment_labels, masks, end)
    frozen = denoiser(continuous.differentiable(net, c.jvp), labels, augment_labels, masks)

    # Data: X = cos t y + sin t z.
    y, z = images.double(), c.sigma_data * rng.normal('noise', images.shape[1:]).double()
    X = tangents.noisy(y, z, t)

    with torch.no_grad():
        # The ODE's velocity: the teacher's, or without one on average the image's own.
        dX = tangents.noise_velocity(y, z, t)
        if state.teacher is not None:
            teacher = denoiser(state.teacher, labels, augment_labels)
            dX = c.sigma_data * continuous.velocity_field(teacher, c.sigma_data)(X, t)

    # Student: its derivative along the ODE, times cos(t − s) sin(t − s), and the tangent.
    rate = tangents.rate(t, s)
    F = continuous.velocity_field(lambda x, sigma: frozen(x, sigma, **end), c.sigma_data)
    F_now, dF = tangents.derivative(F, (X, t), (ops.expand_like(rate, X) * dX, rate), c.jvp)
    g = tangents.tangent(X, F_now, dX, dF, t, c.sigma_data, state.warmup, s)

    # Loss.
    F_trained, log_weight = student(X, t)
    step = F_trained - F_trained.detach() - tangents.normalized(g, c.tangent_c)
    values = log_weight.exp() * step.square().flatten(1).mean(dim=1) - log_weight
    continuous.report(state, sigma, g, log_weight.detach(), values.detach())
    return values
