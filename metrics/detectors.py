"""Feature detectors: networks that turn images into the vectors whose statistics are compared.

Three kinds stand behind one interface, `Detector`. Each wraps a network that has

    metric_name, img_channels, has_classes
    features(images) -> [N, D]
    with_probabilities(images) -> ([N, D], [N, K])      # only where has_classes

for uint8 images [N, img_channels, H, W] on its device: a TorchScript file (`ScriptNetwork`), FID's Inception
from pytorch-fid's state dict (`metrics.inception`), or DINOv2 (`metrics.dinov2`).
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

INCEPTION_URL = 'https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/files/metrics/inception-2015-12-05.pt'
DINOV2 = 'dinov2'
KINDS = "a TorchScript file, pytorch-fid's Inception (a state dict), dinov2 or dinov2:FOLDER"


class Detector:
    """A network that turns images into features, and what is recorded of it.

    It computes in FP32, whatever PyTorch's settings are. By default recent GPUs convolve in TensorFloat-32,
    which rounds images and weights to 10 bits; pytorch-fid leaves it at that, so that its numbers depend a
    little on the GPU. These do not.

    Attributes:
        name: of the file, without its suffix; of DINOv2, its size.
        digest: SHA-256 (hexadecimal) of the file with the weights.
        metric_name: of a Fréchet distance between its features: 'FID' for both Inceptions, 'FD-DINOv2', for
            others 'Fréchet distance'.
        img_channels: channels of images; gray ones are repeated.
        dim: D, number of features; None until the first call.
        has_classes: whether there are class probabilities.
    """

    def __init__(self, network, name: str, digest: str, device: torch.device):
        self.network, self.name, self.digest, self.device = network, name, digest, device
        self.metric_name: str = network.metric_name
        self.img_channels: int = network.img_channels
        self.has_classes: bool = network.has_classes
        self.dim: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Features [N, D] of uint8 images [N, C, H, W], in the network's floating-point type.

        Raises: UserError where the network cannot use such images, or runs out of memory.
        """
        features = self._run(self.network.features, images)
        self._check(features, images, 'one feature vector an image, [N, D]')
        self.dim = features.shape[1]
        return features

    def with_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [N, D], class probabilities [N, K]) of uint8 images [N, C, H, W].

        The probabilities leave out the last layer's bias, as the code of Salimans et al. 2016 did.
        Raises: UserError where the detector has no classes, and as `__call__`.
        """
        if not self.has_classes:
            raise UserError(
                f'Detector {self.name} has no classes, which the Inception Score needs. Use an Inception '
                'network, such as the default.'
            )
        outputs = self._run(self.network.with_probabilities, images)
        for output, what in zip(
            outputs, ('one feature vector an image, [N, D]', 'one probability vector an image, [N, K]')
        ):
            self._check(output, images, what)
        self.dim = outputs[0].shape[1]
        return outputs

    def _run(self, compute: Callable, images: Tensor):
        if images.shape[1] == 1:
            images = images.expand(-1, self.img_channels, -1, -1)
        if images.shape[1] != self.img_channels:
            raise UserError(
                f'Detector {self.name} wants images of {self.img_channels} channels, these have '
                f'{images.shape[1]}. Convert the images, or use another detector.'
            )
        try:
            with torch.no_grad(), full_precision():
                return compute(images.to(self.device))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f'Detector {self.name} ran out of GPU memory on {len(images)} images. Lower --batch.'
            ) from error
        except (RuntimeError, torch.jit.Error) as error:
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
                f'Detector {self.name} did not return {wanted}, as floating-point numbers. Use a detector '
                'that does.'
            )


@contextlib.contextmanager
def full_precision():
    """Without TensorFloat-32; PyTorch's settings come back afterwards."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


