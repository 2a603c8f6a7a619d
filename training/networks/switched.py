"""Two denoisers as one, selected by the noise level.

A snapshot carries this file's source, and each of the two networks brings its own, so it imports nothing but
torch and `torch_utils.persistence`.
"""

import math

import torch
from torch.nn import Module

from torch_utils.persistence import persistent_class as persistent


@persistent
class Switched(Module):
    """`high` where sigma >= `switch`, `low` below it.

    A truncated consistency model (Lee et al. 2025) uses the second stage's network above the dividing time,
    and the frozen first stage's below. The networks are not copied. The attributes are those that samplers
    use; `metadata` is that of `high`.

    Raises: ValueError for networks of different images or labels, the same network twice, or a switched one.
    """

    takes_numbers = True  # samplers hand on noise levels as Python numbers

    def __init__(self, high, low, switch):
        super().__init__()
        geometry = ('img_resolution', 'img_channels', 'label_dim')
        # Networks that sample together must see the same images and labels.
        if odd := [name for name in geometry if getattr(high, name) != getattr(low, name)]:
            raise ValueError(f'two networks cannot sample together whose {", ".join(odd)} differ')
        if high is low or isinstance(high, Switched) or isinstance(low, Switched):
            raise ValueError('two networks are needed, neither of them made of two itself')
        if not 0 < switch < math.inf:
            raise ValueError(f'there is no noise level {switch} to switch at')
        self.high, self.low, self.switch = high, low, switch
        self.img_resolution, self.img_channels, self.label_dim = (getattr(high, name) for name in geometry)
        # The range of both together.
        self.sigma_min, self.sigma_max = low.sigma_min, high.sigma_max
        self.boundary = getattr(low, 'boundary', 0)
        self.metadata = getattr(high, 'metadata', {})

    def forward(self, x, sigma, class_labels=None, **kwargs):
        """D [N, C, H, W] of noisy `x` at noise levels `sigma`: evaluates one network for a number or a scalar,
        both for [N]."""
        # Looking at a number does not synchronize; its tensor is filled in on the device.
        if not isinstance(sigma, torch.Tensor):
            level = torch.full([], sigma, dtype=torch.float64, device=x.device)
            return (self.high if sigma >= self.switch else self.low)(x, level, class_labels, **kwargs)
        above = sigma >= self.switch
        if above.ndim == 0:
            return (self.high if above else self.low)(x, sigma, class_labels, **kwargs)

        # Both for all images: splitting the batch by levels on the device would synchronize.
        either = (net(x, sigma, class_labels, **kwargs) for net in (self.high, self.low))
        return torch.where(above.to(x.device).reshape(-1, 1, 1, 1), *either)

    def round_sigma(self, sigma):
        """The nearest of the noise levels that the network at `sigma` was trained at."""
        sigma = torch.as_tensor(sigma)
        return torch.where(sigma >= self.switch, self.high.round_sigma(sigma), self.low.round_sigma(sigma))
