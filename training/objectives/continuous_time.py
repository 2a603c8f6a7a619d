"""What continuous-time consistency models share: their options, the segments of the multistep form, the warm-up of the
tangent, and networks in TrigFlow's coordinates (`tangents`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import click

from dnnlib import cli
from dnnlib.lazy import lazy_import
from dnnlib.options import opt, recorded
from training.choices import JVP_COST, JVPS, TANGENT_WEIGHTS
from training.objectives.loss import State, report_levels, unwrap
from training.objectives.options import COUNT, Config, ConsistencySampling, LogNormal, NoiseGrid, StudentSteps

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

torch = lazy_import('torch')
training_stats = lazy_import('torch_utils.training_stats')
misc = lazy_import('torch_utils.misc')
ops = lazy_import('training.consistency_ops')
tangents = lazy_import('training.objectives.tangents')
times = lazy_import('training.objectives.time_schedules')

MID_T = 0.982  # 0.5 tan 1.1: the second step of Lu & Song's models


@dataclass(frozen=True)
class TangentOptions(Config):
    """The network's derivative along the ODE."""

    heading: ClassVar[str] = 'Tangents (--objective=scd, sct, flowmap)'

    jvp: str = opt(
        'forward',
        click.Choice(JVPS),
        "The network's derivative along the ODE (scd, sct, flowmap): in forward mode, or a central "
        'difference of two evaluations, which --compile also speeds up.',
    )
    tangent_warmup: int | None = opt(
        None,
        cli.Integer(min=0),
        'Optimizer steps over which the derivative enters the loss (scd, sct, flowmap); 0: at once.',
        record=False,
        default_text='10000, or a tenth of --duration if that is less',
    )
    warmup_nimg: int | None = recorded(None, COUNT)
    tangent_c: float = opt(
        0.1, cli.SOME_FACTOR, 'Constant c of the normalized tangent g / (|g| + c) (scd, sct, flowmap).'
    )


@dataclass(frozen=True)
class ContinuousConfig(TangentOptions, ConsistencySampling, LogNormal, StudentSteps, NoiseGrid):
    """Options of --objective=scd and sct."""

    heading: ClassVar[str] = 'Continuous-time consistency (--objective=scd, sct)'

    S: int | None = None
    P_mean: float | None = -1.0
    P_std: float | None = 1.4
    mid_t: float | None = MID_T
    tangent_weight: str = opt(
        'adaptive',
        click.Choice(TANGENT_WEIGHTS),
        'Loss weight (scd, sct): learned by the network for each noise level, or the prior 1/sigma alone, '
        'which both have.',
    )

    @classmethod
    def from_given(cls, given: Mapping[str, object]) -> Config:
        # A student of S steps is sampled by these, without noise between them.
        if given.get('S') is None:
            return super().from_given(given)
        if of_models := [f'--{name}' for name in ConsistencySampling.sampling if given.get(name) is not None]:
            raise click.UsageError(
                f'--S={given["S"]} trains a student of that many steps, and {", ".join(of_models)} is for '
                'a consistency model: leave one of them out.'
            )
        return super().from_given({**given, 'mid_t': None})

    @property
    def differentiates(self) -> bool:
        return True

    @property
    def two_time(self) -> bool:
        return self.S is not None

    def cost(self) -> float:
        # The derivative, and the student's forward and backward pass.
        return JVP_COST[self.jvp] + 3


