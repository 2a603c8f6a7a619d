"""Losses for tests: an objective set up with its default options, and the targets that its gradient tells
of."""

import torch
from gaussian import Gaussian

from dnnlib import EasyDict
from training import consistency_ops as ops
from training import networks
from training.objectives import OBJECTIVES

VARIANCE = torch.tensor([0.02, 0.25, 1.0, 4.0], dtype=torch.float64).reshape(1, 1, 2, 2)


class Loss:
    """An objective and its state, called as `loss(net, images, labels, rng, augment_labels)`.

    Args:
        module: of the objective, or its name.
        networks: teacher, net, perceptual, see `training.objectives.loss`.
        options: those that are not the objective's defaults.
    """

    def __init__(self, module, teacher=None, net=None, perceptual=None, **options):
        if isinstance(module, str):
            options = {**OBJECTIVES[module].options, 'sigma_data': 0.5, **options}
            module = OBJECTIVES[module].module()
        self.module, self.NAME = module, module.NAME
        self.state = module.setup(EasyDict(options), teacher, net, perceptual)

    def __call__(self, net, images, labels, rng, augment_labels=None):
        return self.module.loss(net, images, labels, rng, self.state, augment_labels)

    def begin_step(self, nimg):
        self.state.begin_step(nimg)


# ----------------------------------------------------------------------------
# Targets. Where the distance is quadratic, the gradient by the prediction is a slope times (prediction − x*).


class Probe(torch.nn.Module):
    """A student whose prediction is one value everywhere, as a leaf of the graph; without gradients, as its
    own target, it is `net`."""

    def __init__(self, net, value):
        super().__init__()
        self.net, self.value = net, value

    def forward(self, x, sigma, class_labels=None, dropout_masks=None, **end):
        if not torch.is_grad_enabled():
            return self.net(x, sigma, class_labels, dropout_masks=dropout_masks, **end)
        self.x_t, self.prediction = x, torch.full_like(x, self.value).requires_grad_(True)
        return self.prediction

    def dropout_masks(self, batch_size, generator=None):
        return {}


def target(loss, student, y, rng, labels=None):
    """x_t and x*, [N, ...] each, of a loss whose distance is quadratic, or nearly so, for images y [N,
    ...]."""
    gradients = []
    for value in (0.0, 1024.0):
        probe = Probe(student, value)
        (gradient,) = torch.autograd.grad(loss(probe, y, labels, rng).sum(), probe.prediction)
        gradients.append(gradient)
    slope = (gradients[1] - gradients[0]) / 1024
    return probe.x_t, -gradients[0] / slope


class EveryEdge:
    """Random numbers that put one image on each edge of a schedule, with the given noise."""

    first, device = 0, torch.device('cpu')

    def __init__(self, state, noise, index=None):
        ends = torch.from_numpy(state.cumulative)
        middles = (ends + torch.cat([ends.new_zeros(1), ends[:-1]])) / 2 / ends[-1]
        self.index = torch.arange(len(ends)) if index is None else index
        self.count, self.noise, self.middles = len(self.index), noise, middles[self.index].numpy()

    def uniform(self, purpose):
        return self.middles

    def normal(self, purpose, shape=()):
        return self.noise

    def generator(self, purpose):
        return torch.Generator().manual_seed(0)


def targets(loss, student, y, noise):
    """x_t, x*, and the edges, for one image on every edge; `y` and `noise` [1, ...]."""
    edges = loss.state.edges
    y, noise = (values.expand(len(edges), *values.shape[1:]) for values in (y, noise))
    rng = EveryEdge(loss.state, noise)
    assert torch.equal(loss.state.draw(rng).index, rng.index)
    return *target(loss, student, y, rng), edges


# ----------------------------------------------------------------------------
# Students of Gaussian data.


class LinearStudent(torch.nn.Module):
    """Predicts the image from which DDIM reaches x_b = multiplier(sigma) x at the boundary of sigma's segment
    (data of mean 0)."""

    def __init__(self, student_grid, multiplier):
        super().__init__()
        self.grid, self.multiplier = student_grid, multiplier

    def forward(self, x, sigma, class_labels=None, dropout_masks=None):
        sigma_b = self.grid[ops.segment_of(sigma, self.grid) + 1]
        return ops.inv_ddim(self.multiplier(sigma, sigma_b) * x, x, sigma, sigma_b)

    def dropout_masks(self, batch_size, generator=None):
        return {}


