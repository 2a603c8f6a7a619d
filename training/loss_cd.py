"""The place where the published system has its loss."""

from training.objectives.loss_cd import *  # noqa: F403
