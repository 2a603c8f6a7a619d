"""Feature detectors: networks that turn images into the feature vectors whose statistics are compared.

`Detector` is the one interface to three kinds of networks. Each network has

    metric_name, img_channels, has_classes
    features(images) -> [N, D]
    with_probabilities(images) -> ([N, D], [N, K])      # only where has_classes

for uint8 images [N, img_channels, H, W] on its device. It is a TorchScript file (`ScriptNetwork`), FID's
Inception from pytorch-fid's state dict (`metrics.inception`), or DINOv2 (`metrics.dinov2`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import re
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dnnlib.archives import BoundedZip
from dnnlib.downloads import file_sha256, local_path
from dnnlib.file_kind import another_kind
from dnnlib.limits import UNREADABLE
from dnnlib.text import printable
from dnnlib.util import UserError
from torch_utils import distributed
from torch_utils.restricted_pickle import MalformedPickle
from torch_utils.saved_tensors import read_saved

INCEPTION_URL = (
    'https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/files/metrics/'
    'inception-2015-12-05.pt'
)
DINOV2 = 'dinov2'
KINDS = "a TorchScript file, pytorch-fid's Inception (a state dict), dinov2 or dinov2:FOLDER"


# ----------------------------------------------------------------------------
# Detectors, and networks in TorchScript.


class Detector:
    """A feature network and its identity.

    Computes in FP32 whatever PyTorch's settings. Recent GPUs convolve in TensorFloat-32 by default, which
    rounds images and weights to 10 bits; pytorch-fid keeps that, so that its values depend slightly on the
    GPU. Ours do not.

    Attributes:
        name: file name without suffix, or DINOv2's size.
        digest: SHA-256 (hexadecimal) of the weights file.
        metric_name: name of a Fréchet distance of its features: 'FID' for both Inceptions, 'FD-DINOv2', else
            'Fréchet distance'.
        img_channels: channels of its images; gray images are repeated.
        dim: D, number of features; None until the first call.
        has_classes: whether it has class probabilities.
    """

    def __init__(self, network, name: str, digest: str, device: torch.device):
        self.network, self.name, self.digest, self.device = network, name, digest, device
        self.metric_name: str = network.metric_name
        self.img_channels: int = network.img_channels
        self.has_classes: bool = network.has_classes
        self.dim: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Features [N, D] of uint8 images [N, C, H, W], in the network's floating-point type.

        Raises: UserError if the network cannot use such images, or runs out of memory.
        """
        # TorchScript files may return anything, so check.
        features = self._run(self.network.features, images)
        self._check(features, images, 'one feature vector per image, [N, D]')
        self.dim = features.shape[1]
        return features

    def with_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [N, D], class probabilities [N, K]) of uint8 images [N, C, H, W].

        The probabilities omit the last layer's bias, as in the code of Salimans et al. 2016.
        Raises: UserError if the detector has no classes, and as `__call__`.
        """
        if not self.has_classes:
            raise UserError(
                f'Detector {self.name} has no classes, which the Inception Score needs. Use an Inception '
                'network, such as the default.'
            )
        outputs = self._run(self.network.with_probabilities, images)
        self._check(outputs[0], images, 'one feature vector per image, [N, D]')
        self._check(outputs[1], images, 'one probability vector per image, [N, K]')
        self.dim = outputs[0].shape[1]
        return outputs

    def _run(self, compute: Callable, images: Tensor):
        # Repeat gray images to the detector's channels.
        if images.shape[1] == 1:
            images = images.expand(-1, self.img_channels, -1, -1)
        if images.shape[1] != self.img_channels:
            raise UserError(
                f'Detector {self.name} expects {self.img_channels} channels, but the images have '
                f'{images.shape[1]}. Convert the images, or use another detector.'
            )

        # The errors of any network, in terms of the detector and its images.
        try:
            with torch.no_grad(), full_precision():
                return compute(images.to(self.device))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f'Detector {self.name} ran out of GPU memory on {len(images)} images. Lower --batch.'
            ) from error
        except (RuntimeError, torch.jit.Error) as error:
            # The last line of a TorchScript error is its cause; the others are a traceback.
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f'Detector {self.name} failed on uint8 images of shape {tuple(images.shape)}: {reason}. '
                'Use a detector for such images.'
            ) from error

    def _check(self, output: object, images: Tensor, wanted: str) -> None:
        if (
            not isinstance(output, Tensor)
            or output.ndim != 2
            or len(output) != len(images)
            or not output.is_floating_point()
        ):
            raise UserError(
                f'Detector {self.name} did not return {wanted} in floating point. Use a detector that does.'
            )


@contextlib.contextmanager
def full_precision():
    """Disable TensorFloat-32 inside the block."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


