"""Consistency models (Song et al. 2023): distillation and training on one grid from sigma_max to sigma_min, where the network is the identity.

The network's answers at the two ends of an edge are to agree; the lower one is given by a moving average of the network, the target network.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from former_losses.consistency_loss import HOPS, Pairs, TableLoss
from torch_utils.flat import FlatParameters
from training import consistency_ops as ops
from training.objectives import time_schedules as times

CM_LOSSES = ('l1', 'l2', 'pseudo_huber', 'lpips')
MU_SCHEDULES = ('adaptive', 'fixed')


class GridLoss(TableLoss):
    """w ℓ(student(x_t; sigma_t) − sg[student(x_s; sigma_s)]) on the N − 1 edges of N Karras nodes, without an edge to 0: the student is a network
    with D(x; sigma_min) = x, so that the chain of targets ends in the image x at sigma_min.

    Subclasses set `stage`, the N of the step, in `begin_step`. Here edges are equally likely, the hop is the data's, x_s = y + sigma_s n, and ℓ the
    pseudo-Huber distance.

    Args:
        rho, sigma_min, sigma_max: of the grid, already clipped to the teacher's range.
        c: constant of the pseudo-Huber distance; None: 0.00054 √d for images of d values.
        others: see `TableLoss`.
    """

    gap_option = '--s1 or --N'

    def __init__(self, *, rho: float, sigma_min: float, sigma_max: float, c: float | None = None, **others):
        super().__init__(cd_loss='pseudo_huber', **others)
        self.rho, self.sigma_min, self.sigma_max, self.c = rho, sigma_min, sigma_max, c

    def make_edges(self) -> tuple[ops.Edges, Tensor]:
        sigmas = ops.karras_sigmas(self.stage, self.sigma_min, self.sigma_max, self.rho)
        one_segment = torch.zeros(len(sigmas) - 1, dtype=torch.int64)
        edges = ops.Edges(
            sigmas[:-1],
            sigmas[1:],
            one_segment.double(),
            one_segment,
            torch.full_like(one_segment, ops.GENERAL),
        )
        return edges, self.probabilities(sigmas)

    def probabilities(self, sigmas: Tensor) -> Tensor:
        """Of each edge of a grid [N], [N−1] float64."""
        return torch.full_like(sigmas[1:], 1 / (len(sigmas) - 1))

    def lower_end(self, pairs: Pairs) -> Tensor:
        """x_s, where the hop along each edge leads."""
        return pairs.data_hop()

    def reference(self, net, pairs: Pairs) -> Tensor:
        """With sigma_b = 0 the reference is the target: the image that `net` sees at the lower end."""
        return pairs.ask(net, self.lower_end(pairs), pairs.edges.sigma_s, dropout_masks=pairs.masks)

    def distance(self, prediction: Tensor, x_star: Tensor) -> Tensor:
        eps = times.pseudo_huber_eps(x_star[0].numel()) if self.c is None else self.c
        return ops.image_distance(prediction - x_star, 'pseudo_huber', eps)


class ConsistencyModelLoss(GridLoss):
    """What distillation and training share: N(k), the target network and its mu(k), and the metrics (Song et al. 2023, Algorithms 2 and 3).

    Args:
        N: nodes of the grid throughout; None: N(k) from s0 to s1 + 1, see `time_schedules.discretization_steps`.
        s0, s1, schedule_nimg: of N(k), and the images K · batch after which it has arrived.
        mu0: decay of the target network a step: throughout where N is given, or with mu_schedule 'fixed'; where N grows and mu_schedule is
            'adaptive' that of N = s0 + 1, see `time_schedules.target_ema`. 0: the network is its own target.
        cm_loss: `l1`, `l2` means over an image's values; `pseudo_huber` as in `GridLoss`; `lpips` the distance `perceptual`.
        perceptual: module (images, images) -> [N], see `metrics.lpips`.
        grid: see `GridLoss`.
    """

    def __init__(
        self,
        *,
        N: int | None,
        s0: int,
        s1: int,
        schedule_nimg: int,
        mu0: float,
        mu_schedule: str,
        cm_loss: str,
        perceptual: torch.nn.Module | None = None,
        **grid,
    ):
        for value, known in ((cm_loss, CM_LOSSES), (mu_schedule, MU_SCHEDULES)):
            if value not in known:
                raise ValueError(f'{value!r} is not one of {", ".join(known)}')
        if not 0 <= mu0 < 1 or (N is not None and N < 2) or (cm_loss == 'lpips') != (perceptual is not None):
            raise ValueError(
                f'0 <= mu0 < 1, N >= 2, and a perceptual distance for lpips alone do not hold for {mu0}, {N}, {cm_loss}, {perceptual}'
            )
        super().__init__(**grid)
        self.N, self.s0, self.s1, self.schedule_nimg = N, s0, s1, schedule_nimg
        self.mu0, self.mu_schedule, self.cm_loss, self.perceptual = mu0, mu_schedule, cm_loss, perceptual
        self.target: torch.nn.Module | None = None  # the average of the network, where there is one
        self.begin_step(0)

    def begin_step(self, nimg: int) -> None:
        self.stage = self.N or times.discretization_steps(nimg, self.schedule_nimg, self.s0, self.s1)
        follows_grid = self.N is None and self.mu_schedule == 'adaptive'
        self.mu = times.target_ema(self.stage, self.s0, self.mu0) if follows_grid else self.mu0

    def reference(self, net, pairs: Pairs) -> Tensor:
        return super().reference(net if self.target is None else self.target, pairs)

    def distance(self, prediction: Tensor, x_star: Tensor) -> Tensor:
        if self.cm_loss == 'pseudo_huber':
            return super().distance(prediction, x_star)
        if self.cm_loss == 'lpips':
            return self.perceptual(prediction, x_star)
        d = (prediction - x_star).flatten(1)
        return (d.abs() if self.cm_loss == 'l1' else d.square()).mean(dim=1)

    # The target network.

    def networks(self) -> list[torch.nn.Module]:
        return [] if self.target is None else [self.target]

    def attach(self, net: torch.nn.Module, weights: FlatParameters) -> None:
        if self.mu0:
            self.target = copy.deepcopy(net).requires_grad_(
                False
            )  # in training mode, like the network: it sees the same dropout masks
            self._source, self._average = weights.weights, FlatParameters(self.target).weights

    @torch.no_grad()
    def end_step(self) -> None:
        """target <- mu target + (1 − mu) network, with the mu of the step that has been taken."""
        if self.target is not None:
            self._average.lerp_(self._source, 1 - self.mu)

    def state_dict(self) -> dict:
        return {} if self.target is None else dict(target=dict(self.target.state_dict()))

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        if self.target is not None and 'target' in state:
            self.target.load_state_dict(state['target'])
        elif (
            self.target is not None
        ):  # of a run that had none: it begins with the network that has been loaded
            self._average.copy_(self._source)


class ConsistencyModelDistillationLoss(ConsistencyModelLoss):
    """The hop is a step of the teacher.

    Args:
        teacher: D(x, sigma, class_labels), frozen.
        hop: 'heun', 'ddim' or 'addim'.
        xvar_frac: of aDDIM, see `consistency_ops.addim_variance`.
        model: see `ConsistencyModelLoss`.
    """

    name = 'cm-cd'

    def __init__(self, teacher, *, hop: str, xvar_frac: float, **model):
        if hop not in HOPS:
            raise ValueError(f'hop {hop!r} is not one of {", ".join(HOPS)}')
        super().__init__(**model)
        self.teacher, self.hop, self.xvar_frac = teacher, hop, xvar_frac

    def lower_end(self, pairs: Pairs) -> Tensor:
        return pairs.teacher_hop(
            self.teacher, pairs.x_t, pairs.edges.sigma_t, pairs.edges.sigma_s, self.hop, self.xvar_frac
        )


class ConsistencyModelTrainingLoss(ConsistencyModelLoss):
    """The hop is the data's: there is no teacher. Arguments: see `ConsistencyModelLoss`."""

    name = 'cm-ct'
