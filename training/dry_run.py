"""What --dry-run says and checks besides the configuration: the network, memory, and files that a run needs."""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from dnnlib import EasyDict, downloads
from dnnlib.text import printable
from dnnlib.util import named
from torch_utils import distributed
from training import architectures, memory, run_folder
from training.announcements import start_warnings
from training.command_line import Options
from training.objectives import OBJECTIVES
from training.starting_point import default_of, on_meta

GIB = 2**30


def show(o: Options, c: EasyDict, dataset, teacher: torch.nn.Module | None) -> None:
    """Print the configuration as JSON with facts `about` the run, and the warnings of its start on stderr."""
    net = on_meta(c.network)
    for warning in start_warnings(c, dataset, teacher, net):
        distributed.print0(printable(warning), file=sys.stderr)
    facts = about(o, c, dataset, teacher, net)
    distributed.print0(json.dumps(dict(c, about=facts), indent=2))


def about(o: Options, c: EasyDict, dataset, teacher: torch.nn.Module | None, net: torch.nn.Module) -> dict:
    """Facts about a run that is not started, after checks of what it needs.

    Args:
        net: the network that would train, on the meta device.
    Returns: plain data; `network`, `cost`, `memory_gib` (per process), `not_checked` (what would have to be
        downloaded).
    Raises: UserError for a file or folder that would stop the run.
    """
    if not o.run.resume:
        distributed.from_main(lambda: run_folder.check_new_folder(o, c.run_dir))
    not_checked = check_validation(c, dataset) if c.validation else []
    return dict(
        network=network_facts(c, net),
        cost=training_cost(o, c),
        memory_gib=memory_facts(c, net, teacher),
        not_checked=not_checked,
    )


def training_cost(o: Options, c: EasyDict) -> dict[str, float]:
    """Network evaluations of the training, per image and in all, without sampling for snapshots and --val.

    The student's forward and backward pass counts 3 (`objectives.options.Config.cost`). Progressive
    distillation is costed over all its rounds.
    """
    own, images = o.own, c.total_nimg
    if c.stages:
        rounds, steps = zip(*c.stages)
        own, images = dataclasses.replace(own, S_start=rounds[0], S=rounds[-1]), sum(steps) * c.batch_size
    evaluations = own.cost() * images + own.first_cost() * c.batch_size
    return dict(evaluations_per_image=own.cost(), evaluations=round(evaluations))


def network_facts(c: EasyDict, net: torch.nn.Module) -> dict:
    """Size and shape of the network, with the defaults of what is not given."""
    of = lambda name: c.network.kwargs.get(name, default_of(type(net.model), name))
    levels = architectures.resolutions(c.network)
    # Blocks of few channels have none, whatever the options say.
    attention = {
        name.partition('x')[0] for name, block in net.model.enc.items() if getattr(block, 'num_heads', 0)
    }
    return dict(
        network=type(net).__name__,
        model=type(net.model).__name__,
        parameters=sum(p.numel() for p in net.parameters()),
        resolutions=levels,
        channels=[of('model_channels') * multiple for multiple in of('channel_mult')],
        num_blocks=of('num_blocks'),
        attn_resolutions=[res for res in levels if str(res) in attention],
        dropout=of('dropout'),
    )


# ----------------------------------------------------------------------------
# Memory.


def memory_facts(c: EasyDict, net: torch.nn.Module, teacher: torch.nn.Module | None) -> dict[str, object]:
    """GiB of a process by part (`training.memory`), and in all on its device. Most temporary tensors, the perceptual
    distance and CUDA itself come on top."""
    processes, on_gpu = distributed.get_world_size(), distributed.get_device().type == 'cuda'
    # Accumulated gradients hold the activations of one micro-batch at a time.
    micro_batch = min(c.batch_gpu or c.batch_size // processes, c.batch_size // processes)
    objective = OBJECTIVES[c.objective]
    perceptual = torch.nn.Identity() if c.loss.get('cm_loss') == 'lpips' else None
    state = objective.module().setup(objective.complete(c.loss), teacher, net, perceptual)
    # Gradients of sid's student pass through the teacher and the auxiliary network.
    second = dict(auxiliary=objective.auxiliary, passes=3 if objective.one_step else 1)
    parts = memory.parts(c, net, teacher, state, micro_batch, processes, on_gpu, **second)

    # Averages may lie on the host.
    on_device = sum(parts.values()) - (parts['averages'] if c.ema_device == 'cpu' else 0)
    found = {name: round(nbytes / GIB, 3) for name, nbytes in parts.items()}
    total = round(on_device / GIB, 3)
    return dict(found, device_total=total, micro_batch=micro_batch, processes=processes)


# ----------------------------------------------------------------------------
# Files.


def check_validation(c: EasyDict, dataset) -> list[str]:
    """Check reference, labels and detector of --val, and the reference against the detector.

    Returns: what was not checked, because a dry run downloads nothing for --val.
    Raises: UserError, naming the option.
    """
    from metrics.detectors import INCEPTION_URL, load_detector
    from metrics.reference import check_same_detector
    from metrics.validator import label_chooser, read_reference

    options = c.validation
    label_chooser(options.label, dataset.label_space, dataset)
    reference, detector = options.ref or options.ref_data, options.detector or INCEPTION_URL
    missing = distributed.from_main(
        lambda: [source for source in (reference, detector) if not downloads.is_here(source)]
    )
    notes = [f'{source}: not downloaded yet' for source in missing]

    # The files by themselves, then one against the other.
    if reference not in missing:
        statistics = read_reference(options)
    if detector not in missing:
        with distributed.main_process_first(), named('--val_detector'):
            network = load_detector(detector, 'cpu')
    if not missing and options.ref:
        pixels = None if c.encoder else [int(size) for size in dataset.image_shape]
        if pixels:
            network(torch.zeros([1, *pixels]))  # sets `dim`
        with named('--val_ref'):
            check_same_detector(statistics, network, options.ref, pixels)
    return notes
