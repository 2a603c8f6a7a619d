"""Everything that a run is made of, built from its configuration: networks, loss, optimizer, averages,
files. A resumed run is restored from its training state."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from data.dataset import ImageFolderDataset
from data.label_space import LabelSpace, space_of
from dnnlib import EasyDict, UserError
from dnnlib.text import printable
from torch_utils import distributed, misc
from torch_utils.flat import FlatParameters
from torch_utils.gradients import Gradients
from training import announcements, checkpoint, execution, run_files
from training.guidance import unguided
from training.networks import encoders
from training.networks.augment import AugmentPipe
from training.objectives import OBJECTIVES
from training.objectives.loss import State
from training.phema import WeightAverages
from training.rng import derive_seed
from training.run_files import Progress
from training.run_log import RunLog
from training.trained import Trained
from training.weight_update import WeightUpdate


class Preprocessing(NamedTuple):
    """From raw images to the images that are noised.

    Attributes:
        encoder: one of `networks.encoders`.
        augment_pipe: None without augmentation.
        augment_dim: length of the network's augmentation labels, 0 if it has none.
    """

    encoder: torch.nn.Module
    augment_pipe: AugmentPipe | None
    augment_dim: int


class Run(NamedTuple):
    """What a run is made of.

    Attributes:
        c: its configuration.
        dir: its folder.
        dataset, device: what it trains on, and where.
        student: the network that trains, and that snapshots hold averages of.
        auxiliary: the second network that trains, if the objective has one.
        teacher: frozen network to distill, maybe a `GuidedDenoiser`; None if the objective has none.
        objective, loss_state: its module and the state that it keeps, see `training.objectives.loss`.
        preprocessing: encoder and augmentation.
        averages: of the student's weights.
        rank_batch, batch_gpu, accumulation_rounds: images of this process per step, in `accumulation_rounds`
            micro-batches of `batch_gpu` images.
        progress: images seen, ticks, states kept.
        start_nimg: images seen when this process started.
        resumed: whether it was restored from a training state.
        files, log: what it saves and logs.
    """

    c: EasyDict
    dir: str
    dataset: ImageFolderDataset
    device: torch.device
    student: Trained
    auxiliary: Trained | None
    teacher: torch.nn.Module | None
    objective: ModuleType
    loss_state: State
    preprocessing: Preprocessing
    averages: WeightAverages
    rank_batch: int
    batch_gpu: int
    accumulation_rounds: int
    progress: Progress
    start_nimg: int
    resumed: bool
    files: run_files.RunFiles
    log: RunLog

    @property
    def consecutive_skips(self) -> torch.Tensor:
        """[] int64 on the device: the most steps that one of the networks has skipped in a row."""
        counts = [trained.update.consecutive_skips for trained in self.trained]
        return counts[0] if len(counts) == 1 else torch.maximum(*counts)

    @property
    def trained(self) -> list[Trained]:
        """The networks that train: the student, and the auxiliary network if there is one."""
        return [self.student, *([] if self.auxiliary is None else [self.auxiliary])]


def set_up(
    c: EasyDict,
    run_dir: str,
    dataset: ImageFolderDataset,
    teacher: torch.nn.Module | None,
    state: dict | None,
) -> Run:
    """Build a run, or restore it from a training state, which is emptied. Arguments are those of
    `training_loop`."""
    device, rank, world_size = distributed.get_device(), distributed.get_rank(), distributed.get_world_size()
    set_arithmetic(c)

    # Image number g of the run is the same image with the same noise, whichever process handles it.
    rank_batch = c.batch_size // world_size
    batch_gpu = min(c.batch_gpu or rank_batch, rank_batch)
    accumulation_rounds = rank_batch // batch_gpu

    # Networks and loss.
    if teacher is not None:
        teacher = execution.in_precision(teacher, c.precision).to(device)
    net = network_to_train(c, teacher, device)
    objective = OBJECTIVES[c.objective].module()
    options = OBJECTIVES[c.objective].complete(c.loss)
    loss_state = objective.setup(options, teacher, net, perceptual_distance(c, device))

    # What trains: the student, whose weights are averaged, and a second network of some objectives.
    student, auxiliary = trained(c, net, loss_state, device), None
    average_lengths = c.ema_halflife_nimg, c.ema_rampup_ratio, c.phema_stds
    on_host = 'cpu' if c.ema_device == 'cpu' else None
    how = on_host, c.get('ema_every', 1)
    averages = WeightAverages(net, student.update.parameters, *average_lengths, *how)
    if OBJECTIVES[c.objective].auxiliary:
        # It starts from the teacher, whatever the student starts from.
        second = network_to_train(EasyDict(c, transfer=None), teacher, device)
        auxiliary = trained(c, second, loss_state, device, name='auxiliary')
        loss_state.auxiliary = auxiliary.evaluated
    speed_up(c, student, auxiliary, teacher, averages, loss_state)
    # For whatever draws random numbers without `SampleRng`.
    torch.manual_seed(derive_seed(c.seed, 'process', rank))

    # Resume.
    progress, made_by = Progress(), world_size
    if state is not None:
        progress, made_by = run_files.restore(
            c.resume, state, student, auxiliary, averages, loss_state, device
        )

    # Announce what is about to happen.
    log = RunLog(run_dir, enabled=rank == 0)
    files = run_files.RunFiles(c, run_dir, student, auxiliary, averages, loss_state, log)
    announcements.describe_place(log, run_dir, device)
    announcements.describe_run(log, c, net, dataset, teacher, accumulation_rounds, batch_gpu)
    files.tidy()
    if state is not None:
        announcements.describe_resume(log, c, progress, made_by, world_size)

    # All processes start from the same weights.
    files.check_weights()
    return Run(
        c=c,
        dir=run_dir,
        dataset=dataset,
        device=device,
        student=student,
        auxiliary=auxiliary,
        teacher=teacher,
        objective=objective,
        loss_state=loss_state,
        preprocessing=preprocessing(c),
        averages=averages,
        rank_batch=rank_batch,
        batch_gpu=batch_gpu,
        accumulation_rounds=accumulation_rounds,
        progress=progress,
        start_nimg=progress.nimg,
        resumed=state is not None,
        files=files,
        log=log,
    )


def trained(
    c: EasyDict, net: torch.nn.Module, loss_state: State, device: torch.device, name: str = ''
) -> Trained:
    """Everything that training a network takes. Its parameters move into one vector, or this process's share of it.

    Args:
        name: in statistics; empty for the student.
    """
    several = distributed.get_world_size() > 1
    shard = c.get('shard') == 'optimizer' and several
    if shard or c.compiled:
        execution.leave_unit_weights(net)
    flat = divided(net) if shard else FlatParameters(net)
    if shard and not name:
        divide_others(c, flat, loss_state)
    update = WeightUpdate(flat, tuple(c.betas), c.eps, c.loss_scaling, c.grad_clip, c.optim, name)

    # Weights in half precision are rounded once a step, unless the loss also evaluates the network in FP32.
    exact = flat.sharded or loss_state.in_fp32
    gradients = Gradients(net, flat, *([] if exact else execution.rounded_parameters(net)))
    cut = c.compiled and several and not flat.sharded
    evaluated = distributed.in_several_graphs(gradients.net, device) if cut else gradients.net
    return Trained(net, gradients, evaluated, update)


def divided(net: torch.nn.Module) -> FlatParameters:
    """The parameters of `net`, divided among the processes in place (--shard=optimizer)."""
    from torch_utils.sharded import ShardedParameters  # slow to import

    return ShardedParameters(net, execution.blocks_of(net))


def divide_others(c: EasyDict, weights: FlatParameters, loss_state: State) -> None:
    """Divide the objective's own networks like the student, whose share `weights` is.

    Raises: UserError if the objective has some that it does not divide.
    """
    if loss_state.networks() and type(loss_state).divide is State.divide:
        distributed.fail_together(
            f'--shard=optimizer: --objective={c.objective} keeps a network of its own with these options, '
            'which it does not divide (`State.divide`). Leave it out.'
        )
    loss_state.divide(weights, divided)


def set_arithmetic(c: EasyDict) -> None:
    """Seed PyTorch's own generators, and choose algorithms and precision of products, for this process."""
    torch.manual_seed(c.seed)
    torch.backends.cudnn.benchmark = c.cudnn_benchmark and not c.get('deterministic')
    misc.use_deterministic_algorithms(bool(c.get('deterministic')))
    misc.allow_tf32(c.tf32)


