"""Closed forms for Gaussian data: the denoiser and the ODE's solution, per eigenvalue of the covariance."""

import torch


class Gaussian:
    """Images whose values are independent N(mean, variance); `variance` and `mean` broadcast against [N, C, H, W]."""

    def __init__(self, variance, mean=0.0):
        self.variance, self.mean = torch.as_tensor(variance, dtype=torch.float64), mean

    def shrink(self, sigma):
        """D's slope: variance / (variance + sigma²)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1)
        return self.variance / (self.variance + sigma**2)

    def __call__(self, x, sigma, class_labels=None, **_):
        return self.mean + self.shrink(sigma) * (x.double() - self.mean)

    def solve(self, x, sigma_t, sigma_s):
        """x at sigma_s on the trajectory through x at sigma_t."""
        sigma_t, sigma_s = (
            torch.as_tensor(s, dtype=torch.float64).reshape(-1, 1, 1, 1) for s in (sigma_t, sigma_s)
        )
        return self.mean + ((self.variance + sigma_s**2) / (self.variance + sigma_t**2)).sqrt() * (
            x - self.mean
        )
