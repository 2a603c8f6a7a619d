"""Distillation of a teacher's flow map: one student for any number of sampling steps.

A two-time student G(x; sigma, r) gives the image from which one DDIM step leads from sigma to r, for any r < sigma
(Kim et al. 2024, "CTM", here without a discriminator; Sabour et al. 2025, "AYF"). It learns pairs (sigma, r): mostly
those that sampling with a few numbers of steps takes, some of all others. Its targets are the teacher's solution,
from stored trajectories; one hop of the teacher (without one, of the data) and the student's own step from there; or,
as hops become short, the derivative along the ODE ("AYF"; without a teacher "MeanFlow", Geng et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import click

from dnnlib import cli
from dnnlib.lazy import lazy_import
from dnnlib.options import opt, recorded
from training.choices import FLOW_MAP_TARGETS, HOP_COST, JVP_COST, SEGMENT_SOLVER_COST
from training.objectives.continuous_time import TangentOptions, differentiable, report_tangent, warmup_at
from training.objectives.edge_schedule import EdgeSchedule
from training.objectives.loss import denoiser, dropout_masks, student_and_target
from training.objectives.options import (
    EDM2_STUDENT,
    POSITIVE_COUNT,
    STUDENT,
    Objective,
    SyncDropout,
    Targets,
    TeacherHop,
    TeacherSolver,
)
from training.objectives.trajectories import TrajectoryStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

torch = lazy_import('torch')
grids = lazy_import('training.grids')
misc = lazy_import('torch_utils.misc')
ops = lazy_import('training.consistency_ops')
tangents = lazy_import('training.objectives.tangents')

NAME = 'flowmap'
MOST_LEVELS = 256  # of the grid, which has as many pairs as half of its square


@dataclass(frozen=True)
class FlowMapConfig(TangentOptions, SyncDropout, Targets, TeacherHop, TeacherSolver):
    """Options of --objective=flowmap."""

    heading: ClassVar[str] = 'Flow maps (--objective=flowmap)'

    target: str | None = opt(
        None,
        click.Choice(FLOW_MAP_TARGETS),
        "What the student learns (flowmap): the teacher's stored solution; one hop, and the student's own "
        'step from there; both (mixed); or the same for hops without length, by the derivative along the '
        'ODE (tangent).',
        default_text='solution; without --teacher hop',
        settled=True,
    )
    steps: list | None = opt(
        None,
        cli.NumberList(cli.Integer(min=1, max=MOST_LEVELS)),
        'Numbers of sampling steps that the student learns in particular (flowmap); any other can be asked '
        'for.',
        default_text='1,2,4,8',
        settled=True,
    )
    T: int = opt(
        16,
        cli.Integer(min=1, max=MOST_LEVELS),
        "Steps of the teacher's grid (flowmap), a multiple of each of --steps.",
    )
    grid_share: float = opt(
        0.8,
        cli.Number(0, 1),
        'Share of samples on the steps that sampling takes with --steps (flowmap); the others are on any '
        'pair of levels.',
    )
    solution_share: float = opt(
        0.5,
        cli.Number(0, 1),
        "Share of samples whose target is the teacher's solution.",
        needs=('target', 'mixed'),
    )
    pool: int = opt(
        16,
        cli.Integer(min=1, max=4096),
        'Stored solutions for each image of a batch, which serve in turn (flowmap).',
    )
    reuse: int | None = opt(
        None,
        cli.COUNT,
        'Optimizer steps that a stored solution serves (flowmap).',
        default_text='its evaluations: 2 T - 1 with heun, else T',
        settled=True,
    )
    tangent_power: float = opt(
        0.75,
        cli.FACTOR,
        'Exponent p of the loss weight 1 / (|g|^2 + 0.001)^p with --target=tangent and without a teacher '
        '(flowmap).',
        needs=('target', 'tangent'),
    )
    batch_size: int | None = recorded(None, POSITIVE_COUNT)

    def __post_init__(self):
        super().__post_init__()
        # The class is frozen; these defaults follow from other options.
        if self.target is None:
            object.__setattr__(self, 'target', 'solution' if self.teacher else 'hop')
        if self.steps is None:
            object.__setattr__(self, 'steps', [1, 2, 4, 8])
        if self.reuse is None:
            object.__setattr__(self, 'reuse', self.solution_cost)
        if not self.teacher and self.target in ('solution', 'mixed'):
            raise click.UsageError(f'--target={self.target} is the solution of a --teacher: give one.')
        if not self.of_solution and self.solver != 'heun':
            raise click.UsageError(
                f'--solver={self.solver} is for stored solutions, and --target={self.target} has none: '
                'leave it out, or give --teacher and --target=solution.'
            )
        if len(set(self.steps)) < len(self.steps) or not self.steps:
            raise click.UsageError(f'--steps={",".join(map(str, self.steps))}: give different numbers.')
        if odd := [N for N in self.steps if self.T % N]:
            raise click.UsageError(
                f'--steps={odd[0]} does not divide --T={self.T}, whose levels the steps are between: '
                'change one of them.'
            )

    @property
    def of_solution(self) -> float:
        """Share of samples whose target is the teacher's solution."""
        return share_of_solutions(self)

    @property
    def solution_cost(self) -> int:
        """Evaluations of the teacher for a stored solution; Heun's last step, to 0, takes one."""
        return SEGMENT_SOLVER_COST[self.solver] * self.T - (self.solver == 'heun')

    @property
    def differentiates(self) -> bool:
        return self.target == 'tangent'

    @property
    def two_time(self) -> bool:
        return True

    def cost(self) -> float:
        if self.differentiates:
            # The teacher's slope, the derivative, and the student.
            return (self.guide_cost if self.teacher else 0) + JVP_COST[self.jvp] + 3
        # The teacher's solution, which serves `reuse` samples; or its hop, and the self-target; and the student.
        solution = self.guide_cost * self.solution_cost / self.reuse
        hop = (self.guide_cost * HOP_COST[self.hop] if self.teacher else 0) + 1
        return self.of_solution * solution + (1 - self.of_solution) * hop + 3

    def first_cost(self) -> float:
        # The whole pool of solutions.
        return self.of_solution * self.guide_cost * self.solution_cost * self.pool