def preprocessing(c: EasyDict) -> Preprocessing:
    """The encoder and the augmentation that a run is configured with."""
    augment_pipe = AugmentPipe(p=c.augment) if c.augment > 0 else None
    return Preprocessing(encoders.build(c.encoder), augment_pipe, c.network.kwargs.get('augment_dim', 0))


def network_to_train(c: EasyDict, teacher: torch.nn.Module | None, device: torch.device) -> torch.nn.Module:
    """`build_network` on the device, the same on all processes."""
    net = execution.in_precision(build_network(c, unguided(teacher)), c.precision).to(device).train()
    distributed.weights_from_main(net)
    return net


def build_network(c: EasyDict, teacher: torch.nn.Module | None) -> torch.nn.Module:
    """The network to train, with the teacher's weights, or those of --transfer that fit, or random ones."""
    net = checkpoint.NETWORKS[c.network.class_name](**c.network.kwargs)
    if teacher is not None:
        start_from(net, teacher)
        net.sigma_min, net.sigma_max = teacher.sigma_min, teacher.sigma_max

    # Few losses use the estimate of their log-variance.
    net.requires_grad_(True)
    if getattr(net, 'logvar_linear', None) is not None and not learns_logvar(c):
        net.logvar_linear.requires_grad_(False)
    if c.transfer:
        transfer_weights(c, net)
    return net


