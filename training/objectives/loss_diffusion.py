"""Diffusion losses: how teachers are trained (Karras et al. 2022, Table 1, 'Training')."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from dnnlib.lazy import lazy_import
from training.objectives.loss import State, dropout_masks, report_by_sigma

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
training_stats = lazy_import('torch_utils.training_stats')
ops = lazy_import('training.consistency_ops')
misc = lazy_import('torch_utils.misc')

NAME = 'diffusion'
DEFAULTS = dict(
    edm=dict(P_mean=-1.2, P_std=1.2, sigma_data=0.5),
    edm2=dict(P_mean=-0.4, P_std=1.0, sigma_data=0.5),
    vp=dict(beta_d=19.9, beta_min=0.1, epsilon_t=1e-5),
    ve=dict(sigma_min=0.02, sigma_max=100.0),
)


def setup(c, teacher=None, net=None, perceptual=None) -> State:
    """`c.kind` is one of DEFAULTS, whose options may be given otherwise."""
    options = {name: getattr(c, name, default) for name, default in DEFAULTS[c.kind].items()}
    return State(SimpleNamespace(kind=c.kind, **options))


def loss(net, images: Tensor, labels, rng, state: State, augment_labels=None) -> Tensor:
    """w(sigma) |D(y + sigma n; sigma) − y|², [N].

    EDM2's, for networks that estimate the logarithm u(sigma) of the weighted error of a value: w(sigma) / e^u
    |D − y|² + u for every value, so that all noise levels count the same throughout training (Karras et al.
    2024, Eq. 21, following Kendall et al. 2018).
    """
    sigma, weight = noise_levels(state.c, rng)
    noise = rng.normal('noise', images.shape[1:])
    noisy = images + ops.expand_like(sigma, images).to(images.dtype) * noise
    options = dict(augment_labels=augment_labels, dropout_masks=dropout_masks(net, rng))

    if state.c.kind == 'edm2':
        denoised, logvar = net(noisy, sigma, labels, **options, return_logvar=True)
        error = weight * (denoised - images).square().flatten(1).sum(dim=1)
        training_stats.report('Loss/weighted_error', error.detach())
        values = error / logvar.flatten().exp() + logvar.flatten() * images[0].numel()
    else:
        denoised = net(noisy, sigma, labels, **options)
        values = weight * (denoised - images).square().flatten(1).sum(dim=1)

    report_by_sigma(sigma, values.detach())
    return values


def noise_levels(c, rng) -> tuple[Tensor, Tensor]:
    """sigma and its weight, [N] float32 each.

    `edm`, `edm2`: ln sigma ~ N(P_mean, P_std²), weight 1/sigma² + 1/sigma_data². `vp`: t uniform in
    [epsilon_t, 1] under the variance-preserving SDE; `ve`: ln sigma uniform in [ln sigma_min, ln sigma_max];
    both with weight 1/sigma².
    """
    if c.kind in ('edm', 'edm2'):
        sigma = (rng.normal('sigma') * c.P_std + c.P_mean).exp()
        return sigma, sigma**-2 + c.sigma_data**-2
    u = misc.upload(rng.uniform('sigma'), rng.device)
    if c.kind == 'vp':
        t = 1 + u * (c.epsilon_t - 1)
        sigma = torch.expm1(c.beta_d * t**2 / 2 + c.beta_min * t).sqrt().float()
    else:
        sigma = (c.sigma_min * (c.sigma_max / c.sigma_min) ** u).float()
    return sigma, sigma**-2
