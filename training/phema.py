"""Averages of the weights over training: exponential with a half-life, and power-function EMA with its
post-hoc reconstruction.

Power functions: Karras et al. 2024 (EDM2), Section 3 and Appendix C. A profile of exponent gamma gives the
weights at time tau <= t the factor p(tau) ∝ tau^gamma. Its relative width is
std = (gamma+1)^½ (gamma+2)^-1 (gamma+3)^-½.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from torch_utils.flat import FlatParameters

# ----------------------------------------------------------------------------
# Profiles of power functions, and combinations of them.


def std_to_exp(std) -> np.ndarray:
    """Exponent of the power-function profile of relative width `std` (any shape).

    The largest real root of (gamma + 2)² (gamma + 3) = (gamma + 1) / std²   (EDM2, Appendix C).
    """
    std = np.asarray(std, dtype=np.float64)
    left = np.polymul(np.polymul([1, 2], [1, 2]), [1, 3])
    # (gamma + 2)² (gamma + 3) − (gamma + 1) / std², from the highest power down.
    largest = lambda s: np.roots(np.polysub(left, np.array([1, 1]) / s**2)).real.max()
    return np.array([largest(s) for s in std.ravel()]).reshape(std.shape)


def power_function_beta(std: float, t_next: float, t_delta: float) -> float:
    """EMA decay of one update: (1 − t_delta / t_next)^(gamma + 1)   (EDM2, Section 3.1).

    Args:
        t_next: images seen after the update.
        t_delta: images in its batch.
    """
    return _decay(float(std_to_exp(std)), t_next, t_delta)


def _decay(exponent: float, t_next: float, t_delta: float) -> float:
    return (1 - t_delta / t_next) ** (exponent + 1)


def _profile_products(t_a, gamma_a, t_b, gamma_b) -> np.ndarray:
    """Inner products of profiles p(tau) = (gamma + 1) tau^gamma / t^(gamma+1) on [0, t]   (EDM2, Appendix C).

    Arguments broadcast.
    """
    t = np.minimum(t_a, t_b)
    # The integral of two powers up to the earlier end, in quotients that cannot overflow.
    shape = (t / t_a) ** gamma_a * (t / t_b) ** gamma_b * t / (t_a * t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shape


def solve_posthoc_coefficients(in_ofs, in_std, out_ofs, out_std) -> np.ndarray:
    """Coefficients that combine stored averages into others: least squares over profiles (EDM2, Section 3.2).

    Args:
        in_ofs, in_std: [I] times (any unit of images) and widths of the stored averages.
        out_ofs, out_std: [O] times and widths of the wanted averages.
    Returns: [I, O] float64, whose columns sum to 1.
    """
    in_ofs, out_ofs = (np.asarray(t, dtype=np.float64).ravel() for t in (in_ofs, out_ofs))
    in_exp, out_exp = (std_to_exp(np.ravel(s)) for s in (in_std, out_std))
    # [I, I] and [I, O] inner products.
    gram = _profile_products(in_ofs[:, None], in_exp[:, None], in_ofs, in_exp)
    wanted = _profile_products(in_ofs[:, None], in_exp[:, None], out_ofs, out_exp)
    weights = np.linalg.solve(gram, wanted)
    # Least squares leaves the sums near 1; exactly 1 keeps the scale of the weights.
    return weights / weights.sum(axis=0)


def posthoc_error(in_ofs, in_std, out_ofs, out_std, weights) -> np.ndarray:
    """Relative L2 error of combined profiles, ‖p − Σᵢ cᵢ pᵢ‖ / ‖p‖, exactly, from inner products (EDM2,
    Appendix C):

        ‖p − Σᵢ cᵢ pᵢ‖² = ⟨p, p⟩ − 2 Σᵢ cᵢ ⟨pᵢ, p⟩ + Σᵢⱼ cᵢ cⱼ ⟨pᵢ, pⱼ⟩, ⟨p_a, p_b⟩ = (γ_a+1)(γ_b+1) /
        (γ_a+γ_b+1) · t^(γ_a+γ_b+1) / (t_a^(γ_a+1) t_b^(γ_b+1)),  t = min(t_a, t_b).

    It bounds the error of the weights. The averages of `WeightAverages` are ∫ p(τ) w(τ) dτ exactly, for
    weights w that are constant during a step. As profiles have mass 1 and Σᵢ cᵢ = 1, subtracting a constant v
    from w changes nothing, and by Cauchy-Schwarz the combined weights are at most
    error · ‖p‖ · (∫ ‖w(τ) − v‖² dτ)^½ away, with ∫ over [0, t] and ‖p‖² = (γ+1)² / ((2γ+1) t).

    Args:
        in_ofs, in_std, out_ofs, out_std: as in `solve_posthoc_coefficients`.
        weights: [I, O] the coefficients c, whose columns sum to 1.
    Returns: [O] float64; cancellation leaves about 1e-8 where the error is 0.
    """
    in_ofs, out_ofs = (np.asarray(t, dtype=np.float64).ravel() for t in (in_ofs, out_ofs))
    in_exp, out_exp = (std_to_exp(np.ravel(s)) for s in (in_std, out_std))

    # ⟨p, p⟩, Σᵢ cᵢ ⟨pᵢ, p⟩ and Σᵢⱼ cᵢ cⱼ ⟨pᵢ, pⱼ⟩ for each output.
    own = _profile_products(out_ofs, out_exp, out_ofs, out_exp)
    shared = (weights * _profile_products(in_ofs[:, None], in_exp[:, None], out_ofs, out_exp)).sum(axis=0)
    combined = (
        weights * (_profile_products(in_ofs[:, None], in_exp[:, None], in_ofs, in_exp) @ weights)
    ).sum(axis=0)
    return np.sqrt(np.maximum(own - 2 * shared + combined, 0) / own)


# ----------------------------------------------------------------------------
# Averages during training.


def average_name(std: float) -> str:
    """Name of a power-function average in files, logs and --val_emas: `phema-0.050`."""
    return f'phema-{std:.3f}'


class WeightAverages:
    """Averages of a network's weights, updated after every optimizer step.

    On the host, a thread computes them while the network continues to train (`HostCopies`). `networks`,
    `vectors` and `state_dict` wait for the thread, so they are always up to date.

    Args:
        net: the network that trains.
        weights: its parameters as one vector.
        halflife_nimg, rampup_ratio: the exponential average has the effective half-life min(halflife_nimg,
            rampup_ratio × images seen), or halflife_nimg if the ratio is None.
        phema_stds: widths of the power-function averages.
        device: device of the averages: None for the network's, or 'cpu' for the host.
        every: number of steps between two weights that enter the averages. Those in between do not, and averages
            are up to `every` − 1 steps old; their profiles over the images seen are the same but for that.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        weights: FlatParameters,
        halflife_nimg: float,
        rampup_ratio: float | None,
        phema_stds: list[float],
        device: torch.device | str | None = None,
        every: int = 1,
    ):
        self.halflife_nimg, self.rampup_ratio, self.source = halflife_nimg, rampup_ratio, weights
        names = ['ema', *map(average_name, phema_stds)]
        # Networks that are never trained, each over one vector, so that an update is one operation. Of weights that
        # are divided among processes each averages its share, and networks are made when they are needed.
        if weights.sharded:
            self._networks = {}
            self._vectors = {name: weights.weights.detach().clone().to(device) for name in names}
        else:
            frozen = lambda: copy.deepcopy(net).eval().requires_grad_(False).to(device)
            self._networks = {name: frozen() for name in names}
            self._vectors = {
                name: FlatParameters(average).weights for name, average in self._networks.items()
            }
        self._stds = dict(zip(phema_stds, names[1:]))
        self._exponents = [float(std_to_exp(std)) for std in phema_stds]
        # Products of the decays of steps since the last weights that were taken in.
        self._every, self._waiting = every, [1.0] * len(names)
        # Whether weights also change before the update, see `networks.edm2.force_unit_weights`.
        self._changed_early = any(hasattr(part, 'forces_unit_weights') for part in net.modules())
        self._changed_early |= weights.sharded
        # On the device of training, no copies are needed.
        self._copies = None if device is None else HostCopies(weights.weights, self._take_in)

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The averages as networks, by their names in files; empty if they are divided among processes."""
        self.flush()
        return self._networks

    @property
    def vectors(self) -> dict[str, torch.Tensor]:
        """The parameters of each average as one vector."""
        self.flush()
        return self._vectors

    @property
    def names(self) -> dict[str, float | None]:
        """Names of the averages in files, and their widths; None for the exponential one."""
        return {'ema': None, **{name: std for std, name in self._stds.items()}}

    def saved(self, name: str) -> torch.nn.Module | None:
        """An average for a file, on the main process. Of divided averages, which all processes call this together
        for, the others have None."""
        if not self.source.sharded:
            return self.networks[name]
        whole = self.source.whole(self.vectors[name].to(self.source.weights.device))
        return None if whole is None else self.source.network(whole)

    def on_device(self, name: str) -> torch.nn.Module:
        """An average on the device of training, for sampling: itself, or a copy."""
        device = self.source.weights.device
        if self.source.sharded:
            return self.source.network(self.source.whole(self.vectors[name].to(device), device))
        network = self.networks[name]
        return network if next(network.parameters()).device == device else copy.deepcopy(network).to(device)

    def halflife_at(self, nimg: int) -> float:
        """Effective half-life in images after `nimg` images."""
        if self.rampup_ratio is None:
            return self.halflife_nimg
        return min(self.halflife_nimg, nimg * self.rampup_ratio)

    def decays(self, nimg: int, batch_size: int) -> list[float]:
        """Decays of the averages, in their order, for the step that `update` takes in."""
        # As in EDM, the ramp counts the images before this step.
        halflife = self.halflife_at(nimg - batch_size)
        # A half-life of 0, at the start of a ramp, makes the average follow the weights.
        exponential = 0.5 ** (batch_size / max(halflife, 1e-8))
        return [exponential, *(_decay(exponent, nimg, batch_size) for exponent in self._exponents)]

    def update(self, nimg: int, batch_size: int) -> None:
        """After a step of `batch_size` images, the last of `nimg` images, take in the weights if it is their turn.

        Buffers do not change in training.
        """
        decays = [a * b for a, b in zip(self._waiting, self.decays(nimg, batch_size))]
        if nimg // batch_size % self._every:
            self._waiting = decays
            return
        self._waiting = [1.0] * len(decays)
        if self._copies is None:
            self._take_in(self.source.weights, decays)
        else:
            self._copies.send(decays)

    @torch.no_grad()
    def _take_in(self, weights: torch.Tensor, decays: list[float]) -> None:
        """average <- decay average + (1 − decay) weights, all averages at once."""
        averages = list(self._vectors.values())
        torch._foreach_lerp_(averages, [weights] * len(averages), [1 - decay for decay in decays])

    def begin_step(self) -> None:
        """To be called before a step, whose forward passes change the weights of some networks (EDM2's)."""
        if self._changed_early:
            self.before_update()

    def before_update(self) -> None:
        """To be called before the weights change: the device changes them only after the last `update` has copied
        them."""
        if self._copies is not None:
            self._copies.wait_for_copy()

    def flush(self) -> None:
        """Wait until all updates have been taken in."""
        if self._copies is not None:
            self._copies.flush()

    def state_dict(self) -> dict:
        """Tensors of all averages, for a training state; on the main process (see `saved`). Between two weights that
        enter them also `waiting`, the decays of the steps since."""
        found = {}
        for name, std in self.names.items():
            net = self.saved(name)
            found[std] = {} if net is None else dict(net.state_dict())
        state = dict(ema=found.pop(None), phema=found)
        waits = any(decay != 1 for decay in self._waiting)
        return state | (dict(waiting=self._waiting) if waits else {})

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`, on every process."""
        vectors = self.vectors
        self._waiting = state.get('waiting', [1.0] * len(vectors))
        for name, std in self.names.items():
            tensors = state['ema'] if std is None else state['phema'][std]
            if self.source.sharded:
                vectors[name].copy_(self.source.share(self.source.flattened(tensors)))
            else:
                self._networks[name].load_state_dict(tensors)


class HostCopies:
    """Asynchronous device-to-host copies of a vector, which a thread takes in, in order.

    On a GPU a separate stream copies into one of two pinned buffers. `send` waits for the thread only if both
    are in use.

    Args:
        source: the vector.
        take_in: called in the thread with a copy and the message that was sent with it.
    """

    def __init__(self, source: torch.Tensor, take_in: Callable[[torch.Tensor, object], None]):
        self.source, self.take_in = source, take_in
        self.stream = torch.cuda.Stream(source.device) if source.is_cuda else None
        # Two buffers: the device fills one while the thread reads the other.
        self._buffers = deque(
            torch.empty_like(source, device='cpu', pin_memory=source.is_cuda, requires_grad=False)
            for _ in range(2)
        )
        # The thread begins with its first work, so processes forked before that do not inherit it. A new thread
        # is on the first GPU, where waiting for an event would take memory.
        own = dict(initializer=torch.cuda.set_device, initargs=(source.device,)) if source.is_cuda else {}
        self._thread = ThreadPoolExecutor(max_workers=1, **own)
        self._pending: deque[Future] = deque()
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def send(self, message) -> None:
        """Have the thread take in the current vector. Raises: any error of taking in an earlier one."""
        # Take the older of the two buffers, once the thread is done with it.
        while len(self._pending) >= len(self._buffers):
            self._pending.popleft().result()
        buffer = self._buffers[0]
        self._buffers.rotate(-1)

        # Copy after the work that the device has queued, and without holding up what comes next.
        if self.stream is None:
            buffer.copy_(self.source)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.source.device))
            with torch.cuda.stream(self.stream):
                buffer.copy_(self.source, non_blocking=True)
                self._copied = self.stream.record_event()
        self._pending.append(self._thread.submit(self._receive, buffer, self._copied, message))

    def _receive(self, buffer: torch.Tensor, copied: torch.cuda.Event | None, message) -> None:
        # The copy is asynchronous: its bytes are in the buffer only after the event.
        if copied is not None:
            copied.synchronize()
        self.take_in(buffer, message)

    def wait_for_copy(self) -> None:
        """Make the device's next work wait for the last copy."""
        if self._copied is not None:
            torch.cuda.current_stream(self.source.device).wait_event(self._copied)

    def flush(self) -> None:
        """Wait until everything that was sent has been taken in. Raises: any error of that."""
        while self._pending:
            self._pending.popleft().result()
