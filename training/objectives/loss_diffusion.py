"""Diffusion losses: how teachers are trained (Karras et al. 2022, Table 1, 'Training')."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from dnnlib import cli
from dnnlib.lazy import lazy_import
from dnnlib.options import opt
from training.objectives.loss import State, dropout_masks, report_by_sigma
from training.objectives.options import LogNormal, Objective, by_width

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
training_stats = lazy_import('torch_utils.training_stats')
ops = lazy_import('training.consistency_ops')
misc = lazy_import('torch_utils.misc')

NAME = 'diffusion'


@dataclass(frozen=True)
class DiffusionConfig(LogNormal):
    """Options of --objective=diffusion, whose loss is selected by --precond. Those of EDM and EDM2 draw ln
    sigma from a normal distribution."""

    P_mean: float | None = -1.2
    P_std: float | None = 1.2
    label_dropout: float = opt(
        0.0,
        cli.Number(0, 1, max_open=True),
        'Share of images that are trained without their label, so that the network also denoises without '
        'one, as --guide=none-label needs (diffusion).',
        later=True,
    )


# fmt: off
# EDM2's presets (Karras et al. 2024); durations are in 2^20 images there.
MI = 2**20 / 1e6
EDM2_TEACHERS = by_width(
    lr=dict(XS=12e-3, S=10e-3, M=9e-3, L=8e-3, XL=7e-3),
    dropout=dict(XS=0.0, S=0.0, M=0.1, L=0.1, XL=0.1),
    duration=dict(XS=1024 * MI, S=1024 * MI, M=2048 * MI, L=1024 * MI, XL=640 * MI),
)
EDM2_LATENT_TEACHERS = by_width(
    lr=dict(XS=12e-3, S=10e-3, M=9e-3, L=8e-3, XL=7e-3, XXL=6.5e-3),
    dropout=dict(XS=0.0, S=0.0, M=0.1, L=0.1, XL=0.1, XXL=0.1),
    duration=dict(XS=2048 * MI, S=2048 * MI, M=2048 * MI, L=1792 * MI, XL=1280 * MI, XXL=896 * MI),
)
OBJECTIVE = Objective(
    DiffusionConfig,
    defaults=dict(optim='adam', lr=10e-4, lr_rampup=10_000, lr_schedule='constant', beta2=0.999, duration=200.0, batch=512,
                  ema=0.5e6, ema_rampup=0.05, augment=0.12, dropout=0.13),
    edm2=dict(lr_schedule='sqrt', lr_decay=35_000, beta2=0.99, batch=2048, augment=0.0, phema=[0.05, 0.1], P_mean=-0.8, P_std=1.6),
    edm2_latents=dict(lr_decay=70_000, P_mean=-0.4, P_std=1.0),
    edm2_sizes=EDM2_TEACHERS,
    edm2_latent_sizes=EDM2_LATENT_TEACHERS,
)
# fmt: on
DEFAULTS = dict(
    edm=dict(P_mean=DiffusionConfig.P_mean, P_std=DiffusionConfig.P_std, sigma_data=0.5),
    edm2=dict(P_mean=-0.4, P_std=1.0, sigma_data=0.5),
    vp=dict(beta_d=19.9, beta_min=0.1, epsilon_t=1e-5),
    ve=dict(sigma_min=0.02, sigma_max=100.0),
)


def setup(c, teacher=None, net=None, perceptual=None) -> State:
    """`c.kind` is one of DEFAULTS; attributes of `c` override its options. Of label_dropout see
    `drop_labels`."""
    options = {name: getattr(c, name, default) for name, default in DEFAULTS[c.kind].items()}
    return State(SimpleNamespace(kind=c.kind, label_dropout=getattr(c, 'label_dropout', 0.0), **options))


def loss(net, images: Tensor, labels, rng, state: State, augment_labels=None) -> Tensor:
    """Weighted squared error of the denoised image.

    w(sigma) |D(y + sigma n; sigma) − y|²   (Karras et al. 2022, Eq. 2). EDM2: w(sigma) / e^u |D − y|² + u per
    value, where the network estimates the logarithm u(sigma) of the weighted error of a value, so that all
    noise levels count the same throughout training   (Karras et al. 2024, Eq. 21, following Kendall et al.
    2018).

    Args: see `training.objectives.loss`.
    Returns: [N].
    """
    labels = drop_labels(labels, rng, state.c.label_dropout)

    # Noisy images.
    sigma, weight = noise_levels(state.c, rng)
    noise = rng.normal('noise', images.shape[1:])
    noisy = images + ops.expand_like(sigma, images).to(images.dtype) * noise
    options = dict(augment_labels=augment_labels, dropout_masks=dropout_masks(net, rng))

    # Loss; EDM2's networks also estimate its logarithm.
    if state.c.kind == 'edm2':
        denoised, logvar = net(noisy, sigma, labels, **options, return_logvar=True)
        error = weight * (denoised - images).square().flatten(1).sum(dim=1)
        training_stats.report('Loss/weighted_error', error.detach())
        # The estimate u is per value, the error a sum over values.
        values = error / logvar.flatten().exp() + logvar.flatten() * images[0].numel()
    else:
        denoised = net(noisy, sigma, labels, **options)
        values = weight * (denoised - images).square().flatten(1).sum(dim=1)

    report_by_sigma(sigma, values.detach())
    return values


def drop_labels(labels: Tensor | None, rng, share: float) -> Tensor | None:
    """Labels [N, label_dim], each replaced by zeros with probability `share`   (Ho & Salimans 2022,
    Algorithm 1)."""
    if not share or labels is None:
        return labels
    keep = misc.upload(rng.uniform('label dropout') >= share, labels.device)
    return labels * keep[:, None]


def noise_levels(c, rng) -> tuple[Tensor, Tensor]:
    """Noise levels sigma and their loss weights, [N] float32 each.

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