class ContinuousState(State):
    """The segments of noise levels, and the warm-up of the tangent.

    Args:
        c: P_mean, P_std of ln sigma; S, sigma_min, sigma_max, rho, see `lower_ends`; warmup_nimg, images over which the
            derivative enters; jvp, see `tangents.derivative`; tangent_c, see `tangents.normalized`; tangent_weight;
            sigma_data.
        net: the network that trains; None: see `State.self_target_gap`.
    Raises: ValueError if the weight is to be learned by a network that has no estimate of it.
    """

    in_fp32 = True  # see `differentiable`

    def __init__(self, c, teacher: Module | None = None, net: Module | None = None):
        super().__init__(c, teacher)
        learns = c.tangent_weight == 'adaptive'
        if net is not None and learns and getattr(net, 'logvar_linear', None) is None:
            raise ValueError(
                'this network has no estimate of log-variances: build it with logvar_channels=128'
            )
        self._grid = None
        self.begin_step(0)

    def begin_step(self, nimg: int) -> None:
        self.warmup = warmup_at(nimg, self.c.warmup_nimg)

    def draw_sigma(self, rng, device) -> Tensor:
        """[N] float64 noise levels, ln sigma ~ N(P_mean, P_std²)."""
        normal = misc.upload(rng.normal_on_host('sigma'), device)
        return times.lognormal_times(normal, self.c.P_mean, self.c.P_std)

    def lower_ends(self, sigma: Tensor) -> Tensor:
        """[N] float64 levels at which the step from each sigma ends: the lower ends of segments of a `full` grid of S
        steps, the highest of which goes up to infinity; without S 0."""
        c = self.c
        if c.S is None:
            return torch.zeros_like(sigma)
        if self._grid is None:
            grid = ops.student_grid(c.S, c.sigma_min, c.sigma_max, c.rho, 'full')
            self._grid = misc.upload(grid.numpy(), sigma.device)
        return self._grid[ops.segment_of(sigma, self._grid).clamp(min=0) + 1]


def warmup_at(nimg: int, warmup_nimg: int | None) -> float:
    """The factor on the derivative in the step that follows `nimg` images, which rises from 0 to 1."""
    return min(nimg / warmup_nimg, 1.0) if warmup_nimg else 1.0


# ----------------------------------------------------------------------------
# Networks in TrigFlow's coordinates.


def velocity_field(denoise: Callable, sigma_data: float) -> Callable[[Tensor, Tensor], Tensor]:
    """F(X, t) of a denoiser D(x, sigma)."""

    def F(X, t):
        x, sigma = tangents.edm_state(X, t, sigma_data)
        return tangents.velocity(denoise(x, sigma), X, t, sigma_data)

    return F


def differentiable(net: Module, jvp: str) -> Callable:
    """The network for `tangents.derivative`: without DDP, in FP32 at least, in forward mode never compiled."""
    net = unwrap(net)
    # FSDP2, which compiles nothing, gathers parameters when the network is called.
    by_itself = jvp == 'forward' and not hasattr(net, 'unshard')
    return functools.partial(net.forward if by_itself else net, force_fp32=True)


def network_and_weight(
    net: Module,
    c,
    labels: Tensor | None,
    augment_labels: Tensor | None,
    masks: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """F(X, t) of the network that trains, [N, C, H, W], and the logarithm of the loss weight, [N], 0 unless it is
    learned. `end` is the level `r` at which steps end, of two-time networks alone."""
    options = dict(end, dropout_masks=masks)
    if augment_labels is not None:
        options['augment_labels'] = augment_labels

    def F_and_weight(X, t):
        x, sigma = tangents.edm_state(X, t, c.sigma_data)
        if c.tangent_weight == 'adaptive':
            # The network estimates the logarithm of what the weight divides by.
            denoised, logvar = net(x, sigma, labels, **options, return_logvar=True)
            log_weight = -logvar.double().flatten()
        else:
            denoised, log_weight = net(x, sigma, labels, **options), torch.zeros_like(t)
        return tangents.velocity(denoised, X, t, c.sigma_data), log_weight

    return F_and_weight


# ----------------------------------------------------------------------------
# Statistics.


def report(state: ContinuousState, sigma: Tensor, g: Tensor, log_weight: Tensor, values: Tensor) -> None:
    """Report the noise levels, the tangents before they are normalized, the learned weights and the losses."""
    report_levels(sigma, values)
    report_tangent(g, state.warmup)
    training_stats.report('Tangent/log_weight', log_weight)


def report_tangent(g: Tensor, warmup: float) -> None:
    """Report tangents before they are normalized, and the factor on the derivative in them."""
    training_stats.report('Tangent/rms', tangents.norms(g) / g[0].numel() ** 0.5)
    training_stats.report('Tangent/warmup', g.new_full([1], warmup))
