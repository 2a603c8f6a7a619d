"""LPIPS, a perceptual distance of images that trains networks (Zhang et al. 2018), in its form with VGG16 and
learned heads, version 0.1.

    LPIPS(a, b) = sum over layers l of mean over positions of  w_l · (f_l(a) − f_l(b))²,   f_l of unit length
    over its channels

Nothing of torchvision or the `lpips` package is needed, only the weights that they publish. Song et al. 2023
measure with LPIPS at 224x224, and so do we; their code averages where VGG16 pools by maximum, which heads and
network were not trained for, and which we leave out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.downloads import local_path
from dnnlib.file_kind import another_kind
from dnnlib.util import UserError
from metrics.detectors import is_torchscript, warn_of_program
from metrics.weights import load_weights
from torch_utils.restricted_pickle import MalformedPickle
from torch_utils.saved_tensors import read_saved

URLS = (
    'https://download.pytorch.org/models/vgg16-397923af.pth,'
    'https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth'
)
STAGES = (
    (2, 64),
    (2, 128),
    (3, 256),
    (3, 512),
    (3, 512),
)  # VGG16's convolutions and their width, a 2x2 pool between stages
RESOLUTION = 224  # that smaller images are brought to, ...
SMALL = 256  # and which ones are smaller
CHANNEL_MEAN, CHANNEL_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet in [-1, 1]
WHAT = "torchvision's vgg16 (features.*) and the lpips package's vgg heads (lin0 to lin4, here heads.0 to heads.4)"
OURS = dict.fromkeys(
    ('a training state', 'a network snapshot', 'a NumPy'), ''
)  # kinds of files of which no more is said than what they are
LAYOUTS = {  # names in files -> ours
    r'features\.(\d+)\.(weight|bias)': r'features.\1.\2',  # torchvision
    r'net\.slice\d\.(\d+)\.(weight|bias)': r'features.\1.\2',  # the lpips package, all of it
    r'lin(\d)\.model\.\d\.weight': r'heads.\1.weight',  # the lpips package, its heads
}


class PerceptualDistance(torch.nn.Module):
    """[N] from two batches of images [N, 1 or 3, H, W] in [-1, 1]; gradients flow to the images. Frozen, and
    computes in FP32.

    Gray images are repeated to color, those with a side below 256 pixels are brought to `resolution`
    bilinearly; None: as they are.
    """

    def __init__(self, resolution: int | None = RESOLUTION):
        super().__init__()
        self.resolution = resolution

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Of color images in FP32 at their final size."""
        raise NotImplementedError

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.compare(self._prepare(a), self._prepare(b))

    def _prepare(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise UserError(
                f'LPIPS compares gray or color images, and these have {images.shape[1]} channels. Use '
                '--cm_loss=pseudo_huber for them.'
            )
        images = images.float().expand(-1, 3, -1, -1)
        if self.resolution and min(images.shape[2:]) < SMALL:
            images = F.interpolate(images, [self.resolution] * 2, mode='bilinear', align_corners=False)
        return images


class LPIPS(PerceptualDistance):
    """See the top of the file. Random weights until some are loaded.

    `features` holds the convolutions under their numbers in torchvision's VGG16, whose names the tensors of a
    state dict therefore have.
    """

    def __init__(self, resolution: int | None = RESOLUTION):
        super().__init__(resolution)
        self.register_buffer('mean', torch.tensor(CHANNEL_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(CHANNEL_STD).reshape(1, 3, 1, 1), persistent=False)
        self.features, self.heads = torch.nn.ModuleDict(), torch.nn.ModuleList()
        channels, number, self.stages = 3, 0, []
        for convolutions, width in STAGES:
            self.stages.append(
                [str(number + 2 * i) for i in range(convolutions)]
            )  # each is followed by its ReLU
            for name in self.stages[-1]:
                self.features[name] = torch.nn.Conv2d(channels, width, 3, padding=1)
                channels = width
            self.heads.append(torch.nn.Conv2d(width, 1, 1, bias=False))
            number += 2 * convolutions + 1  # the pool has a number too
        self.eval().requires_grad_(False)

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self._directions(a), self._directions(b), self.heads)
        return sum(head((of_a - of_b).square()).mean(dim=(1, 2, 3)) for of_a, of_b, head in pairs)

    def _directions(self, images: Tensor) -> list[Tensor]:
        """Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, each position's vector at unit
        length, or 0."""
        x, outputs = (images - self.mean) / self.std, []
        for stage in self.stages:
            x = F.max_pool2d(x, 2) if outputs else x
            for name in stage:
                x = F.relu(self.features[name](x))
            outputs.append(
                x / x.square().sum(dim=1, keepdim=True).clamp(min=1e-20).sqrt()
            )  # where all is 0 the root has no slope
        return outputs


class ScriptLPIPS(PerceptualDistance):
    """A TorchScript file in the manner of NVIDIA's vgg16.pt: `forward(images, return_lpips=True)`, images [N,
    3, H, W] in [0, 255], gives vectors [N, D] whose squared distance is LPIPS. One that has an argument
    `resize_images` is asked not to."""

    def __init__(self, module: torch.jit.ScriptModule, resolution: int | None = RESOLUTION):
        super().__init__(resolution)
        self.module = module.eval()
        for parameter in module.parameters():  # scripts have no requires_grad_ of their own
            parameter.requires_grad_(False)
        arguments = {argument.name for argument in module.forward.schema.arguments}
        self.options = dict(
            return_lpips=True, **({'resize_images': False} if 'resize_images' in arguments else {})
        )

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        return (self._embed(a) - self._embed(b)).square().sum(dim=1)

    def _embed(self, images: Tensor) -> Tensor:
        with torch.jit.optimized_execution(
            False
        ):  # or the first calls, before it is optimized, differ from later ones in rounding
            return self.module((images + 1) * (255 / 2), **self.options)


def load(paths: str | None = None, device: torch.device | str = 'cpu') -> PerceptualDistance:
    """LPIPS with weights from files.

    Args:
        paths: files or URLs, separated by commas, whose tensors together make it: torchvision's vgg16 (its
            classifier is left out), the heads file of the `lpips` package, or one state dict of that
            package's LPIPS module; or a single TorchScript file, see `ScriptLPIPS`: that is a program, which
            PyTorch's interpreter runs. None: `URLS`, downloaded once, 528 MiB.
    Raises: UserError for a missing file, a failed download, or files that do not hold exactly these weights.
    """
    sources = [source.strip() for source in (paths or URLS).split(',')]
    files = [local_path(source, pinned=True) for source in sources]
    scripts = [source for source, file in zip(sources, files) if is_torchscript(file)]
    if scripts and len(sources) > 1:
        raise UserError(
            f'{scripts[0]} is a TorchScript file, which is all of LPIPS by itself. Give it alone.'
        )
    if scripts:
        warn_of_program(sources[0], files[0])
        return _load_script(files[0], sources[0], device)
    weights = {}
    for source, file in zip(sources, files):
        found = _read_tensors(file, source)
        if twice := sorted(weights.keys() & found.keys()):
            raise UserError(
                f'{source} holds {twice[0]} once more, which a file before it has. Give {WHAT}, each once.'
            )
        weights.update(found)
    network = LPIPS()
    load_weights(network, weights, ', '.join(sources), f'LPIPS, those of {WHAT}')
    return network.to(device)


def _read_tensors(file: str | os.PathLike, source: str) -> dict[str, object]:
    """What a file holds of LPIPS's weights, by our names."""
    try:
        with open(file, 'rb') as opened:
            named = read_saved(opened)
    except MalformedPickle as error:
        kind = another_kind(file, 'weights of LPIPS', own=('a PyTorch file', 'text'), instead=OURS)
        reason = kind.rstrip() if kind else 'is no file of plain tensors.'
        raise UserError(
            f'{source} cannot be read: it {reason} Give {WHAT}, or one TorchScript file.'
        ) from error
    found = {}
    for name, tensor in named.items() if isinstance(named, Mapping) else ():
        for pattern, ours in LAYOUTS.items():
            if match := re.fullmatch(pattern, str(name)):
                found[match.expand(ours)] = tensor
    if not found:
        kind = another_kind(file, 'weights of LPIPS', own=('a PyTorch file',), instead=OURS)
        raise UserError(
            f'{source} has no weights of LPIPS{f": it {kind.rstrip()}" if kind else "."} Give {WHAT}, or one '
            'TorchScript file.'
        )
    return found


def _load_script(file: str | os.PathLike, source: str, device: torch.device | str) -> ScriptLPIPS:
    cure = "Give NVIDIA's vgg16.pt, one that is called in the same way, or weights."
    try:
        module = torch.jit.load(file, map_location=device)
        arguments = {argument.name for argument in module.forward.schema.arguments}
    except (RuntimeError, ValueError, AttributeError) as error:
        raise UserError(
            f'{source} is a TorchScript file that cannot be loaded, or has no forward method. {cure}'
        ) from error
    if 'return_lpips' not in arguments:
        raise UserError(
            f'{source} is a TorchScript file whose forward method has no argument return_lpips. {cure}'
        )
    network = ScriptLPIPS(module)
    try:
        embedding = network._embed(torch.zeros(2, 3, RESOLUTION, RESOLUTION, device=device))
    except (RuntimeError, torch.jit.Error) as error:
        raise UserError(
            f'{source} fails on color images of {RESOLUTION}x{RESOLUTION}: '
            f'{str(error).strip().splitlines()[-1]}. {cure}'
        ) from error
    if (
        not isinstance(embedding, Tensor)
        or embedding.ndim != 2
        or len(embedding) != 2
        or not embedding.is_floating_point()
    ):
        raise UserError(
            f'{source} does not return one vector of floating-point numbers an image, [N, D]. {cure}'
        )
    return network
