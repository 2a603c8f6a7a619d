"""What objectives with a second network that trains share: whose turn it is, and the two networks in a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dnnlib.lazy import lazy_import
from training.objectives.loss import State, denoiser, dropout_masks, unwrap

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

torch = lazy_import('torch')


def with_gradients(function: Callable[..., Tensor], enabled: bool) -> Callable[..., Tensor]:
    """A function whose results have gradients, or not."""

    def call(*args):
        with torch.set_grad_enabled(enabled):
            return function(*args)

    return call


class AlternatingState(State):
    """The auxiliary network and the student train in turn, step by step, the auxiliary network first.

    Args:
        c: aux_ahead, number of steps of the auxiliary network alone at the start; batch_size, images of a step.
    """

    def __init__(self, c, teacher: Module):
        super().__init__(c, teacher)
        self.begin_step(0)

    def begin_step(self, nimg: int) -> None:
        step = nimg // self.c.batch_size
        self.trains_auxiliary = step < self.c.aux_ahead or (step - self.c.aux_ahead) % 2 == 0

    def networks_of(
        self, net: Module, labels: Tensor | None, augment_labels: Tensor | None, rng, through: bool = False
    ) -> tuple[Callable, Callable]:
        """D(x, sigma) of the student and of the auxiliary network, without gradients where it is the other's turn.

        Args:
            through: in the student's turn gradients go through the auxiliary network, whose weights are frozen then.
        """
        auxiliary, turn = self.auxiliary, self.trains_auxiliary
        masks = dropout_masks(net, rng), dropout_masks(auxiliary, rng, 'auxiliary dropout')
        student = denoiser(unwrap(net) if turn else net, labels, augment_labels, masks[0])
        second = denoiser(auxiliary if turn else unwrap(auxiliary), labels, augment_labels, masks[1])
        return with_gradients(student, not turn), with_gradients(second, turn or through)
