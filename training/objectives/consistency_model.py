"""What the consistency models of Song et al. (2023) share: a grid from sigma_max to sigma_min, where the
network is the identity, and a target network."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from dnnlib.lazy import lazy_import
from training.objectives.edge_schedule import EdgeSchedule

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

torch = lazy_import('torch')
ops = lazy_import('training.consistency_ops')
times = lazy_import('training.objectives.time_schedules')
flat = lazy_import('torch_utils.flat')

CM_LOSSES = ('lpips', 'l2', 'l1', 'pseudo_huber')
MU_SCHEDULES = ('adaptive', 'fixed')


class NodeSchedule(EdgeSchedule):
    """The N − 1 edges of N Karras nodes, equally likely; N is the stage.

    There is no edge to 0: D(x; sigma_min) = x, so the chain of targets ends in the image x at sigma_min.
    """

    def edges_at(self, stage: int):
        sigmas = ops.karras_sigmas(stage, self.c.sigma_min, self.c.sigma_max, self.c.rho)
        segment = torch.zeros(stage - 1, dtype=torch.int64)
        # One segment down to 0, and no edge that ends there: every target is a prediction.
        kind = torch.full_like(segment, ops.GENERAL)
        edges = ops.Edges(sigmas[:-1], sigmas[1:], segment.double(), segment, kind)
        return edges, self.probabilities(sigmas)

    def probabilities(self, sigmas: Tensor) -> Tensor:
        """[N−1] float64 probabilities of the edges of a grid [N]."""
        return torch.full_like(sigmas[1:], 1 / (len(sigmas) - 1))


class ConsistencyModelState(NodeSchedule):
    """N(k), the target network and its decay mu(k) (Song et al. 2023, Algorithms 2 and 3).

    Args:
        c: rho, sigma_min, sigma_max of the grid; N nodes throughout, None: N(k) from s0 to s1 + 1 within
            schedule_nimg images, see `time_schedules.discretization_steps`; mu0, decay of the target network
            a step: throughout where N is given, or with mu_schedule `fixed`; where N grows and mu_schedule is
            `adaptive` that of N = s0 + 1, see `time_schedules.target_ema`; 0: the network is its own target;
            cm_loss: see `image_distance`; sync_dropout.
        net: the network that trains; None: there is no target network.
        perceptual: module (images, images) -> [N] of cm_loss `lpips`, see `metrics.lpips`.
    Raises: ValueError for options that mean nothing.
    """

    def __init__(self, c, teacher=None, net: Module | None = None, perceptual: Module | None = None):
        for value, known in ((c.cm_loss, CM_LOSSES), (c.mu_schedule, MU_SCHEDULES)):
            if value not in known:
                raise ValueError(f'{value!r} is not one of {", ".join(known)}')
        if (
            not 0 <= c.mu0 < 1
            or (c.N is not None and c.N < 2)
            or (c.cm_loss == 'lpips') != (perceptual is not None)
        ):
            raise ValueError(
                '0 <= mu0 < 1, N >= 2, and a perceptual distance for lpips alone do not hold for '
                f'{c.mu0}, {c.N}, {c.cm_loss}, {perceptual}'
            )
        super().__init__(c, teacher, gap_option='--s1 or --N')
        self.net, self.perceptual, self.target = net, perceptual, None
        if c.mu0 and net is not None:
            # The copy stays in training mode, because it is evaluated under the network's dropout masks.
            self.target = copy.deepcopy(net).requires_grad_(False)
            self._averages, self._weights = (list(module.parameters()) for module in (self.target, net))
            self._vector = flat.FlatParameters(self.target)

    def stage_after(self, nimg: int) -> int:
        c = self.c
        return c.N or times.discretization_steps(nimg, c.schedule_nimg, c.s0, c.s1)

    def begin_step(self, nimg: int) -> None:
        super().begin_step(nimg)
        c = self.c

        # A fixed number of nodes leaves no growth for the decay to follow.
        follows_grid = c.N is None and c.mu_schedule == 'adaptive'
        self.mu = times.target_ema(self.stage, c.s0, c.mu0) if follows_grid else c.mu0

    def divide(self, weights, divided) -> None:
        if self.target is not None:
            self._vector = divided(self.target)
            self._averages, self._weights = [self._vector.weights], [weights.weights]

    def end_step(self) -> None:
        """target <- mu target + (1 − mu) network, with the mu of this step."""
        if self.target is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self._averages, self._weights, 1 - self.mu)
            self._vector.publish()

    def image_distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[N] distances by `cm_loss`. `l1`, `l2`: means over an image's values; `pseudo_huber`: with iCT's
        constant; `lpips`: the perceptual distance."""
        if self.c.cm_loss == 'lpips':
            return self.perceptual(prediction, target)
        if self.c.cm_loss == 'pseudo_huber':
            return pseudo_huber(prediction - target)

        # Means, not sums, over an image's values: Song et al.'s convention.
        d = (prediction - target).flatten(1)
        return (d.abs() if self.c.cm_loss == 'l1' else d.square()).mean(dim=1)

    def networks(self) -> list[Module]:
        return [] if self.target is None else [self.target]

    def state_dict(self) -> dict:
        return {} if self.target is None else dict(target=self._vector.state_dict(self.target))

    def load_state_dict(self, state: dict) -> None:
        if self.target is None:
            return
        if 'target' in state:
            self._vector.load_state_dict(self.target, state['target'])
            return
        # The state of a run without a target network starts one from the loaded network.
        with torch.no_grad():
            torch._foreach_copy_(self._averages, self._weights)
        self._vector.publish()


def pseudo_huber(d: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|d|² + c²) − c of each image's difference, [N]; c None: 0.00054 √d for images of d values (Song &
    Dhariwal 2023)."""
    return ops.image_distance(d, 'pseudo_huber', times.pseudo_huber_eps(d[0].numel()) if c is None else c)
