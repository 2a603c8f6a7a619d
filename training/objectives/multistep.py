"""The edges of multistep students (Heek et al. 2024, Section 3): a teacher's grid on the segments of a
student of S steps."""

from __future__ import annotations

from dnnlib.lazy import lazy_import
from training.objectives.edge_schedule import EdgeSchedule
from training.objectives.options import check_segments

ops = lazy_import('training.consistency_ops')


class MultistepSchedule(EdgeSchedule):
    """About T edges, where T is annealed log-linearly from T_start to T_end (`consistency_ops.anneal_T`).

    Args:
        c: S, student_grid; T_start, T_end, T_anneal_kimg; sigma_grid, rho, sigma_min, sigma_max (already
            clipped to the teacher's range); sampling_mode, top_mass (`grids.edge_probabilities`);
            keep_ties (`grids.teacher_grid`).
        anchor: the first edge is anchored (`EdgeSchedule`). Unless sampling_mode is `uniform`, the first and
            the last edge then have probability 1/T' each.
    Attributes:
        student_sigmas: [S+1] the student's grid.
    Raises: ValueError unless S <= T_start <= T_end.
    """

    def __init__(self, c, teacher=None, anchor: bool = False, gap_option: str = ''):
        check_segments(c.S, c.T_start, c.T_end)
        self.student_sigmas = ops.student_grid(
            c.S, c.sigma_min, c.sigma_max, c.rho, c.student_grid, c.sigma_grid
        )
        super().__init__(c, teacher, anchor, gap_option)

    def stage_after(self, nimg: int) -> int:
        return ops.anneal_T(nimg, self.c.T_start, self.c.T_end, self.c.T_anneal_kimg)

    def edges_at(self, stage: int):
        c = self.c
        # About T edges on the student's segments.
        teacher_grid = ops.teacher_grid(
            self.student_sigmas, stage, c.sigma_min, c.sigma_max, c.rho, c.sigma_grid, c.keep_ties
        )
        # With an anchored edge, both ends have a probability of their own: the edges from sigma_max and to 0.
        probabilities = ops.edge_probabilities(
            teacher_grid,
            self.student_sigmas,
            c.sampling_mode,
            c.rho,
            terminal_anchor=self.anchor,
            pin_top=self.anchor,
            spacing=c.sigma_grid,
            top_mass=c.top_mass,
        )
        return ops.edge_table(teacher_grid, self.student_sigmas), probabilities