def start_from(net: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Copy the teacher's weights; parts that only the student has keep their start."""
    found = net.load_state_dict(teacher.state_dict(), strict=False)
    odd = [name for name in found.missing_keys if not is_extra(name)]
    if odd or found.unexpected_keys:
        raise ValueError(f'the teacher has other weights: {", ".join([*odd, *found.unexpected_keys][:3])}')


def is_extra(name: str) -> bool:
    """Whether a tensor is of a part that a network may have beyond the denoiser that it starts from, and that starts
    without an effect: the embedding of the level at which a step ends, and the estimate of a loss's log-variance."""
    return name.startswith(('model.map_end.', 'unet.end_', 'logvar_'))


def learns_logvar(c: EasyDict) -> bool:
    """Whether the loss trains the network's estimate of its log-variance."""
    return c.loss.get('kind') == 'edm2' or c.loss.get('tangent_weight') == 'adaptive'


def transfer_weights(c: EasyDict, net: torch.nn.Module) -> None:
    """Copy the tensors of --transfer that fit the network by name and shape. Raises: UserError if none
    does."""
    # Warn about labels of another meaning.
    origin, labels = checkpoint.load_network(c.transfer), LabelSpace.recorded(net.label_dim, c.dataset)
    if origin.label_dim == labels.dim and space_of(origin).differs(labels):
        distributed.print0(
            printable(
                f'Warning: --transfer={c.transfer} was trained with {space_of(origin)}, and these data have '
                f'{labels}: what it learned of labels means something else here.'
            )
        )

    # Copy what fits.
    own = net.state_dict()
    fits = lambda name, tensor: name in own and own[name].shape == tensor.shape
    fitting = {name: tensor for name, tensor in origin.state_dict().items() if fits(name, tensor)}
    if not fitting:
        raise UserError(f'--transfer={c.transfer} has no tensor that fits this network by name and shape')
    net.load_state_dict(fitting, strict=False)
    if any(not is_extra(name) for name in own.keys() - fitting.keys()):
        distributed.print0(
            f"Warning: {len(fitting)} of this network's {len(own)} tensors are in --transfer={c.transfer} in "
            'the same shape; the others start at random. (Without --arch, --cbase and other options of the '
            "network, it is the snapshot's.)"
        )


def speed_up(
    c: EasyDict,
    student: Trained,
    auxiliary: Trained | None,
    teacher: torch.nn.Module | None,
    averages: WeightAverages,
    loss_state: State,
) -> None:
    """Set how the networks run, as configured. Compilation itself waits for the first calls."""
    options = dict(
        channels_last=c.channels_last, checkpoint_activations=c.checkpoint_activations, compiled=c.compiled
    )
    net = student.gradients.net
    on_gpu = execution.is_on_gpu(net)
    sampled = [average for average in averages.networks.values() if execution.is_on_gpu(average) == on_gpu]
    others = [] if auxiliary is None else [auxiliary.gradients.net]
    others += [] if teacher is None else [teacher]
    for network in (net, *sampled, *loss_state.networks(), *others):
        execution.run_with(network, **options)
    # A teacher that is part of the sampling network is saved in snapshots, and so keeps its precision.
    if teacher is not None and loss_state.sampling_network(net) is net:
        execution.hold_in_half(teacher)


def perceptual_distance(c: EasyDict, device: torch.device) -> torch.nn.Module | None:
    """LPIPS if the loss compares images by it, else None."""
    if getattr(c.loss, 'cm_loss', None) != 'lpips':
        return None
    from metrics import lpips

    with distributed.main_process_first():
        distance = lpips.load(c.loss.lpips, device)
    distance.tf32 = c.get('lpips_tf32', False)
    return distance


def profiled_networks(run: Run) -> dict[tuple[str, str], torch.nn.Module]:
    """Networks by the names of their calls, with gradients and without, for `StepProfile`."""
    found = {('student', 'self-target'): run.student.gradients.net}
    if run.teacher is not None:
        found['teacher', 'teacher'] = run.teacher
    if run.auxiliary is not None:
        found['auxiliary', 'auxiliary'] = run.auxiliary.gradients.net
    return found
