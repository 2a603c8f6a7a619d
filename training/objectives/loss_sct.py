"""Continuous-time consistency training (Lu & Song 2025): the loss of distillation (`loss_scd`), with the velocity of
each image's own noise in place of a teacher's, which is its mean."""

from __future__ import annotations

from dataclasses import dataclass

from training.objectives.continuous_time import ContinuousConfig, ContinuousState
from training.objectives.loss_scd import loss
from training.objectives.options import CONTINUOUS, Objective

__all__ = ['NAME', 'OBJECTIVE', 'loss', 'setup']

NAME = 'sct'


@dataclass(frozen=True)
class ContinuousTrainingConfig(ContinuousConfig):
    """Options of --objective=sct."""


OBJECTIVE = Objective(ContinuousTrainingConfig, defaults=dict(CONTINUOUS, dropout=0.2))


def setup(c, teacher=None, net=None, perceptual=None) -> ContinuousState:
    return ContinuousState(c, None, net)