class ScriptNetwork:
    """A TorchScript file: `forward` takes uint8 images [N, C, H, W] and returns features [N, D].

    It may declare `img_channels`, an int attribute, where it wants something else than color images. One
    whose `forward` has an argument `return_features`, like NVIDIA's Inception, is asked for its features;
    without it, it returns class probabilities.
    """

    def __init__(self, module: torch.jit.ScriptModule, img_channels: int):
        self.module, self.img_channels = module, img_channels
        arguments = {argument.name for argument in module.forward.schema.arguments}
        self.has_classes = 'return_features' in arguments
        self.metric_name = 'FID' if self.has_classes else 'Fréchet distance'
        self.for_features = dict(return_features=True) if self.has_classes else {}
        self.for_probabilities = dict(no_output_bias=True) if 'no_output_bias' in arguments else {}

    def features(self, images: Tensor) -> Tensor:
        with torch.jit.optimized_execution(
            False
        ):  # or a program's first calls, before it is optimized, differ from later ones in rounding
            return self.module(images, **self.for_features)

    def with_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Two passes, as the script gives either."""
        features = self.features(images)
        with torch.jit.optimized_execution(False):
            return features, self.module(images, **self.for_probabilities)


def load_detector(
    source: str | os.PathLike, device: torch.device | str = 'cpu', sha256: str | None = None
) -> Detector:
    """The detector at a path or URL, or of a name, ready for images on `device`.

    Args:
        source: path or URL of a TorchScript file; path or URL of the state dict that pytorch-fid publishes
            (`pt_inception-2015-12-05-6726825d.pth`); `dinov2` for the released ViT-L/14, or `dinov2:FOLDER`.
            What a file is shows in its contents. `INCEPTION_URL`, the default of the scripts, stands in for
            EDM's `inception-2015-12-05.pkl`: NVIDIA publishes the same network as TorchScript too, and the
            pickle is code, which we refuse to run.
        sha256: digest that the file with the weights must have. A URL without it must keep the digest of its
            first download.

    TorchScript is the one exception to the rule that loading a file runs no code from it: it is a program,
    executed by PyTorch's interpreter. Use detectors from sources that you trust, and pin them by `sha256`.

    Raises: UserError for a missing file, a failed download, another digest, or a file of another kind.
    """
    source, device = os.fspath(source), torch.device(device)
    if source == DINOV2 or source.startswith(f'{DINOV2}:'):
        from metrics.dinov2 import load_dinov2

        folder = None if source == DINOV2 else source.removeprefix(f'{DINOV2}:')
        network, digest = load_dinov2(folder, device, sha256)
        return Detector(network, network.name, digest, device)
    path = local_path(source, sha256=sha256, pinned=True)
    script = is_torchscript(path)
    if script and sha256 is None and source != INCEPTION_URL:
        warn_of_program(source, path)
    network = _load_script(path, source, device) if script else _load_state_dict(path, source, device)
    name = os.path.splitext(os.path.basename(urllib.parse.urlsplit(source).path))[0]
    return Detector(network, name, file_sha256(path), device)


@functools.cache
def warn_of_program(source: str, path: Path) -> None:
    """Say, once for all processes, that a file is a program, unless its source names the digest that it
    has."""
    if '#sha256=' not in source and distributed.is_main():
        print(
            f'Note: {printable(source)} is a TorchScript file, a program that PyTorch runs. Be sure that '
            f'you trust it; to name this very file, write #sha256={file_sha256(path)} behind it.',
            file=sys.stderr,
            flush=True,
        )


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip with code in it, which `torch.save` never writes."""
    try:
        with BoundedZip(path) as archive:
            return any(name.endswith('/constants.pkl') or '/code/' in name for name in archive.namelist())
    except UNREADABLE:
        return False


def _load_script(path: Path, source: str, device: torch.device) -> ScriptNetwork:
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
        raise UserError(f'{source} declares img_channels={channels!r}. It must be a positive whole number.')
    return ScriptNetwork(module, channels)


def _load_state_dict(path: Path, source: str, device: torch.device) -> torch.nn.Module:
    from metrics.inception import build_inception

    wanted = f'a feature detector: {KINDS}'
    if kind := another_kind(
        path,
        'a feature detector',
        own=('a PyTorch file', 'a pickle', 'text'),
        instead=dict.fromkeys(
            ('a training state', 'a network snapshot', 'a NumPy', 'a zip archive'), f'Give {wanted}.'
        ),
    ):
        raise UserError(f'{source} is no detector: it {kind}')
    if _is_plain_pickle(path):
        raise UserError(
            f'{source} is a pickle, which could run any code when loaded, so it is not. For the Inception of '
            'EDM and StyleGAN use '
            f"NVIDIA's TorchScript file of the same network, the default: {INCEPTION_URL}"
        )
    try:
        with open(path, 'rb') as file:
            weights = read_saved(file)
    except MalformedPickle as error:
        raise UserError(
            f'{source} is no detector. Give {KINDS}; save your own with torch.jit.script(network).save(path).'
        ) from error
    return build_inception(weights, source, device)


def _is_plain_pickle(path: Path) -> bool:
    """Whether a file begins as pickles of protocol 2 and newer do, and not as older versions of `torch.save`
    began theirs."""
    torchs = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    with open(path, 'rb') as file:
        start = file.read(len(torchs))
    return re.match(rb'\x80[\x02-\x05]', start) is not None and start != torchs
