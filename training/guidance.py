"""Guided diffusion models: D_weak + w (D − D_weak), as one denoiser like any other.

Classifier-free guidance (Ho & Salimans 2022): D_weak is the network without its label, or an unconditional
snapshot. Autoguidance (Karras et al. 2024b): a smaller or less trained network. The weight may be limited to
an interval of noise levels (Kynkäänniemi et al. 2024).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from data.label_space import listed, space_of
from dnnlib import UserError
from torch_utils import distributed
from training import consistency_ops as ops
from training import samplers
from training.checkpoint import load_network, network_digest
from training.guidance_options import NONE_LABEL, GuidanceOptions
from training.teacher_samplers import ROUNDING, known_range

# ----------------------------------------------------------------------------
# The denoiser.


class GuidedDenoiser(torch.nn.Module):
    """D_g = D_weak + w (D − D_weak) at noise levels in an interval, D at others   (Karras et al. 2024b).

    At a noise level that is a Python number, the host chooses what to evaluate: outside of the interval only
    the network. Noise levels [N] on the device cost both evaluations, because looking at them would
    synchronize.

    Args:
        net: the network, whose attributes samplers and objectives see.
        guide: D_weak; None: the network itself without its label, in one batch of 2 N with it.
        weight: w; with 1 the guide is never evaluated.
        interval: (low, high), both included; None: all noise levels.
        name: of the guide, for records.
    """

    takes_numbers = True  # `samplers.sample` hands on noise levels as they are

    def __init__(
        self,
        net: torch.nn.Module,
        guide: torch.nn.Module | None,
        weight: float,
        interval: Iterable[float] | None = None,
        name: str = NONE_LABEL,
    ):
        super().__init__()
        self.net, self.guide, self.weight, self.name = net, guide, float(weight), name
        self.interval = (0.0, math.inf) if interval is None else tuple(map(float, interval))
        # No `model`, by which a network with a U-Net is known.
        for attribute in ('img_resolution', 'img_channels', 'label_dim', 'metadata', 'sigma_data'):
            if hasattr(net, attribute):
                setattr(self, attribute, getattr(net, attribute))
        self.sigma_min, self.sigma_max = common_range(net, guide, self.interval)
        self.shares_augmentation = guide is None or augment_dim(guide) == augment_dim(net)

    def guides_at(self, sigma: float) -> bool:
        """Whether the guide is evaluated at a noise level."""
        low, high = self.interval
        return self.weight != 1 and low <= sigma <= high

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """D_g [N, C, H, W] of `x` at noise levels `sigma`, float64 where the guide is evaluated.

        Args: as of networks.
        """
        options = {} if augment_labels is None else dict(augment_labels=augment_labels)
        level = ops.noise_level(sigma, x)
        is_number = not isinstance(sigma, Tensor)
        if self.weight == 1 or (is_number and not self.guides_at(sigma)):
            return self.net(x, level, class_labels, **options)
        strong, weak = self._both(x, level, class_labels, options)
        guided = weak + self.weight * (strong - weak)
        if is_number or self.interval == (0.0, math.inf):
            return guided
        # A level per image: select on the device, because asking which are inside would wait for it.
        low, high = self.interval
        inside = (level >= low) & (level <= high)
        return torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), guided, strong)

    def _both(self, x: Tensor, sigma: Tensor, labels: Tensor | None, options: dict) -> tuple[Tensor, Tensor]:
        """(D, D_weak), float64."""
        if self.guide is None:
            # One pass over a doubled batch: with the labels, and with all-zero ones.
            if labels is None:
                labels = x.new_zeros(1, self.label_dim)
            labels = labels.expand(len(x), -1)
            twice = lambda values: torch.cat([values, values])
            both = self.net(
                twice(x),
                twice(sigma) if sigma.ndim else sigma,
                torch.cat([labels, torch.zeros_like(labels)]),
                **{name: twice(values) for name, values in options.items()},
            )
            return both.double().chunk(2)

        # Lifted at once: of a network in CUDA graphs, the next call may overwrite the output.
        strong = self.net(x, sigma, labels, **options).double()
        labels = None if getattr(self.guide, 'label_dim', None) == 0 else labels
        # Labels that the guide does not know say that nothing was augmented.
        weak = self.guide(x, sigma, labels, **(options if self.shares_augmentation else {}))
        return strong, weak.double()

    def round_sigma(self, sigma):
        """The noise levels that the network was trained at, nearest to `sigma`."""
        return self.net.round_sigma(sigma)

    def record(self) -> dict:
        """The options that guide it, as evaluations record them."""
        limits = None if self.interval == (0.0, math.inf) else list(self.interval)
        return dict(guide=self.name, guidance=self.weight, guidance_interval=limits)

    def guide_digest(self) -> str:
        """The digest of the network that D_weak is of."""
        return network_digest(self.net if self.guide is None else self.guide, {})


def model_digest(net) -> str:
    """What identifies a loaded network: `network_digest`; of a guided one also the guide, weight and interval."""
    if not isinstance(net, GuidedDenoiser):
        return network_digest(net, net.metadata)
    facts = network_digest(net.net, net.metadata), net.guide_digest(), repr(net.weight), repr(net.interval)
    return hashlib.sha256(' '.join(facts).encode()).hexdigest()


def unguided(net: torch.nn.Module | None) -> torch.nn.Module | None:
    """The network in a `GuidedDenoiser`; any other as it is."""
    return net.net if isinstance(net, GuidedDenoiser) else net


def common_range(net, guide, interval: tuple[float, float]) -> tuple[float, float]:
    """(sigma_min, sigma_max) that the network, and in the interval the guide, can evaluate."""
    low, high = known_range(net)
    if guide is None:
        return low, high
    guide_low, guide_high = known_range(guide)
    # Noise levels outside of the interval do not reach the guide.
    return (
        max(low, guide_low) if interval[0] < guide_low else low,
        min(high, guide_high) if interval[1] > guide_high else high,
    )


def augment_dim(net) -> int:
    """Length of the augmentation labels of a network."""
    return getattr(net, 'init_kwargs', {}).get('augment_dim') or 0


# ----------------------------------------------------------------------------
# Network evaluations.


class Recorder:
    """D = x, with the attributes of a network; records the noise levels that it is evaluated at."""

    def __init__(self, net, levels: list[float]):
        self._net, self._levels = net, levels

    def __getattr__(self, name):
        return getattr(self._net, name)

    def __call__(self, x, sigma, class_labels):
        self._levels.append(float(sigma))
        return x


def guide_evaluations(net, solver: str, steps: int, **options) -> int:
    """Evaluations of the guide per image, by the arguments of `samplers.sample`; 0 for unguided networks."""
    if not isinstance(net, GuidedDenoiser):
        return 0
    # The solver itself tells the levels, by sampling one pixel from the identity.
    levels: list[float] = []
    pixel = torch.zeros(1, net.img_channels, 1, 1)
    samplers.sample(Recorder(net, levels), pixel, solver=solver, steps=steps, **options)
    return sum(map(net.guides_at, levels))


def describe(net, solver: str, steps: int, choose_labels=None, **options) -> str:
    """`heun, 35 evaluations each and 12 of the guide`. Args: as of `generation.generate_batch`."""
    text = samplers.describe(solver, steps, **options)
    if not isinstance(net, GuidedDenoiser):
        return text
    return f'{text} and {guide_evaluations(net, solver, steps, **options)} of the guide'


# ----------------------------------------------------------------------------
# From options to a guided network.


def guided(net: torch.nn.Module, network: str, o: GuidanceOptions) -> torch.nn.Module:
    """The network, guided as the options say; the network itself without --guide. Called by all processes.

    Args:
        network: its name, for messages.
    Raises: UserError if it cannot be guided, or not by this guide.
    """
    if o.guide is None:
        return net
    if what := sampled_in_steps(net):
        raise UserError(
            f'{network} is {what}, and guidance is for diffusion models: leave --guide out. A student learns '
            'guidance from a guided teacher, by train.py with --teacher and --guide.'
        )
    guide = None
    if o.guide == NONE_LABEL:
        check_label_dropout(net, network)
    else:
        with distributed.main_process_first():
            guide = load_network(o.guide, next(net.parameters()).device)
        check_guide(net, guide, network, o)
    return GuidedDenoiser(net, guide, o.guidance, o.guidance_interval, o.guide)


def sampled_in_steps(net) -> str | None:
    """What a network is whose outputs are not denoised images at all levels; None for diffusion models."""
    metadata = getattr(net, 'metadata', None) or {}
    if getattr(net, 'two_time', False):
        return 'a two-time student'
    if metadata.get('solver') == 'cm' or getattr(net, 'boundary', 0):
        return 'a consistency model'
    return f'a student of {len(metadata["sigmas"]) - 1} steps' if 'sigmas' in metadata else None


def check_label_dropout(net, network: str) -> None:
    """Raises: UserError unless the network was trained without labels too."""
    if not net.label_dim:
        raise UserError(
            f'--guide={NONE_LABEL} leaves out the label, and {network} has none: give another network by '
            '--guide=PKL.'
        )
    # Networks of EDM's classes may drop labels themselves.
    if not (net.metadata.get('label_dropout') or getattr(net.model, 'label_dropout', 0)):
        raise UserError(
            f'--guide={NONE_LABEL}: {network} does not record that labels were dropped in its training, and '
            'what it makes without a label is arbitrary. Train with --label_dropout=0.1, or give a separate '
            'unconditional snapshot by --guide=PKL.'
        )


def check_guide(net, guide, network: str, o: GuidanceOptions) -> None:
    """Raises: UserError, naming what differs, unless the guide denoises the images of the network."""
    if what := sampled_in_steps(guide):
        raise UserError(f'--guide={o.guide} is {what}, and a guide is a diffusion model.')

    # Images and labels. An unconditional guide is classifier-free guidance by two networks.
    ours, theirs = space_of(net), space_of(guide)
    sizes = [(each.img_resolution, each.img_channels) for each in (net, guide)]
    if sizes[0] != sizes[1] or (theirs.dim and theirs.differs(ours)):
        describe = lambda size, labels: f'{size[0]}x{size[0]}x{size[1]} with {labels}'
        raise UserError(
            f'--guide={o.guide} makes images of {describe(sizes[1], theirs)}, and {network} of '
            f'{describe(sizes[0], ours)}: give a guide that was trained on the same data, with or without '
            'labels.'
        )
    if theirs.dim and (untaught := sorted({*theirs.absent} - {*ours.absent})):
        raise UserError(
            f'--guide={o.guide} has seen no images of classes {listed(untaught)}, of which {network} has: '
            'give a guide that was trained on the same data.'
        )
    encoders = [each.metadata.get('encoder') for each in (net, guide)]
    if encoders[0] != encoders[1]:
        named = [record['class_name'] if record else 'pixels' for record in encoders]
        more = ' with other arguments' if named[0] == named[1] else ''
        raise UserError(
            f'--guide={o.guide} makes what {named[1]}{more} decodes, and {network} what {named[0]} decodes: '
            'give a guide of the same latents.'
        )

    # Noise levels: those of sampling by default, in the interval.
    interval = o.guidance_interval or (0.0, math.inf)
    low, high = (
        bound(own, default, limit)
        for bound, own, default, limit in zip(
            (max, min), known_range(net), samplers.DEFAULT_RANGE, interval, strict=True
        )
    )
    known_low, known_high = known_range(guide)
    if low < high and not (known_low <= low * (1 + ROUNDING) and high * (1 - ROUNDING) <= known_high):
        raise UserError(
            f'--guide={o.guide} knows noise levels from {known_low:g} to {known_high:g}, and would guide '
            f'{network} from {low:g} to {high:g}: limit it by --guidance_interval, or give another guide.'
        )
    # Last, because it reads all weights.
    if same_network(net, guide):
        raise UserError(
            f'--guide={o.guide} is {network} itself, and D_weak = D has no effect: give a weaker network, or '
            f'--guide={NONE_LABEL} for classifier-free guidance.'
        )


def same_network(net: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two networks are of one class and have equal weights."""
    ours, theirs = net.state_dict(), other.state_dict()
    return (
        type(net) is type(other)
        and ours.keys() == theirs.keys()
        and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    )
