"""From gradients to weights: learning rate, loss scaling, clipping, the optimizer, and skipping steps that
are not finite.

No host/device synchronization.
"""

from __future__ import annotations

import math

import torch
from torch.optim.adam import adam

from dnnlib import EasyDict
from torch_utils import training_stats
from torch_utils.flat import FlatParameters

# Dynamic loss scale: start, maximum, and finite steps between doublings.
DYNAMIC_START, DYNAMIC_MAX, GROWTH_INTERVAL = 2.0**16, 2.0**24, 2000


def learning_rate(c: EasyDict, nimg: int, peak: float | None = None) -> float:
    """Learning rate of the step that follows `nimg` images: a linear ramp from 0, times a decay by --lr_schedule.

    With p = nimg / total_nimg, the decay is 1 (constant), 1 − p (linear), (1 + cos(pi p)) / 2 (cosine), or
    1 / sqrt(max(nimg / lr_ref_nimg, 1)) (sqrt; EDM2, Karras et al. 2024).

    Args:
        peak: the highest one; None: --lr.
    """
    rate = c.lr if peak is None else peak
    if c.lr_rampup_nimg > 0:
        rate *= min(nimg / c.lr_rampup_nimg, 1.0)
    if c.lr_schedule == 'sqrt':
        return rate * min(math.sqrt(c.lr_ref_nimg / nimg), 1.0) if nimg else rate
    # A resumed run may be past its end.
    done = min(nimg / c.total_nimg, 1.0)
    return (
        rate * dict(constant=1.0, linear=1 - done, cosine=(1 + math.cos(math.pi * done)) / 2)[c.lr_schedule]
    )


def radam_factors(step: int, beta2: float) -> tuple[float, float] | None:
    """RAdam's rectification at a step, from 1, and the root of the correction of second moments' bias.

    Its step is r m̂ √(1 − β₂^t) / (√v + ε)   (Liu et al. 2020, Algorithm 2). None where the variance of the quotient
    is not tractable, ρ_t <= 5 as in PyTorch: then the step is m̂.
    """
    correction = 1 - beta2**step
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * step * beta2**step / correction
    if length <= 5:
        return None
    ratio = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
    return math.sqrt(ratio), math.sqrt(correction)


