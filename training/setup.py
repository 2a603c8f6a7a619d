"""Everything that a run is made of, from its configuration: networks, loss, optimizer, averages, files; and
where a resumed one stands."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from data.dataset import ImageFolderDataset
from data.label_space import LabelSpace, listed, space_of
from dnnlib import EasyDict, UserError
from dnnlib.text import printable
from torch_utils import distributed, misc
from torch_utils.flat import FlatParameters
from training import checkpoint, execution, resolution, run_files
from training.networks import encoders
from training.networks.augment import AugmentPipe
from training.objectives import OBJECTIVES
from training.objectives.loss import State
from training.phema import WeightAverages
from training.rng import derive_seed
from training.run_files import Progress
from training.run_log import RunLog
from training.weight_update import WeightUpdate


class Run(NamedTuple):
    """What a run is made of.

    Attributes:
        c: its configuration.
        dir: its folder.
        dataset, device: what it is trained on, and where.
        net: the network that trains; `ddp` is what its gradients are asked of: itself, or itself among other
            processes.
        teacher: frozen network to distil; None where the objective has none.
        objective, loss_state: its module and what that keeps from step to step, see
            `training.objectives.loss`.
        encoder, augment_pipe: from raw images to those that are noised; without augmentation `augment_pipe`
            is None.
        flat: the network's parameters as one vector, which `update` changes and `averages` follow.
        rank_batch, batch_gpu, rounds: images of a step that this process sees, in so many micro-batches of so
            many.
        progress: where it stands; `start_nimg` are the images that it had seen when this process started.
        resumed: whether it goes on from a training state.
        files, log: what it writes and says.
    """

    c: EasyDict
    dir: str
    dataset: ImageFolderDataset
    device: torch.device
    net: torch.nn.Module
    ddp: torch.nn.Module
    teacher: torch.nn.Module | None
    objective: ModuleType
    loss_state: State
    encoder: torch.nn.Module
    augment_pipe: AugmentPipe | None
    flat: FlatParameters
    update: WeightUpdate
    averages: WeightAverages
    rank_batch: int
    batch_gpu: int
    rounds: int
    progress: Progress
    start_nimg: int
    resumed: bool
    files: run_files.RunFiles
    log: RunLog


def set_up(
    c: EasyDict,
    run_dir: str,
    dataset: ImageFolderDataset,
    teacher: torch.nn.Module | None,
    state: dict | None,
) -> Run:
    """Build a run, or put a training state, which is emptied, back into one. Arguments are those of
    `training_loop`."""
    device, rank, world_size = distributed.get_device(), distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(c.seed)
    torch.backends.cudnn.benchmark = c.cudnn_benchmark
    misc.allow_tf32(c.tf32)

    # Image number g of the run is the same image with the same noise, whichever process handles it.
    rank_batch = c.batch_size // world_size
    batch_gpu = min(c.batch_gpu or rank_batch, rank_batch)
    rounds = rank_batch // batch_gpu

    # Networks and loss.
    if teacher is not None:
        teacher = execution.in_precision(teacher, c.precision).to(device)
    net = execution.in_precision(build_network(c, teacher), c.precision).to(device).train()
    objective = OBJECTIVES[c.objective].module()
    loss_state = objective.setup(c.loss, teacher, net, perceptual_distance(c, device))
    encoder = encoders.build(c.encoder)
    augment_pipe = AugmentPipe(p=c.augment) if c.augment > 0 else None

    # Optimizer and averages work on one vector of all parameters.
    flat = FlatParameters(net)
    update = WeightUpdate(flat, tuple(c.betas), c.eps, c.loss_scaling, c.grad_clip, radam=c.optim == 'radam')
    averages_device = 'cpu' if c.ema_device == 'cpu' else None
    averages = WeightAverages(
        net, flat, c.ema_halflife_nimg, c.ema_rampup_ratio, c.phema_stds, averages_device
    )
    speed_up(c, net, teacher, averages, loss_state)
    torch.manual_seed(derive_seed(c.seed, 'process', rank))  # for whatever draws without `SampleRng`

    # Resume.
    progress, made_by = Progress(), world_size
    if state is not None:
        progress, made_by = run_files.restore(c.resume, state, net, update, averages, loss_state, device)

    # Say what is about to happen.
    log = RunLog(run_dir, enabled=rank == 0)
    files = run_files.RunFiles(c, run_dir, net, update, averages, loss_state, log)
    describe_run(log, c, net, dataset, teacher, rounds, batch_gpu)
    if warning := resolution.unresolved_gap(c, teacher):
        log(warning)
    files.tidy()
    if state is not None:
        describe_resume(log, c, progress, made_by, world_size)

    ddp = net
    if world_size > 1:
        ddp = distributed.data_parallel(net, device)
    files.check_weights()
    return Run(
        c,
        run_dir,
        dataset,
        device,
        net,
        ddp,
        teacher,
        objective,
        loss_state,
        encoder,
        augment_pipe,
        flat,
        update,
        averages,
        rank_batch,
        batch_gpu,
        rounds,
        progress,
        progress.nimg,
        state is not None,
        files,
        log,
    )


def build_network(c: EasyDict, teacher: torch.nn.Module | None) -> torch.nn.Module:
    """The network to train: from the teacher's weights where there is one, or from those of --transfer that
    fit."""
    net = checkpoint.NETWORKS[c.network.class_name](**c.network.kwargs)
    if teacher is not None:
        net.load_state_dict(teacher.state_dict())
        net.sigma_min, net.sigma_max = teacher.sigma_min, teacher.sigma_max
    net.requires_grad_(True)
    if (
        hasattr(net, 'logvar_linear') and c.loss.get('kind') != 'edm2'
    ):  # EDM2's uncertainty: DDP wants every parameter used that has a gradient
        net.logvar_linear.requires_grad_(False)
    if c.transfer:
        origin, ours = checkpoint.load_network(c.transfer), LabelSpace.recorded(net.label_dim, c.dataset)
        source, own = origin.state_dict(), net.state_dict()
        if origin.label_dim == ours.dim and space_of(origin).differs(ours):
            distributed.print0(
                printable(
                    f'Warning: --transfer={c.transfer} was trained with {space_of(origin)}, and these data have {ours}: '
                    'what it learned of labels means something else here.'
                )
            )
        fitting = {
            name: tensor for name, tensor in source.items() if name in own and own[name].shape == tensor.shape
        }
        if not fitting:
            raise UserError(f'--transfer={c.transfer} has no tensor that fits this network by name and shape')
        net.load_state_dict(fitting, strict=False)
        if len(fitting) < len(own):
            distributed.print0(
                f"Warning: {len(fitting)} of this network's {len(own)} tensors are in --transfer={c.transfer} in the same shape; the "
                'others start at random. (Options such as --arch and --cbase are not taken from the snapshot.)'
            )
    return net


def speed_up(
    c: EasyDict,
    net: torch.nn.Module,
    teacher: torch.nn.Module | None,
    averages: WeightAverages,
    loss_state: State,
) -> None:
    """Let the networks run as the configuration says. Compilation itself waits for the first calls."""
    options = dict(
        channels_last=c.channels_last, checkpoint_activations=c.checkpoint_activations, compiled=c.compiled
    )
    at_hand = [
        average
        for average in averages.networks.values()
        if execution.is_on_gpu(average) == execution.is_on_gpu(net)
    ]
    for network in (net, *at_hand, *loss_state.networks(), *([] if teacher is None else [teacher])):
        execution.run_with(network, **options)
    if (
        teacher is not None and loss_state.sampling_network(net) is net
    ):  # else snapshots hold the teacher too, as it is
        execution.hold_in_half(teacher)


def perceptual_distance(c: EasyDict, device: torch.device) -> torch.nn.Module | None:
    """LPIPS where images are compared by it, else None."""
    if getattr(c.loss, 'cm_loss', None) != 'lpips':
        return None
    from metrics import lpips

    with distributed.main_process_first():
        return lpips.load(c.loss.lpips, device)


def profiled_networks(
    net: torch.nn.Module, teacher: torch.nn.Module | None
) -> dict[tuple[str, str], torch.nn.Module]:
    """Names of the networks' calls with gradients and without, for `StepProfile`."""
    return {('student', 'self-target'): net, **({} if teacher is None else {('teacher', 'teacher'): teacher})}


