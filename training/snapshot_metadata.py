"""Metadata of snapshots, plain data: what training writes, what readers accept, the digest of a network."""

from __future__ import annotations

import hashlib
import itertools
import json

import torch

from data.label_space import LabelSpace
from dnnlib import EasyDict
from dnnlib.schema import check
from torch_utils.restricted_pickle import MalformedPickle, persistent_object, plain
from training import run_schema
from training.consistency_ops import student_grid
from training.networks import encoders
from training.stored_networks import numeric_attributes, tensors_of

STUDENT_LOSS = 'EDMConsistencyDistillLoss'  # the class that identifies a published student's snapshot

# Options of the loss and of sampling that snapshots record, if they are not None.
RECORDED = (
    'S',
    'steps',
    'sigma_min',
    'sigma_max',
    'rho',
    'student_grid',
    'sigma_grid',
    'sigma_data',
    'num_timesteps',
    'clip_denoised',
    'label_dropout',
)
GUIDANCE = (
    'guide',
    'guide_digest',
    'guidance',
    'guidance_interval',
)  # of the teacher, recorded in the same way

# ----------------------------------------------------------------------------
# Writing.


def snapshot_metadata(c: EasyDict, nimg: int) -> dict:
    """The metadata of a snapshot after `nimg` images, by which samplers know what the network is."""
    metadata = dict(objective=c.objective, kimg=nimg / 1e3, nimg=nimg, seed=c.seed)
    if c.encoder:
        metadata['encoder'] = c.encoder
    # The record of a `LabelSpace`.
    metadata |= {name: c.dataset[name] for name in ('label_kind', 'classes') if name in c.dataset}

    metadata |= {name: c[name] for name in GUIDANCE if c.get(name) is not None}
    options = {**c.loss, **(c.sampling or {})}
    # Samplers call N, the nodes that `ts` counts, num_timesteps.
    options['num_timesteps'] = options.get('N')
    if options.get('S') is not None:
        # Of objectives that leave no choice.
        options = {'student_grid': 'full', 'sigma_grid': 'karras', **options}
    if 'sigma_init' in options:
        options['sigma_max'] = options['sigma_init']  # where sampling begins
    metadata |= {name: options[name] for name in RECORDED if options.get(name) is not None}

    # The noise levels: one of the student's own, a student's grid, or a consistency model's one or two steps.
    if 'sampler' in options:
        metadata['solver'] = options['sampler']
    if 'sigma_init' in options:
        metadata['sigmas'] = [options['sigma_init'], 0.0]
    elif options.get('S') is not None:
        names = 'S', 'sigma_min', 'sigma_max', 'rho', 'student_grid', 'sigma_grid'
        metadata['sigmas'] = student_grid(*(options[name] for name in names)).tolist()
    elif c.sampling:
        second = [options['mid_t']] if options['mid_t'] else []
        metadata |= dict(solver='cm', sigmas=[options['sigma_max'], *second, 0.0])
    return metadata


def network_digest(net: torch.nn.Module, metadata: dict) -> str:
    """sha256 over class, arguments, numeric attributes, metadata, and tensors (name, dtype, shape, bytes)."""
    facts = [
        type(net).__name__,
        plain(net.init_args),
        plain(net.init_kwargs),
        numeric_attributes(net),
        {**metadata, 'digest': None},
    ]
    # Facts in a canonical form, then each tensor after a line that describes it.
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors_of(net).items()):
        digest.update(f'\n{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------
# Reading.


def read_metadata(snapshot: dict, net: torch.nn.Module) -> dict:
    """The metadata of a snapshot, with `dataset_kwargs` and `encoder` if it has them.

    A published student's are taken from its loss; any other snapshot without metadata is 'diffusion'.
    """
    # Our own, or those that the loss of a published student gives.
    metadata = plain(snapshot.get('metadata') or {})
    if not isinstance(metadata, dict):
        raise MalformedPickle('has metadata that are not a dict')
    if not metadata:
        class_name, loss = persistent_object(snapshot.get('loss_fn')) or (None, {})
        is_student = class_name == STUDENT_LOSS
        metadata = _published_student(loss, net) if is_student else dict(objective='diffusion')

    # EDM's record of the data.
    of_dataset = snapshot.get('dataset_kwargs')
    if isinstance(of_dataset, dict) and (of_dataset := plain(of_dataset, leave_out=True)):
        metadata = {**metadata, 'dataset_kwargs': of_dataset}

    # EDM2's encoder; our metadata name those that its tools do not know.
    encoder = metadata.get('encoder')
    if snapshot.get('encoder') is not None:
        encoder = _encoder(snapshot['encoder'])
    if encoder is not None and not (isinstance(encoder, dict) and isinstance(encoder.get('class_name'), str)):
        raise MalformedPickle('has metadata whose encoder is not a dict with a class_name')
    return {**metadata, **({'encoder': encoder} if encoder else {})}


def _encoder(node) -> dict | None:
    """A snapshot's encoder as `encoders.build` takes it; None for pixels, only the name of an unknown one."""
    class_name, state = persistent_object(node) or (None, {})
    args, kwargs = (), {}
    if class_name in encoders.ENCODERS:
        args, kwargs = plain(state.get('_init_args', ())), plain(state.get('_init_kwargs', {}))
    if class_name is None or not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise MalformedPickle('has an encoder without class or constructor arguments')
    return encoders.record(class_name, args, kwargs)


def _published_student(loss: dict, net: torch.nn.Module) -> dict:
    """Metadata of a student whose snapshot has none: its loss holds the grid that it was trained on."""
    S, sigma_min, sigma_max, rho = numbers = [
        plain(loss.get(name)) for name in ('S', 'sigma_min', 'sigma_max', 'rho')
    ]
    # As in training, the range is clipped to the network's.
    clip = lambda sigma: float(min(max(sigma, net.sigma_min), net.sigma_max))
    try:
        check(S, run_schema.STEPS, 'S')
        check(rho, run_schema.RHO, 'rho')
        sigma_min, sigma_max = clip(sigma_min), clip(sigma_max)
        sigmas = student_grid(S, sigma_min, sigma_max, rho, 'edm').tolist()
    except (ValueError, TypeError, ArithmeticError) as error:
        raise MalformedPickle(
            f'has a {STUDENT_LOSS} with impossible S, sigma_min, sigma_max, rho: {numbers}'
        ) from error
    grid = dict(S=S, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, student_grid='edm', sigmas=sigmas)
    return dict(objective='mcd', **grid)


def check_metadata(net: torch.nn.Module):
    """Check a network's metadata and the noise levels in it. Raises: ValueError, which completes 'it ...'."""
    metadata = net.metadata
    try:
        LabelSpace.recorded(net.label_dim, metadata)
    except ValueError as error:
        raise MalformedPickle(f'has metadata with {error}') from error
    # Each entry by itself, then the noise levels together.
    check(metadata, run_schema.METADATA, 'metadata')
    levels = metadata.get('sigmas', [1, 0])
    if metadata.get('S', len(levels) - 1) != len(levels) - 1:
        raise MalformedPickle(f'has metadata with S = {metadata["S"]} and {len(levels)} noise levels')
    if levels[-1] != 0 or any(high <= low for high, low in itertools.pairwise(levels)):
        raise MalformedPickle('has metadata with noise levels that do not fall to zero')