def share_of_solutions(c) -> float:
    """The share of images whose target is the teacher's stored solution."""
    return dict(solution=1.0, mixed=c.solution_share).get(c.target, 0.0)


OBJECTIVE = Objective(
    FlowMapConfig, teacher='diffusion', needs_teacher=False, defaults=STUDENT, edm2=EDM2_STUDENT
)


def flow_map_pairs(
    T: int,
    steps: Sequence[int],
    grid_share: float,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    spacing: str = 'karras',
) -> tuple[grids.Edges, Tensor, Tensor]:
    """The pairs of levels sigma_t > r of a `full` grid of T steps that a two-time student learns.

    A share `grid_share` of the probability is on the steps that sampling takes with each of the numbers `steps`, in
    equal parts; the `full` grid of N steps is every (T / N)-th level of that of T. The rest is on all pairs alike.

    Returns: the pairs as edges (sigma_t, the next lower level sigma_s, and r as boundary sigma_b; segment k are the
        steps of number k of `steps`, and the last segment all other pairs), [P]; their probabilities, [P] float64; the
        positions of sigma_t and r in the grid, [P, 2] int64.
    Raises: ValueError unless each of `steps` divides T.
    """
    if odd := [N for N in steps if T % N]:
        raise ValueError(f'{odd[0]} steps are not on a grid of {T}: {odd[0]} does not divide {T}')
    grid = ops.student_grid(T, sigma_min, sigma_max, rho, 'full', spacing)
    upper, lower = torch.triu_indices(T + 1, T + 1, 1)

    # Which number of steps takes a pair, if any does: N goes T / N levels down, from a multiple of that.
    segment = torch.full_like(upper, len(steps))
    probability = torch.full(upper.shape, (1 - grid_share) / len(upper), dtype=torch.float64)
    for k, N in enumerate(steps):
        taken = (lower - upper == T // N) & (upper % (T // N) == 0)
        segment[taken] = k
        probability[taken] += grid_share / len(steps) / N

    # In order of segments, without pairs that are never drawn.
    order = segment.argsort(stable=True)
    order = order[probability[order] > 0]
    upper, lower = upper[order], lower[order]
    sigma_t, sigma_s, sigma_b = grid[upper], grid[upper + 1], grid[lower]
    kind = torch.where(sigma_s > sigma_b, ops.GENERAL, torch.where(sigma_s > 0, ops.SNAP, ops.TERMINAL))
    edges = ops.Edges(sigma_t, sigma_s, sigma_b, segment[order], kind)
    return edges, probability[order], torch.stack([upper, lower], dim=1)


class FlowMapState(EdgeSchedule):
    """The pairs of levels, and stored solutions of the teacher.

    Args:
        c: steps, T, grid_share, sigma_grid, rho, sigma_min, sigma_max, see `flow_map_pairs`; target, solution_share;
            pool, reuse, batch_size, solver, see `TrajectoryStore`; hop, xvar_frac; cd_loss, cd_weight_mode, sigma_data; sync_dropout; of
            `tangent_loss` jvp, warmup_nimg, tangent_c, tangent_power.
        teacher: D(x, sigma, class_labels), frozen; None: hops are the data's.
    """

    def __init__(self, c, teacher=None):
        ops.check_hop(c.hop)
        share = share_of_solutions(c)
        levels = ops.student_grid(c.T, c.sigma_min, c.sigma_max, c.rho, 'full', c.sigma_grid).tolist()
        self.store = TrajectoryStore(levels, share, c.pool, c.reuse, c.batch_size, c.solver)
        self.in_fp32 = c.target == 'tangent'  # the derivative, see `differentiable`
        super().__init__(c, teacher, gap_option='--T' if c.target in ('hop', 'mixed') else '')

    def stage_after(self, nimg: int) -> int:
        return 0

    def edges_at(self, stage: int):
        c = self.c
        edges, probabilities, ends = flow_map_pairs(
            c.T, c.steps, c.grid_share, c.sigma_min, c.sigma_max, c.rho, c.sigma_grid
        )
        self._ends, self._ends_on_device = ends, None
        return edges, probabilities

    def segment_names(self, count: int) -> list[str]:
        names = [f'Loss/steps{N}' for N in self.c.steps]
        return [*names, 'Loss/other_pairs'][:count]

    def begin_step(self, nimg: int) -> None:
        super().begin_step(nimg)
        self.store.begin_step(nimg)
        self.warmup = warmup_at(nimg, self.c.warmup_nimg)

    def ends(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in the grid, [N] int64, of sigma_t and r of pairs."""
        if self._ends_on_device is None:
            self._ends_on_device = misc.upload(self._ends.numpy(), index.device)
        return self._ends_on_device[index].unbind(dim=1)

    def parts(self, rng) -> tuple[Tensor, Tensor]:
        """The images of a micro-batch, [M] int64, that learn the teacher's solution, and the others."""
        return tuple(misc.upload(part, rng.device) for part in self.store.parts(rng))

    def per_image(self) -> Tensor | None:
        return self.store.labels()

    def load_per_image(self, rows: Tensor) -> None:
        self.store.resume(rows)


def setup(c, teacher=None, net=None, perceptual=None) -> FlowMapState:
    return FlowMapState(c, teacher)


def hop_and_step(c, teacher, self_target, x_t: Tensor, y: Tensor, noise: Tensor, edges) -> Tensor:
    """x_r from one hop of the teacher, or of the data without one, to x_s, and a step of the student from there.

    Args:
        teacher, self_target: D(x, sigma), or None, and G(x, sigma, r).
        x_t, y, noise: [N, C, H, W]
    Returns: [N, C, H, W] float64.
    """
    # Where sigma_s = 0 a stand-in keeps arithmetic finite, and `by_kind` drops what follows from it.
    sigma_t, r = edges.sigma_t, edges.sigma_b
    sigma_s = ops.above_zero(edges.sigma_s, sigma_t)
    if teacher is None:
        x_s, terminal = y + ops.expand_like(sigma_s, y) * noise, y
    else:
        terminal = teacher(x_t, sigma_t)
        x_s = ops.teacher_hop(teacher, x_t, sigma_t, sigma_s, c.hop, terminal, y, c.xvar_frac)

    # The hop may have reached r already.
    stepped = ops.ddim_step(x_s, self_target(x_s, sigma_s, r=r), sigma_s, r)
    return ops.by_kind(edges.kind, terminal=terminal, snap=x_s, general=stepped)


def loss(net, images: Tensor, labels, rng, state: FlowMapState, augment_labels=None) -> Tensor:
    """Distance of the student's image G(x_t; sigma_t, r) from the one that leads to the target x_r.

    w(sigma_t) ℓ(G(x_t; sigma_t, r) − x*), x* = inv_ddim(x_r, x_t, sigma_t, r); x_r is the teacher's solution, or
    DDIM(x_s, sg[G(x_s; sigma_s, r)]) from a hop to x_s   (Kim et al. 2024, Eq. 9, in EDM's noise schedule).

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    if c.target == 'tangent':
        return tangent_loss(net, images, labels, rng, state, augment_labels)

    # A pair of levels sigma_t > r per image, and sigma_s, the teacher's next level below sigma_t.
    edges = state.draw(rng)
    sigma_t, r = edges.sigma_t, edges.sigma_b
    stored, hopped = state.parts(rng)

    # Data: x_t = y + sigma_t n.
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(sigma_t, y) * noise
    x_r = torch.zeros_like(x_t)

    with torch.no_grad():
        # Solution: both states are the teacher's, on one trajectory from pure noise, and so is the label.
        if len(stored):
            of_labels = lambda labels: denoiser(state.teacher, labels)
            paths = state.store.trajectories(rng, labels, y.shape[1:], of_labels)
            each = torch.arange(len(stored), device=y.device)
            upper, lower = (position[stored] for position in state.ends(edges.index))
            x_t = x_t.index_copy(0, stored, paths.states[each, upper].double())
            x_r = x_r.index_copy(0, stored, paths.states[each, lower].double())
            if labels is not None:
                labels = labels.index_copy(0, stored, paths.labels[stored])

    given = net, labels, augment_labels, rng, c.sync_dropout
    student, self_target = student_and_target(*given, rows=hopped)
    with torch.no_grad():
        # Hop: one step of the teacher to sigma_s, and the student's from there to r.
        if len(hopped):
            teacher = None
            if state.teacher is not None:
                teacher = denoiser(state.teacher, labels, augment_labels, rows=hopped)
            of_hopped = x_t[hopped], y[hopped], noise[hopped], edges.of(hopped)
            x_r = x_r.index_copy(0, hopped, hop_and_step(c, teacher, self_target, *of_hopped))

        # Target: the denoised image from which a DDIM step leads to x_r.
        x_star = ops.inv_ddim(x_r, x_t, sigma_t, r, check=False)

    # Loss.
    distance = ops.image_distance(student(x_t, sigma_t, r=r) - x_star, c.cd_loss)
    values = ops.edge_weight(sigma_t, edges.sigma_s, c.cd_weight_mode, c.sigma_data) * distance
    state.report(edges, values.detach())
    return values


def tangent_loss(net, images: Tensor, labels, rng, state: FlowMapState, augment_labels=None) -> Tensor:
    """The limit of hops without length: squared distance of the student's image from itself moved by a tangent g.

    g = −r (v − u) − w (sigma − r) dG, u = (x − G)/sigma, v the ODE's slope and dG the derivative of G along it. With a
    teacher |G − sg[G + g/(|g| + c)]|² (Sabour et al. 2025, "AYF-EMD"); without one v is the data's noise, and the loss
    |G − sg[G + g]|² / (|g|² + 0.001)^p (Geng et al. 2025, "MeanFlow").

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c, masks = state.c, dropout_masks(net, rng)
    student = denoiser(net, labels, augment_labels, masks)
    frozen = denoiser(differentiable(net, c.jvp), labels, augment_labels, masks)

    # r, and a level sigma anywhere between it and the upper end of a pair.
    edges = state.draw(rng)
    r, share = edges.sigma_b, misc.upload(rng.uniform('level'), images.device)
    sigma = grids.level_between(r, edges.sigma_t, share, c.sigma_min, c.rho, c.sigma_grid)

    # Data: x = y + sigma n.
    y, noise = images.double(), rng.normal('noise', images.shape[1:]).double()
    x = y + ops.expand_like(sigma, y) * noise
    slope = lambda denoised: (x - denoised) / ops.expand_like(sigma, x)

    with torch.no_grad():
        # The ODE's slope: the teacher's, or on average the data's.
        v = (
            slope(denoiser(state.teacher, labels, augment_labels)(x, sigma))
            if state.teacher is not None
            else noise
        )

    # Student: its derivative along the ODE, times sigma − r, and the tangent.
    at_r = lambda x, sigma: frozen(x, sigma, r=r)
    along = ops.expand_like(sigma - r, x) * v, sigma - r
    G, dG = tangents.derivative(at_r, (x, sigma), along, c.jvp)
    g = -ops.expand_like(r, x) * (v - slope(G)) - state.warmup * dG
    report_tangent(g, state.warmup)

    # Loss.
    trained, weight = student(x, sigma, r=r), 1
    if state.teacher is None:
        weight = (tangents.norms(g).square() + 1e-3) ** -c.tangent_power
    else:
        g = tangents.normalized(g, c.tangent_c)
    values = weight * ops.image_distance(trained - trained.detach() - g, 'l2')

    state.report(edges._replace(sigma_t=sigma), values.detach())
    return values
