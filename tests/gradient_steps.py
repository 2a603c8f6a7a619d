"""Steps on several processes by `Gradients` and by DDP, as one program, of which `test_gradients` reads what it prints.

    torchrun --standalone --nproc_per_node=N -m tests.gradient_steps

Prints one JSON object: for each case the largest difference of gradients and weights over the steps, relative to
the largest value, the number of slices, and whether all processes have the same weights.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_execution import build, inputs

from torch_utils import distributed, gradients
from torch_utils.flat import FlatParameters
from training import execution
from training.weight_update import WeightUpdate

CASES = [('adm', 'fp32'), ('ncsnpp', 'bf16'), ('edm2', 'fp32')]
STEPS, ROUNDS = 2, 2
SKIPPED = 0  # the step whose loss is not finite, on one process


class Ours:
    def __init__(self, net, flat):
        self.gradients = gradients.Gradients(net, flat, *execution.rounded_parameters(net))
        self.net, self.begin_step, self.round = (
            self.gradients.net,
            self.gradients.begin_step,
            self.gradients.round,
        )


class Theirs:
    """DDP reduces gradients in the last round; weights are rounded in every pass."""

    def __init__(self, net, flat):
        self.net, self.begin_step = torch.nn.parallel.DistributedDataParallel(net), flat.zero_gradients

    def round(self, last):
        return contextlib.nullcontext() if last else self.net.no_sync()


def train(kind: str, precision: str, way: type) -> tuple[list[torch.Tensor], object]:
    """Gradients and weights after each step."""
    net = execution.in_precision(build(kind), precision)
    # Of parameters without a gradient, which DDP would not allow.
    for name, parameter in net.named_parameters():
        parameter.requires_grad_('logvar' not in name)
    flat = FlatParameters(net)
    student, update = way(net, flat), WeightUpdate(flat, (0.9, 0.99), 1e-8, None, grad_clip=1.0)
    found = []
    for step in range(STEPS):
        student.begin_step()
        for i in range(ROUNDS):
            # Other noise levels for every process and round.
            shift = 1 + 0.1 * (step * ROUNDS + i) + 0.05 * distributed.get_rank()
            x, sigma, labels, masks = inputs(net, 3)
            with student.round(last=i == ROUNDS - 1):
                loss = student.net(x * shift, sigma * shift, labels, dropout_masks=masks).square()
                if step == SKIPPED and i == 0 and distributed.is_main():
                    loss = loss * float('inf')
                update.scaled_sum(loss).backward()
        update.step(1e-3)
        found += [flat.weights.grad.clone(), flat.weights.detach().clone()]
    assert update.skips == 1
    return found, student


def main() -> None:
    torch.set_num_threads(1)
    distributed.init()
    gradients.SLICE = 20_000
    results = {}
    for kind, precision in CASES:
        ours, student = train(kind, precision, Ours)
        theirs, _ = train(kind, precision, Theirs)
        finite = [torch.isfinite(b).all() for b in theirs]
        pairs = [(a, b) for a, b, whole in zip(ours, theirs, finite) if whole]
        assert len(pairs) == 2 * STEPS - 1 and not torch.isfinite(ours[2 * SKIPPED]).all()
        results[f'{kind}, {precision}'] = dict(
            difference=max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs),
            slices=len(student.gradients._slices),
            same=all(distributed.same_everywhere(a) for a in ours[1::2]),
            rounded=bool(student.gradients.vectors),
        )
    distributed.print0(json.dumps(results))
    distributed.shutdown()


if __name__ == '__main__':
    main()
