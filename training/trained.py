"""A network that trains, with everything that training it takes: its gradients and its optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torch_utils.gradients import Gradients
from training import execution
from training.weight_update import WeightUpdate


class Trained(NamedTuple):
    """A network that trains.

    Attributes:
        net: the network.
        gradients: of `net`, averaged over the processes; `gradients.net` is what steps evaluate.
        evaluated: the same, in DDP if several processes run it compiled.
        update: optimizer on the network's parameters as one vector.
    """

    net: torch.nn.Module
    gradients: Gradients
    evaluated: torch.nn.Module
    update: WeightUpdate

    def begin_step(self, trains: bool = True) -> None:
        """Before a step in which it is evaluated, and trains or not."""
        execution.force_unit_weights(self.net, self.update.parameters)
        self.gradients.begin_step(trains)

    def state_dict(self) -> dict:
        """Tensors and plain data, for a training state; all processes call this together."""
        return dict(net=self.update.parameters.state_dict(self.net), update=self.update.state_dict())

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`; takes the entries out of `state`. Raises: RuntimeError, ValueError for another
        network."""
        self.update.parameters.load_state_dict(self.net, state.pop('net'))
        self.update.load_state_dict(state.pop('update'))