def describe_run(log: RunLog, c: EasyDict, net, dataset, teacher, rounds: int, batch_gpu: int) -> None:
    """Say what is about to be trained on what."""
    params = sum(p.numel() for p in net.parameters())
    steps = c.ema_halflife_nimg / c.batch_size
    subset = (
        f', a random {dataset.num_images} of its {dataset.num_files}'
        if dataset.num_images < dataset.num_files
        else ''
    )
    log(
        f'Data: {len(dataset)} images of {dataset.image_shape}, {dataset.label_space}, from {c.dataset.path}{subset}'
    )
    if dataset.unused_labels:
        log(
            f'Warning: {dataset.unused_labels} labels in dataset.json are of no image in {c.dataset.path}. Is it complete?'
        )
    if about := dataset.about_others():
        log(f'Note: {about}.')
    if dataset.unturned:
        log(
            f'Note: {len(dataset.unturned)} images carry an EXIF orientation, which is ignored: training sees their pixels as they are stored. '
            'dataset_tool.py --exif=apply turns them.'
        )
    if warning := dataset.label_space.warning():
        log(f'Warning: {warning}')
    if teacher is not None and (
        untaught := sorted({*space_of(teacher).absent} - {*dataset.label_space.absent})
    ):
        log(
            f'Warning: the training set of {c.teacher} has no images of classes {listed(untaught)}, of which these data have some: '
            'what the teacher says of them was never trained.'
        )
    log(f'Network: {type(net).__name__} / {type(net.model).__name__}, {params:,} parameters')
    log(
        f'Batch: {c.batch_size} images in {rounds} round(s) of {batch_gpu} on {distributed.get_world_size()} process(es)'
    )
    log(f'EMA half-life: {c.ema_halflife_nimg:,.0f} images = {steps:,.0f} steps')
    if steps < 100:
        log(
            f'Warning: an EMA with a half-life of {steps:.3g} steps averages next to nothing; --ema is in Mimg (--ema=500kimg says it otherwise).'
        )
    remaining = 0.0 if c.ema_rampup_ratio else 0.5 ** (c.total_nimg / c.ema_halflife_nimg)
    if remaining > 0.01:
        log(
            f'Warning: with a half-life of {c.ema_halflife_nimg:,.0f} images throughout, {remaining:.0%} of the average will still be the weights '
            'that training began with; shorten --ema, or set --ema_rampup=0.05.'
        )
    missing = [
        r
        for r in c.network.kwargs.get('dout_resolutions') or []
        if not any(name.startswith(f'{r}x{r}_') for name in net.model.enc)
    ]
    if missing:
        log(
            f'Warning: --dout_resolutions names {", ".join(map(str, missing))}, which this network does not have.'
        )


def describe_resume(log: RunLog, c: EasyDict, progress: EasyDict, made_by: int, world_size: int) -> None:
    """Say where a resumed run goes on, and what cannot be as if it had never stopped."""
    log(f'Resumed from {c.resume} at {progress.nimg / 1e3:.1f} kimg.')
    if made_by != world_size:
        log(
            f'Warning: that state was made by {made_by} process(es), now there are {world_size}: every image is seen as before, but sums are '
            'rounded differently, so the result will not be bit for bit that of an uninterrupted run.'
        )