class Linear(torch.nn.Module):
    """D(x; t) = multiplier(t) x."""

    def __init__(self, multiplier):
        super().__init__()
        self.multiplier = multiplier

    def forward(self, x, sigma, class_labels=None, dropout_masks=None):
        return torch.stack([self.multiplier(t) for t in sigma.tolist()]) * x

    def dropout_masks(self, batch_size, generator=None):
        return {}


def exact_student(gaussian: Gaussian, grid):
    return LinearStudent(
        grid,
        lambda sigma, sigma_b: gaussian.solve(torch.ones(1, 1, 1, 1, dtype=torch.float64), sigma, sigma_b),
    )


def expected_gradients(loss, grid, c, edges):
    """E[(prediction − x*) x_t] on every edge and eigenvalue, in closed form.

    All is linear in (y, noise), so that probing with each alone gives the coefficients, and E[y²] = variance,
    E[noise²] = 1.
    """
    table = dict(zip(edges.sigma_t.tolist(), c))
    student = LinearStudent(grid, lambda sigma, sigma_b: torch.stack([table[s] for s in sigma.tolist()]))
    one, zero = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    gradient = 0
    for y, noise, second_moment in ((one, zero, VARIANCE), (zero, one, torch.ones_like(VARIANCE))):
        x_t, x_star, _ = targets(loss, student_on(student, edges), y, noise)
        gradient = gradient + second_moment * (student(x_t, edges.sigma_t) - x_star) * x_t
    return gradient / (VARIANCE + ops.expand_like(edges.sigma_t, VARIANCE.expand(len(c), 1, 2, 2)) ** 2)


def student_on(student, edges):
    """The student as a self-target: evaluated at lower ends, which are upper ends of the next edge, except where
    the result is dropped."""
    known = set(edges.sigma_t.tolist())

    class Lenient(LinearStudent):
        def forward(self, x, sigma, class_labels=None, dropout_masks=None):
            stand_in = torch.tensor(
                [s if s in known else float(edges.sigma_t[0]) for s in sigma.tolist()], dtype=torch.float64
            )
            return student(x, stand_in)

    return Lenient(student.grid, None)


def assert_stationary_there_alone(loss, grid, c, edges, rounding=1e-10):
    """The expected gradient vanishes for the multipliers c, and on no edge for one that is 1 % off."""
    assert expected_gradients(loss, grid, c, edges).abs().max() < rounding
    for k in range(len(edges)):
        wrong = c.clone()
        wrong[k] *= 1.01
        assert expected_gradients(loss, grid, wrong, edges)[k].abs().max() > 1e-6, k


def boundary_multiplier(loss, grid, value):
    """What the loss's own boundary targets x_b hold of x_t, by regression, [T', 1, 2, 2], for a student that
    multiplies by `value` everywhere."""
    student = LinearStudent(grid, lambda sigma, sigma_b: torch.full([1, 1, 1, 1], value, dtype=torch.float64))
    one, zero = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    moment, square = 0, 0
    for y, noise, second_moment in ((one, zero, VARIANCE), (zero, one, torch.ones_like(VARIANCE))):
        x_t, x_star, edges = targets(loss, student, y, noise)
        moment = moment + second_moment * ops.ddim_step(x_t, x_star, edges.sigma_t, edges.sigma_b) * x_t
        square = square + second_moment * x_t**2
    return moment / square


def multipliers_of_targets(loss, grid):
    """c read off the loss's own targets: they are affine in the student's prediction at the lower end, which is
    the next edge's upper one."""
    offset, full = (boundary_multiplier(loss, grid, value) for value in (0.0, 1.0))
    edges, c = loss.state.edges, torch.zeros_like(offset)
    for k in reversed(range(len(c))):
        c[k] = offset[k] + (full - offset)[k] * (c[k + 1] if edges.kind[k] == ops.GENERAL else 0)
    return c, edges


# ----------------------------------------------------------------------------
# Networks.


class Recorder(torch.nn.Module):
    """A student that remembers what it was given."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x, sigma, labels=None, dropout_masks=None):
        self.calls.append((sigma, dropout_masks))
        return self.net(x, sigma, labels, dropout_masks=dropout_masks)

    def dropout_masks(self, batch_size, generator=None):
        return self.net.dropout_masks(batch_size, generator)


def small_network(dropout=0.5, **kwargs):
    torch.manual_seed(0)
    return networks.EDMPrecond(
        8,
        1,
        0,
        model_channels=16,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[],
        dropout=dropout,
        **kwargs,
    ).train()