class ScriptNetwork:
    """A TorchScript module whose `forward` maps uint8 images [N, C, H, W] to features [N, D].

    An int attribute `img_channels` declares other images than color. A `forward` with an argument
    `return_features`, like NVIDIA's Inception, returns features if it is set, else class probabilities.
    """

    def __init__(self, module: torch.jit.ScriptModule, img_channels: int):
        self.module, self.img_channels = module, img_channels
        # Scripts record nothing about themselves, so the arguments of forward tell what they return.
        arguments = {argument.name for argument in module.forward.schema.arguments}
        self.has_classes = 'return_features' in arguments
        self.metric_name = 'FID' if self.has_classes else 'Fréchet distance'
        self.for_features = dict(return_features=True) if self.has_classes else {}
        self.for_probabilities = dict(no_output_bias=True) if 'no_output_bias' in arguments else {}

    def features(self, images: Tensor) -> Tensor:
        # Optimization starts after a few calls and changes rounding.
        with torch.jit.optimized_execution(False):
            return self.module(images, **self.for_features)

    def with_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features, probabilities) in two passes: the script returns one or the other."""
        features = self.features(images)
        with torch.jit.optimized_execution(False):
            return features, self.module(images, **self.for_probabilities)


# ----------------------------------------------------------------------------
# Loading.


def load_detector(
    source: str | os.PathLike, device: torch.device | str = 'cpu', sha256: str | None = None
) -> Detector:
    """Load a detector from a path, URL or name.

    Args:
        source: path or URL of a TorchScript file, or of the state dict that pytorch-fid publishes
            (`pt_inception-2015-12-05-6726825d.pth`), told apart by their contents; `dinov2` for the released
            ViT-L/14, or `dinov2:FOLDER`. `INCEPTION_URL`, the scripts' default, replaces EDM's
            `inception-2015-12-05.pkl`: the same network as TorchScript, because the pickle is code, which we
            refuse to run.
        sha256: required digest of the weights file. A URL without it must keep the digest of its first
            download.

    TorchScript is the one exception to the rule that loading a file runs no code from it: PyTorch's
    interpreter executes it. Use detectors from sources that you trust, and pin them by `sha256`.

    Raises: UserError for a missing file, a failed download, another digest, or a file of another kind.
    """
    # DINOv2, by its name.
    source, device = os.fspath(source), torch.device(device)
    if source == DINOV2 or source.startswith(f'{DINOV2}:'):
        from metrics.dinov2 import load_dinov2

        folder = None if source == DINOV2 else source.removeprefix(f'{DINOV2}:')
        network, digest = load_dinov2(folder, device, sha256)
        return Detector(network, network.name, digest, device)

    # A file, by its contents.
    path = local_path(source, sha256=sha256, pinned=True)
    script = is_torchscript(path)
    if script and sha256 is None and source != INCEPTION_URL:
        warn_of_program(source, path)
    network = _load_script(path, source, device) if script else _load_state_dict(path, source, device)
    name = os.path.splitext(os.path.basename(urllib.parse.urlsplit(source).path))[0]
    return Detector(network, name, file_sha256(path), device)


@functools.cache
def warn_of_program(source: str, path: Path) -> None:
    """Print once, on the main process, that a file is a program, unless its source includes its digest."""
    if '#sha256=' not in source and distributed.is_main():
        print(
            f'Note: {printable(source)} is a TorchScript file, a program that PyTorch runs. Make sure that '
            f'you trust it; to pin this file, append #sha256={file_sha256(path)}.',
            file=sys.stderr,
            flush=True,
        )


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip that contains code, which `torch.save` never writes."""
    try:
        with BoundedZip(path) as archive:
            return any(name.endswith('/constants.pkl') or '/code/' in name for name in archive.namelist())
    except UNREADABLE:
        return False


def _load_script(path: Path, source: str, device: torch.device) -> ScriptNetwork:
    # Loading checks the file; a method may still be missing, or fail on images later.
    try:
        module = torch.jit.load(path, map_location=device).eval()
        takes_images, channels = hasattr(module, 'forward'), getattr(module, 'img_channels', 3)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f'{source} is a TorchScript file that cannot be loaded. Save it again with '
            'torch.jit.script(network).save(path), or download it again.'
        ) from error
    if not takes_images:
        raise UserError(
            f'{source} has no forward method. Save detectors with torch.jit.script(network).save(path).'
        )
    if not isinstance(channels, int) or channels < 1:
        raise UserError(f'{source} declares img_channels={channels!r}, but it must be a positive integer.')
    return ScriptNetwork(module, channels)


def _load_state_dict(path: Path, source: str, device: torch.device) -> torch.nn.Module:
    from metrics.inception import build_inception

    # Name other kinds of files before reading this one.
    wanted = f'a feature detector: {KINDS}'
    if kind := another_kind(
        path,
        'a feature detector',
        own=('a PyTorch file', 'a pickle', 'text'),
        instead=dict.fromkeys(
            ('a training state', 'a network snapshot', 'a NumPy', 'a zip archive'), f'Give {wanted}.'
        ),
    ):
        raise UserError(f'{source} is not a detector: it {kind}')
    if _is_plain_pickle(path):
        raise UserError(
            f'{source} is a pickle, which is refused because loading it could run any code. For the '
            "Inception of EDM and StyleGAN use NVIDIA's TorchScript file of the same network, the default: "
            f'{INCEPTION_URL}'
        )

    # Read the tensors.
    try:
        with open(path, 'rb') as file:
            weights = read_saved(file)
    except MalformedPickle as error:
        raise UserError(
            f'{source} is not a detector. Give {KINDS}; save your own with '
            'torch.jit.script(network).save(path).'
        ) from error
    return build_inception(weights, source, device)


def _is_plain_pickle(path: Path) -> bool:
    """Whether a file begins like a pickle (protocol 2 or newer) but not like one of an older `torch.save`."""
    torchs = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    with open(path, 'rb') as file:
        start = file.read(len(torchs))
    return re.match(rb'\x80[\x02-\x05]', start) is not None and start != torchs