class WeightUpdate:
    """Adam or RAdam (Liu et al. 2020) on a network's flat parameters.

    A step whose gradient is not finite is skipped: weights and moments stay. Gradients are averaged over all
    processes, so all skip the same steps. `scaled_sum` makes a loss that is not finite skip its step too.

    Args:
        weights: the parameters, with all gradients in `weights.weights.grad` after `take_gradients`; if they are
            divided among processes, each updates its share.
        betas, eps: of the optimizer.
        loss_scale: factor on the loss against underflow in FP16, divided out of the gradient; None: dynamic,
            halved after every skipped step and doubled after 2000 finite ones (Micikevicius et al. 2018).
        grad_clip: clip the global gradient norm to this value; None disables clipping.
        optim: `adam` or `radam`.
        name: of the network in statistics; empty for the student.
    """

    def __init__(
        self,
        weights: FlatParameters,
        betas: tuple[float, float],
        eps: float,
        loss_scale: float | None = 1.0,
        grad_clip: float | None = None,
        optim: str = 'adam',
        name: str = '',
    ):
        self.name = name
        self.parameters, self.weights = weights, weights.weights
        self.grad_clip, self.dynamic = grad_clip, loss_scale is None
        self.optim, device = optim, self.weights.device

        # The optimizer. Adam's fused kernel is called directly, and so needs its moments from the start.
        if optim == 'radam':
            self.optimizer = torch.optim.RAdam([self.weights], betas=betas, eps=eps)
        else:
            self.optimizer = torch.optim.Adam([self.weights], betas=betas, eps=eps, fused=True)
            zeros = lambda: torch.zeros_like(self.weights, requires_grad=False)
            self.optimizer.state[self.weights] = dict(
                step=torch.zeros([], device=device), exp_avg=zeros(), exp_avg_sq=zeros()
            )

        # Loss scale, and counts of consecutive finite steps, consecutive skips and all skips, on the device.
        scale = DYNAMIC_START if self.dynamic else loss_scale
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        counts = torch.zeros([3], dtype=torch.int64, device=device)
        self.consecutive_finite, self.consecutive_skips, self.skips = counts.unbind()

    def statistic(self, name: str) -> str:
        """The name of a statistic of the network."""
        return f'Progress/{self.name}_{name}' if self.name else f'Progress/{name}'

    def scaled_sum(self, loss: torch.Tensor) -> torch.Tensor:
        """Scaled sum of the loss [N], whose gradient is NaN if any value is not finite."""
        # 0 · total is NaN if the total is not finite. The gradient then is, and the step is skipped.
        total = loss.sum()
        return total * (self.scale + 0 * total.detach())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the weights from the accumulated gradients, or skip if they are not finite."""
        # Whether to skip: the norm is infinite or NaN. A tensor, so that nothing waits for the device.
        self.parameters.take_gradients()
        norm = self.parameters.norm(self.weights.grad).float() / self.scale
        skip = ~(norm < float('inf'))

        # Undo the loss scale, and clip.
        divisor = self.scale
        if self.grad_clip is not None:
            divisor = divisor * (norm / self.grad_clip).clamp(min=1)

        self.optimizer.param_groups[0]['lr'] = lr
        if self.optim == 'adam':
            self._step_fused(divisor, skip, lr)
        elif self.weights.is_cuda and self._adaptive():
            self._step_radam_fused(divisor, skip, lr)
        else:
            self._step_and_undo(divisor, skip)
        self.parameters.publish()
        self._count(skip)
        training_stats.report(self.statistic('grad_norm'), norm)

    def _step_fused(
        self,
        divisor: torch.Tensor,
        skip: torch.Tensor,
        lr: float,
        eps: float | None = None,
        steps: torch.Tensor | None = None,
    ) -> None:
        """Adam's fused kernel, which divides the gradients itself and skips if `skip`.

        Called as a function: the overhead of `Optimizer.step` exceeds the kernel's time for small networks.

        Args:
            eps: None: the optimizer's.
            steps: [] number of steps before this one, on the device; None: the optimizer's.
        """
        # It takes lists, one entry a parameter, and here there is one parameter. The fourth list is AMSGrad's.
        group, state = self.optimizer.param_groups[0], self.optimizer.state[self.weights]
        adam(
            [self.weights],
            [self.weights.grad],
            [state['exp_avg']],
            [state['exp_avg_sq']],
            [],
            [state['step'] if steps is None else steps],
            foreach=False,
            fused=True,
            grad_scale=divisor,
            found_inf=skip.float(),
            amsgrad=False,
            beta1=group['betas'][0],
            beta2=group['betas'][1],
            lr=lr,
            weight_decay=0.0,
            eps=group['eps'] if eps is None else eps,
            maximize=False,
        )

    def _adaptive(self) -> bool:
        """Whether RAdam's next step divides by second moments, as all but the first few do."""
        count = int(self.optimizer.state[self.weights].get('step', 0)) + 1
        return radam_factors(count, self.optimizer.param_groups[0]['betas'][1]) is not None

    def _step_radam_fused(self, divisor: torch.Tensor, skip: torch.Tensor, lr: float) -> None:
        """RAdam by Adam's fused kernel, which needs no copies: its step differs by a factor, and in what eps is
        added to. Equal to `_step_and_undo` to rounding. Skipped steps count, as there."""
        group, state = self.optimizer.param_groups[0], self.optimizer.state[self.weights]
        count = int(state['step']) + 1  # on the host
        rectification, root = radam_factors(count, group['betas'][1])
        steps = torch.full([], count - 1, dtype=torch.float32, device=self.weights.device)
        self._step_fused(divisor, skip, lr * rectification, group['eps'] / root, steps)
        state['step'] += 1

    def _step_and_undo(self, divisor: torch.Tensor, skip: torch.Tensor) -> None:
        """Step of an optimizer that cannot skip: restores weights and moments if `skip`, but not its step
        count."""
        # Before the first step there are no moments: they are restored to zero.
        moments = lambda: [self.optimizer.state[self.weights].get(name) for name in ('exp_avg', 'exp_avg_sq')]
        before = [None if value is None else value.clone() for value in (self.weights.data, *moments())]
        self.weights.grad.div_(divisor)
        self.optimizer.step()
        for value, kept in zip((self.weights.data, *moments()), before):
            value.copy_(torch.where(skip, 0 if kept is None else kept, value))

    def _count(self, skip: torch.Tensor) -> None:
        """Count skips, and adapt a dynamic loss scale."""
        self.skips += skip
        self.consecutive_skips.add_(1).mul_(skip)
        if self.dynamic:
            self.consecutive_finite.add_(1).mul_(~skip)
            grow = self.consecutive_finite >= GROWTH_INTERVAL
            self.consecutive_finite.mul_(~grow)
            self.scale.mul_(torch.where(skip, 0.5, 1 + grow.float())).clamp_(min=1, max=DYNAMIC_MAX)

    def state_dict(self) -> dict:
        """Tensors and plain data, for a training state. Of vectors that are divided among processes, which all
        call this together, the main one has all, and the others None."""
        optimizer = self.optimizer.state_dict()
        optimizer['state'] = {
            index: {name: self.parameters.whole(value) if value.ndim else value for name, value in of.items()}
            for index, of in optimizer['state'].items()
        }
        return dict(optimizer=optimizer, scale=self.scale, **self._counts())

    def _counts(self) -> dict[str, torch.Tensor]:
        """The counts by their names in training states."""
        return dict(
            whole_in_a_row=self.consecutive_finite, bad_in_a_row=self.consecutive_skips, bad_steps=self.skips
        )

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`, except for a fixed loss scale, betas and eps, which keep their current
        values.

        Raises: ValueError for moments of another network.
        """
        # Check the shapes, which the optimizer would not.
        size = self.parameters.size
        for name, value in state['optimizer']['state'].get(0, {}).items():
            if value.shape != (() if name == 'step' else (size,)):
                raise ValueError(
                    f'the optimizer has {name} of shape {list(value.shape)}, and the network {size:,} weights'
                )

        # Restore.
        moments = {
            index: {name: self.parameters.share(value) if value.ndim else value for name, value in of.items()}
            for index, of in state['optimizer']['state'].items()
        }
        groups = self.optimizer.state_dict()['param_groups']
        self.optimizer.load_state_dict(dict(state['optimizer'], state=moments, param_groups=groups))
        for name, count in self._counts().items():
            count.copy_(state[name])
        if self.dynamic:
            self.scale.copy_(state['scale'])
