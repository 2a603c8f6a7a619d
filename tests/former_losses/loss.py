"""Diffusion losses: how teachers are trained (Karras et al. 2022, Table 1, 'Training').

A loss is called as `loss_fn(net, images, labels, draws, augment_labels)` with images [N, C, H, W] in [-1, 1], one-hot labels [N, label_dim] and the
samples' random numbers (`training.draws.SampleDraws`), and returns one loss per image, [N], summed over its values.
"""

from __future__ import annotations

import numpy as np
import torch

from torch_utils import training_stats
from torch_utils.flat import FlatParameters
from training.consistency_ops import expand_like
from training.draws import upload

SIGMA_BIN_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SIGMA_BINS = [
    f'{low:g}-{high:g}' for low, high in zip((0, *SIGMA_BIN_EDGES), (*SIGMA_BIN_EDGES, float('inf')))
]


def report_by_sigma(sigma: torch.Tensor, loss: torch.Tensor) -> None:
    """Report each image's loss under the bin of noise levels that it falls in, as `Loss/sigma_<low>-<high>`."""
    edges = upload(np.array(SIGMA_BIN_EDGES), sigma.device).to(sigma.dtype)
    training_stats.report_bins(
        [f'Loss/sigma_{name}' for name in SIGMA_BINS], torch.bucketize(sigma.contiguous(), edges), loss
    )


class Loss:
    """What the training loop asks of a loss besides `loss_fn(net, images, labels, draws, augment_labels) -> [N]`. Nothing, here."""

    name: str  # under which the loop reports it, as `Loss/<name>`
    gap_option = ''  # of train.py, by which `self_target_gap` goes; empty where the network is not compared with itself
    few_sizes = False  # whether networks are to see few sizes of batches on a CPU too, because they are compiled for each

    def networks(self) -> list[torch.nn.Module]:
        """Those of its own that it asks, besides the one that trains and the teacher it was given."""
        return []

    def attach(self, net: torch.nn.Module, weights: FlatParameters) -> None:
        """Meet the network that trains, with its first weights, before the first step or before `load_state_dict`."""

    def begin_step(self, nimg: int) -> None:
        """The next optimizer step follows `nimg` images."""

    def end_step(self) -> None:
        """The weights are new."""

    def self_target_gap(self, nimg: int) -> float | None:
        """Median of 1 − r/t over the pairs of times whose outputs the step after `nimg` images compares; None: it compares no two outputs."""
        return None

    def sampled(self, net: torch.nn.Module) -> torch.nn.Module:
        """What makes images with `net`, an average of the network that trains: `net` itself, where it can do so alone."""
        return net

    def state_dict(self) -> dict:
        """Tensors and plain data that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""


class DiffusionLoss(Loss):
    """Weighted denoising error w(sigma) |D(y + sigma n; sigma) − y|²; subclasses give `noise_levels(draws)` and `weight(sigma)`."""

    name = 'diffusion'

    def __call__(self, net, images, labels, draws, augment_labels=None):
        sigma = self.noise_levels(draws)
        noisy = images + expand_like(sigma, images).to(images.dtype) * draws.normal('noise', images.shape[1:])
        loss = self.compare(
            self.predict(net, noisy, sigma, labels, augment_labels, student_masks(net, draws)), images, sigma
        )
        report_by_sigma(sigma, loss.detach())
        return loss

    def predict(self, net, noisy, sigma, labels, augment_labels, masks, **kwargs):
        """What the network is asked."""
        return net(noisy, sigma, labels, augment_labels=augment_labels, dropout_masks=masks, **kwargs)

    def compare(self, prediction, images, sigma):
        """The loss of what it answered, [N]."""
        return self.weight(sigma) * (prediction - images).square().flatten(1).sum(dim=1)


def unwrap(net: torch.nn.Module) -> torch.nn.Module:
    """The network inside a DistributedDataParallel wrapper, or `net` itself."""
    return net.module if isinstance(net, torch.nn.parallel.DistributedDataParallel) else net


def student_masks(net, draws, purpose: str = 'dropout'):
    """Dropout masks for one pass over the samples of `draws`."""
    net = unwrap(net)
    return net.dropout_masks(draws.count, draws.generator(purpose)) if net.training else {}


class EDMLoss(DiffusionLoss):
    """ln sigma ~ N(P_mean, P_std²), weight 1/sigma² + 1/sigma_data²."""

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def noise_levels(self, draws):
        return (draws.normal('sigma') * self.P_std + self.P_mean).exp()

    def weight(self, sigma):
        return sigma**-2 + self.sigma_data**-2


class UncertaintyLoss(EDMLoss):
    """EDM2's loss: w(sigma) / e^u |D − y|² + u for every value of an image, u(sigma) being the network's own estimate of the first term's
    logarithm, so that all noise levels count the same throughout training (Karras et al. 2024, following Kendall et al. 2018)."""

    def __init__(self, P_mean: float = -0.4, P_std: float = 1.0, sigma_data: float = 0.5):
        super().__init__(P_mean, P_std, sigma_data)

    def predict(self, *args):
        return super().predict(*args, return_logvar=True)

    def compare(self, prediction, images, sigma):
        denoised, logvar = prediction
        error = super().compare(denoised, images, sigma)
        training_stats.report('Loss/weighted_error', error.detach())
        logvar = logvar.flatten()
        return error / logvar.exp() + logvar * images[0].numel()


class VPLoss(DiffusionLoss):
    """t uniform in [epsilon_t, 1] under the variance-preserving SDE, weight 1/sigma²."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5):
        self.beta_d, self.beta_min, self.epsilon_t = beta_d, beta_min, epsilon_t

    def noise_levels(self, draws):
        t = 1 + upload(draws.uniform('sigma'), draws.device) * (self.epsilon_t - 1)
        return torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt().float()

    def weight(self, sigma):
        return sigma**-2


class VELoss(DiffusionLoss):
    """ln sigma uniform in [ln sigma_min, ln sigma_max], weight 1/sigma²."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def noise_levels(self, draws):
        return (
            self.sigma_min * (self.sigma_max / self.sigma_min) ** upload(draws.uniform('sigma'), draws.device)
        ).float()

    def weight(self, sigma):
        return sigma**-2


DIFFUSION_LOSSES = dict(edm=EDMLoss, edm2=UncertaintyLoss, vp=VPLoss, ve=VELoss)
