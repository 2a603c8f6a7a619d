"""A stage of progressive distillation against Gaussian data: its targets are two DDIM steps of the teacher,
inverted."""

import itertools

import pytest
import torch
from gaussian import Gaussian
from losses import (
    VARIANCE,
    LinearStudent,
    Loss,
    assert_stationary_there_alone,
    boundary_multiplier,
    expected_gradients,
    targets,
)

from training import consistency_ops as ops
from training.rng import SampleRng


def make_loss(teacher=None, **options):
    return Loss('pd', teacher or Gaussian(VARIANCE), **options)


def grid(S, sigma_grid='karras'):
    """The student's."""
    return ops.student_grid(S, 0.002, 80, 7, 'full', sigma_grid)


def two_step_multipliers(loss, S, sigma_grid='karras'):
    """Products of DDIM's multipliers D + r (1 − D) over two edges of the finer grid, [S, 1, 2, 2]."""
    fine = ops.student_grid(2 * S, 0.002, 80, 7, 'full', sigma_grid)
    step = [VARIANCE[0] / (VARIANCE[0] + t**2) * (1 - s / t) + s / t for t, s in itertools.pairwise(fine)]
    return torch.stack([above * below for above, below in zip(step[::2], step[1::2])]), loss.state.edges


@pytest.mark.parametrize('sigma_grid', ['karras', 'cosine'])
@pytest.mark.parametrize('S', [1, 2, 8])
def test_two_steps_of_the_teacher_have_zero_expected_gradient_and_a_perturbed_student_has_not(S, sigma_grid):
    loss = make_loss(S=S, sigma_grid=sigma_grid)
    assert_stationary_there_alone(loss, grid(S, sigma_grid), *two_step_multipliers(loss, S, sigma_grid))


def test_hops_that_lengthen_the_noise_have_another_student():
    """aDDIM with the data's variance leaves DDIM's student with a gradient; without any variance it is
    DDIM."""
    exact, edges = two_step_multipliers(make_loss(S=4), 4)
    assert (
        expected_gradients(make_loss(S=4, hop='addim', xvar_frac=0.75), grid(4), exact, edges).abs().max()
        > 1e-3
    )
    y, noise = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ddim, addim = (
        targets(make_loss(S=4, hop=hop, xvar_frac=1e-30), None, y, noise)[1] for hop in ('ddim', 'addim')
    )
    torch.testing.assert_close(ddim, addim, rtol=1e-12, atol=1e-12)


def test_the_stages_compound_to_the_exact_map_at_first_order():
    """Where each stage is learned exactly, S steps of the student are 2 S of its teacher; ever more of them
    approach the solution of the ODE."""
    exact = ((VARIANCE[0] + 0.002**2) / (VARIANCE[0] + 80**2)).sqrt()
    errors = []
    for S in (128, 256, 512):
        c = boundary_multiplier(make_loss(S=S), grid(S), 0.0)  # no student has a part in it
        errors.append((c.prod(dim=0) / exact - 1).abs().max())
    assert all(1.8 < a / b < 2.2 for a, b in itertools.pairwise(errors)), errors


class Asked(Gaussian):
    """Remembers the noise levels that it is asked at."""

    levels = ()

    def __call__(self, x, sigma, *args, **kwargs):
        self.levels = {*self.levels, *sigma.tolist()}
        return super().__call__(x, sigma, *args, **kwargs)


def test_the_teacher_is_asked_at_the_levels_it_was_trained_for_alone():
    """Those of the grid of 2 S steps, bit for bit: a student of the stage before is valid there and nowhere
    else."""
    teacher = Asked(VARIANCE)
    loss = make_loss(teacher, S=4)
    y, noise = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    targets(loss, None, y, noise)
    fine = ops.student_grid(8, 0.002, 80, 7, 'full')[:-1].tolist()
    assert len(teacher.levels) == 8 and all(
        min(abs(level / own - 1) for own in fine) < 1e-12 for level in teacher.levels
    )


def test_edges_are_drawn_evenly_and_weighted_by_the_truncated_snr():
    loss = make_loss(S=4)
    rng = SampleRng(0, 0, 4096)
    edges = loss.state.draw(rng)
    assert torch.bincount(edges.index, minlength=4).sub(1024).abs().max() < 150  # five standard deviations
    zeros = LinearStudent(grid(4), lambda sigma, sigma_b: torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    images = torch.zeros(4096, 1, 2, 2, dtype=torch.float64)
    weighted, flat = (
        make_loss(S=4, cd_weight_mode=mode)(zeros, images, None, rng) for mode in ('truncated-snr', 'flat')
    )
    torch.testing.assert_close(weighted / flat, edges.sigma_t.pow(-2).clamp(min=1))


def test_the_loss_of_the_exact_student_is_zero():
    loss = make_loss(S=4)
    c, edges = two_step_multipliers(loss, 4)
    table = dict(zip(edges.sigma_t.tolist(), c))
    student = LinearStudent(grid(4), lambda sigma, sigma_b: torch.stack([table[s] for s in sigma.tolist()]))
    values = loss(
        student.train(),
        torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0)),
        None,
        SampleRng(0, 0, 16),
    )
    assert values.shape == (16,) and values.max() < 1e-20


@pytest.mark.parametrize('options', [dict(student_grid='edm'), dict(hop='heun')])
def test_grids_that_do_not_nest_and_other_hops_are_refused(options):
    with pytest.raises(ValueError, match='full' if 'student_grid' in options else 'heun'):
        make_loss(S=4, **options)
