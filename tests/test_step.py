"""The whole optimizer step of every objective waits for no device: it runs on tensors that have no values."""

import contextlib

import pytest
import torch
from losses import Loss
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from torch_utils import training_stats
from torch_utils.flat import FlatParameters
from training import networks
from training.guidance import GuidedDenoiser
from training.networks import edm2 as networks_edm2
from training.networks.encoders import StandardRGBEncoder
from training.objectives import OBJECTIVES
from training.objectives.edge_schedule import EdgeSchedule
from training.objectives.loss_tcm import TruncatedState
from training.phema import WeightAverages
from training.rng import SampleRng
from training.training_loop import accumulate_gradients
from training.weight_update import WeightUpdate

BATCH, ROUNDS, CLASSES = 64, 2, 10
RANGE = dict(rho=7.0, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
SEGMENTS = dict(
    RANGE,
    S=8,
    student_grid='edm',
    T_start=16,
    T_end=64,
    T_anneal_kimg=BATCH / 1e3,
    sampling_mode='edm',
    cd_loss='pseudo_huber',
    cd_weight_mode='sqrt_karras',
)
MCD = dict(SEGMENTS, terminal_anchor=True, terminal_teacher_hop=True, anchor_hops=2)
CM = dict(RANGE, N=None, s0=2, s1=20, schedule_nimg=4 * BATCH, mu0=0.9, mu_schedule='adaptive', cm_loss='l2')

CONTINUOUS = dict(
    P_mean=-1.0,
    P_std=1.4,
    tangent_c=0.1,
    tangent_weight='adaptive',
    jvp='forward',
    warmup_nimg=0,
    sigma_data=0.5,
)

# The objective, its loss's options, and those of the update and the averages where they are not the plain
# ones; whether a guided teacher has another network as its guide.
CASES = {
    'edm': ('diffusion', dict(kind='edm'), {}),
    'edm2': ('diffusion', dict(kind='edm2'), dict(stds=[0.05, 0.1])),
    'labels dropped': ('diffusion', dict(kind='edm', label_dropout=0.1), {}),
    'vp': ('diffusion', dict(kind='vp'), dict(grad_clip=1.0)),
    've': ('diffusion', dict(kind='ve'), dict(optim='radam')),
    'mcd': ('mcd', MCD, dict(loss_scale=None, grad_clip=1.0, stds=[0.05, 0.1])),
    'mcd, one segment': (
        'mcd',
        dict(MCD, S=1, keep_ties=True, top_mass=0.5),
        dict(optim='radam', loss_scale=None),
    ),
    'mcd, tops': ('mcd', dict(MCD, keep_ties=True, top_mass=0.5), {}),
    'mcd, guided': ('mcd', MCD, dict(guide=True)),
    'mcd, guided without a label': ('mcd', MCD, dict(guide=False)),
    'mcd, ddim to the data': ('mcd', dict(MCD, hop='ddim', terminal_teacher_hop=False), {}),
    'mcd, addim': (
        'mcd',
        dict(MCD, hop='addim', terminal_anchor=False, sync_dropout=False, student_grid='full'),
        {},
    ),
    'mct': ('mct', SEGMENTS, dict(optim='radam')),
    'direct': ('direct', dict(SEGMENTS, keep_ties=True, top_mass=0.9, substeps=2), {}),
    'direct, dpmpp': ('direct', dict(SEGMENTS, keep_ties=True, top_mass=0.9, substeps=3, solver='dpmpp'), {}),
    'pd': (
        'pd',
        dict(RANGE, S=4, student_grid='full', sigma_grid='karras', hop='ddim', xvar_frac=0.75, cd_loss='l2'),
        {},
    ),
    'cm-cd': ('cm-cd', dict(CM, hop='heun', xvar_frac=0.75), {}),
    'cm-ct': ('cm-ct', dict(CM, cm_loss='pseudo_huber'), dict(loss_scale=None)),
    'ict': (
        'ict',
        dict(RANGE, schedule_nimg=4 * BATCH, s0=4, s1=16, P_mean=-1.1, P_std=2.0, batch_size=BATCH),
        dict(optim='radam'),
    ),
    'ect': (
        'ect',
        dict(
            P_mean=-1.1,
            P_std=2.0,
            q=2.0,
            k=8.0,
            b=1.0,
            c=0.0,
            stage_nimg=BATCH,
            ect_weight='gap',
            sigma_data=0.5,
        ),
        {},
    ),
    'tcm': (
        'tcm',
        dict(
            sigma_max=80.0,
            dividing_t=1.0,
            student_scale=0.2,
            student_df=0.01,
            q=2.0,
            k=8.0,
            b=1.0,
            c=1e-8,
            ratio_cap=0.999,
            stage_nimg=BATCH,
            tcm_weight='flat',
            boundary_share=0.25,
            boundary_weight=0.1,
            batch_size=BATCH,
            sigma_data=0.5,
        ),
        {},
    ),
    'scd': ('scd', CONTINUOUS, dict(loss_scale=None)),
    'scd, guided': ('scd', dict(CONTINUOUS, jvp='difference'), dict(guide=True)),
    'scd, segments': ('scd', dict(CONTINUOUS, S=2), {}),
    'scd, group norms': ('scd', CONTINUOUS, {}),
    'sct': ('sct', dict(CONTINUOUS, tangent_weight='prior'), {}),
}


# Whose edges are the same throughout.
UNCHANGING = {
    'edm',
    'edm2',
    'labels dropped',
    'vp',
    've',
    'pd',
    *(case for case in CASES if case[:2] == 'sc'),
}
# In PyTorch, tensors without values leave forward mode in group norms: seen on GPUs only.
ONLY_ON_GPUS = {'scd, group norms'}


REAL_NETWORKS = {
    'edm': networks.EDMPrecond,
    'edm2': networks_edm2.Precond,
    'mcd': networks.EDMPrecond,
    'scd': networks_edm2.Precond,
    'scd, guided': networks.EDMPrecond,
    'scd, segments': networks_edm2.Precond,
    'scd, group norms': networks.EDMPrecond,
    'sct': networks_edm2.Precond,
}


class Small(torch.nn.Module):
    """A denoiser of one convolution, with labels and dropout: in place of a U-Net, of whose operations one
    case for each is enough."""

    def __init__(self):
        super().__init__()
        self.conv, self.label, self.dropout = (
            torch.nn.Conv2d(1, 1, 3, padding=1),
            torch.nn.Linear(CLASSES, 1),
            0.1,
        )

    def forward(self, x, sigma, class_labels, augment_labels=None, dropout_masks=None):
        sigma = sigma.float().reshape(-1, 1, 1, 1)
        h = self.conv(x.float() / (1 + sigma**2).sqrt()) + self.label(class_labels)[:, :, None, None]
        for mask in (dropout_masks or {}).values():
            h = h * mask / (1 - self.dropout)
        return (x + sigma * h) / (1 + sigma**2)

    def dropout_masks(self, batch_size, generator=None):
        return {
            'conv': torch.rand([batch_size, 1, 8, 8], device=self.conv.weight.device, generator=generator)
            > self.dropout
        }


def make_network(case: str, seed: int, device) -> torch.nn.Module:
    """A network with dropout and labels, no layer of which is zero."""
    torch.manual_seed(seed)
    options = dict(model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0.1)
    options |= dict(logvar_channels=8) if case.startswith('scd') else {}
    options |= dict(two_time=True) if case == 'scd, segments' and seed == 0 else {}
    net = REAL_NETWORKS[case](8, 1, CLASSES, **options) if case in REAL_NETWORKS else Small()
    for parameter in net.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.05
    return net.to(device)


class Training:
    """What the training loop sets up, on a device; `step` is what it does between two ticks."""

    def __init__(self, case: str, device='cpu'):
        name, options, extra = CASES[case]
        objective, self.device = OBJECTIVES[name], torch.device(device)
        self.net = make_network(case, 0, device).train()
        teacher = None
        if objective.teacher:
            teacher = make_network(case, 1, device).eval().requires_grad_(False)
        if 'guide' in extra:
            guide = make_network(case, 2, device).eval().requires_grad_(False) if extra['guide'] else None
            teacher = GuidedDenoiser(teacher, guide, 2.0, (0.1, 10.0))
        self.loss_fn = Loss(name, teacher, self.net, **options)
        self.flat = FlatParameters(self.net)
        self.update = WeightUpdate(
            self.flat,
            (0.9, 0.999),
            1e-8,
            extra.get('loss_scale', 1.0),
            extra.get('grad_clip'),
            extra.get('optim', 'adam'),
        )
        self.averages = WeightAverages(self.net, self.flat, 500.0, 0.05, extra.get('stds', []))
        self.nimg, self.losses = 0, []

    def batch(self):
        """Raw images and labels of a round, as a loader gives them."""
        generator = torch.Generator().manual_seed(self.nimg)
        count = BATCH // ROUNDS
        return (
            torch.randint(256, [count, 1, 8, 8], dtype=torch.uint8, generator=generator),
            torch.eye(CLASSES)[torch.randint(CLASSES, [count], generator=generator)],
        )

    def loss(self, net, images, labels, rng, state, augment_labels=None):
        """The objective's, whose values are kept."""
        self.losses.append(self.loss_fn(net, images, labels, rng, augment_labels))
        return self.losses[-1]

    @property
    def NAME(self):
        return self.loss_fn.NAME

    def steps_counted(self) -> list[torch.Tensor]:
        """What the optimizer keeps on the host, on every device."""
        return (
            [state['step'] for state in self.update.optimizer.state.values()]
            if isinstance(self.update.optimizer, torch.optim.RAdam)
            else []
        )

    def step(self, batch) -> None:
        self.loss_fn.begin_step(self.nimg)
        self.averages.begin_step()
        self.flat.weights.grad.zero_()
        for i in range(ROUNDS):
            rng = SampleRng(7, self.nimg + i * BATCH // ROUNDS, BATCH // ROUNDS, self.device)
            accumulate_gradients(
                self.net, self, self.loss_fn.state, batch, rng, self.update, 1 / BATCH, StandardRGBEncoder()
            )
        self.averages.before_update()
        self.update.step(1e-3)
        self.loss_fn.state.end_step()
        self.nimg += BATCH
        self.averages.update(self.nimg, BATCH)


WAITING = ('cpu', 'numpy', 'tolist', 'item', '__bool__', '__int__', '__float__', '__index__')
OF_THE_HOST = (
    (SampleRng, 'uniform'),
    (SampleRng, 'normal_on_host'),
    (EdgeSchedule, '_enter'),
    (TruncatedState, 'draw_on_host'),
)  # return numpy arrays or constants


@contextlib.contextmanager
def tensors_without_values(monkeypatch, of_the_host=()):
    """A context in which tensors have shapes but no values, and whatever asks for one raises. What the host
    decides it decides in numpy; tensors `of_the_host` are its own on every device."""
    host_at_work = []

    def computing(method):
        def compute(*arguments):
            host_at_work.append(method)
            with unset_fake_temporarily():
                result = method(*arguments)
            host_at_work.pop()
            return result

        return compute

    def refusing(name, method):
        def refuse(tensor, *arguments, **kwargs):
            if not host_at_work and all(tensor is not own for own in of_the_host):
                raise AssertionError(f'Tensor.{name} waits for the device')
            with unset_fake_temporarily():
                return method(tensor, *arguments, **kwargs)

        return refuse

    with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        for owner, name in OF_THE_HOST:
            patch.setattr(owner, name, computing(getattr(owner, name)))
        for name in WAITING:
            patch.setattr(torch.Tensor, name, refusing(name, getattr(torch.Tensor, name)))
        yield


@pytest.mark.parametrize('case', [case for case in CASES if case not in ONLY_ON_GPUS])
def test_a_step_asks_for_no_number(case, monkeypatch):
    """The second, for which edges are made anew; steps are counted on the host."""
    monkeypatch.setattr(training_stats, 'AT_ONCE', 1)
    training = Training(case)
    batch, stage = training.batch(), getattr(training.loss_fn.state, 'stage', None)
    training.step(batch)
    with tensors_without_values(monkeypatch, training.steps_counted()):
        training.step(batch)
    assert [type(loss) is FakeTensor for loss in training.losses] == [False] * ROUNDS + [True] * ROUNDS
    assert case in UNCHANGING or training.loss_fn.state.stage != stage
    training_stats.reset()


INJECTED = {
    'item': (lambda loss: loss.sum().item(), 'Tensor.item waits'),
    'a truth value': (lambda loss: loss.sum() > 0 or None, 'Tensor.__bool__ waits'),
    'a copy to the host': (lambda loss: loss.cpu(), 'Tensor.cpu waits'),
    "a slice of a device's length": (lambda loss: loss[: loss.argmax()], 'Tensor.__index__ waits'),
    'a mask as an index': (lambda loss: loss[loss > 0], 'nonzero'),
    'nonzero': (lambda loss: loss.nonzero(), 'nonzero'),
}


@pytest.mark.parametrize('name', INJECTED)
def test_a_step_that_asks_for_a_number_is_found_out(name, monkeypatch):
    """The same step, with a loss that waits for the device."""
    waits, message = INJECTED[name]
    training = Training('mct')
    batch, loss_fn = training.batch(), training.loss_fn
    training.step(batch)

    def waiting(*arguments):
        loss = loss_fn(*arguments)
        waits(loss)
        return loss

    waiting.begin_step, waiting.NAME, waiting.state = loss_fn.begin_step, 'ct', loss_fn.state
    training.loss_fn = waiting
    refusals = (
        AssertionError,
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
    )
    with (
        pytest.raises(refusals, match=message),
        tensors_without_values(monkeypatch, training.steps_counted()),
    ):
        training.step(batch)
    training_stats.reset()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU: whether steps wait for it is seen there'
)
@pytest.mark.parametrize('case', CASES)
def test_a_step_on_a_gpu_waits_for_nothing(case):
    """PyTorch raises where the host would wait. Three steps after a first one, which makes what stays."""
    training = Training(case, 'cuda')
    batch = [tensor.pin_memory() for tensor in training.batch()]
    training.step(batch)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3):
            training.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert all(bool(loss.isfinite().all()) for loss in training.losses)
    training_stats.reset()
