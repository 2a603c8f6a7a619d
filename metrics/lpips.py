"""LPIPS, a differentiable perceptual distance (Zhang et al. 2018): version 0.1, VGG16 with learned heads.

    LPIPS(a, b) = Σ_l mean over positions of  w_l · (f_l(a) − f_l(b))²,   f_l normalized over its channels

Needs only the weights that torchvision and the `lpips` package publish, not the packages. Like Song et al.
2023, we evaluate it at 224x224; their code replaces VGG16's max pools by average pools, for which neither the
network nor the heads were trained, and which we do not adopt.
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
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # VGG16's (convolutions, width); 2x2 pools between
SMALL = 256  # images with a shorter side ...
RESOLUTION = 224  # ... are resized to this
CHANNEL_MEAN, CHANNEL_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet in [-1, 1]
WHAT = (
    "torchvision's vgg16 (features.*) and the lpips package's vgg heads (lin0 to lin4, "
    'here heads.0 to heads.4)'
)
# Kinds of files for which a message gives no further advice.
OURS = dict.fromkeys(('a training state', 'a network snapshot', 'a NumPy'), '')
# Names in files -> ours.
LAYOUTS = {
    r'features\.(\d+)\.(weight|bias)': r'features.\1.\2',  # torchvision
    r'net\.slice\d\.(\d+)\.(weight|bias)': r'features.\1.\2',  # the lpips package's module
    r'lin(\d)\.model\.\d\.weight': r'heads.\1.weight',  # the lpips package's heads
}


class _AllowTF32(torch.autograd.Function):
    """The identity, at which the backward pass allows or forbids TensorFloat-32 in convolutions."""

    @staticmethod
    def forward(ctx, x: Tensor, allowed: bool) -> Tensor:
        ctx.allowed = allowed
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        torch.backends.cudnn.allow_tf32 = ctx.allowed
        return gradient, None


class PerceptualDistance(torch.nn.Module):
    """[N] distances of images [N, 1 or 3, H, W] in [-1, 1], differentiable; frozen, in FP32.

    Gray images are repeated to color. Images with a side below 256 pixels are resized to `resolution`
    bilinearly, unless it is None.

    Attributes:
        tf32: whether its convolutions use TensorFloat-32 on GPUs, in both passes, whatever the rest uses.
    """

    tf32 = False

    def __init__(self, resolution: int | None = RESOLUTION):
        super().__init__()
        self.resolution = resolution

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """[N] distances of FP32 color images at their final size."""
        raise NotImplementedError

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        convolutions = torch.backends.cudnn
        if not self.tf32 or convolutions.allow_tf32:
            return self.compare(self._prepare(a), self._prepare(b))

        # The backward pass enters at the distance, and leaves at the images.
        a, b = (_AllowTF32.apply(images, False) for images in (a, b))
        convolutions.allow_tf32 = True
        try:
            return _AllowTF32.apply(self.compare(self._prepare(a), self._prepare(b)), True)
        finally:
            convolutions.allow_tf32 = False

    def _prepare(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise UserError(
                f'LPIPS compares gray or color images, but these have {images.shape[1]} channels. Use '
                '--cm_loss=pseudo_huber.'
            )
        images = images.float().expand(-1, 3, -1, -1)
        if self.resolution and min(images.shape[2:]) < SMALL:
            images = F.interpolate(images, [self.resolution] * 2, mode='bilinear', align_corners=False)
        return images


class LPIPS(PerceptualDistance):
    """LPIPS with random weights, until some are loaded; see the top of the file.

    `features` names the convolutions by their numbers in torchvision's VGG16, as in its state dict.
    """

    def __init__(self, resolution: int | None = RESOLUTION):
        super().__init__(resolution)
        self.register_buffer('mean', torch.tensor(CHANNEL_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(CHANNEL_STD).reshape(1, 3, 1, 1), persistent=False)
        self.features, self.heads = torch.nn.ModuleDict(), torch.nn.ModuleList()
        channels, number, self.stages = 3, 0, []
        for convolutions, width in STAGES:
            # torchvision numbers each convolution, its ReLU, and the pool after a stage.
            self.stages.append([str(number + 2 * i) for i in range(convolutions)])
            for name in self.stages[-1]:
                self.features[name] = torch.nn.Conv2d(channels, width, 3, padding=1)
                channels = width
            self.heads.append(torch.nn.Conv2d(width, 1, 1, bias=False))
            number += 2 * convolutions + 1
        self.eval().requires_grad_(False)

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self._directions(a), self._directions(b), self.heads)
        # The head weighs channels: [N, 1, H, W], then the mean over positions.
        return sum(head((of_a - of_b).square()).mean(dim=(1, 2, 3)) for of_a, of_b, head in pairs)

    def _directions(self, images: Tensor) -> list[Tensor]:
        """Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, normalized at each position."""
        x, outputs = (images - self.mean) / self.std, []
        for stage in self.stages:
            x = F.max_pool2d(x, 2) if outputs else x
            for name in stage:
                x = F.relu(self.features[name](x))
            # 0 stays 0. The clamp is inside the root, whose derivative at 0 is infinite.
            outputs.append(x / x.square().sum(dim=1, keepdim=True).clamp(min=1e-20).sqrt())
        return outputs


class ScriptLPIPS(PerceptualDistance):
    """A TorchScript file like NVIDIA's vgg16.pt.

    `forward(images, return_lpips=True)` maps images [N, 3, H, W] in [0, 255] to vectors [N, D] whose squared
    distance is LPIPS. An argument `resize_images`, if there is one, is set to False.
    """

    def __init__(self, module: torch.jit.ScriptModule, resolution: int | None = RESOLUTION):
        super().__init__(resolution)
        self.module = module.eval()
        for parameter in module.parameters():  # script modules have no requires_grad_
            parameter.requires_grad_(False)
        arguments = {argument.name for argument in module.forward.schema.arguments}
        self.options = dict(
            return_lpips=True, **({'resize_images': False} if 'resize_images' in arguments else {})
        )

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        return (self._embed(a) - self._embed(b)).square().sum(dim=1)

    def _embed(self, images: Tensor) -> Tensor:
        # Optimization starts after a few calls and changes rounding.
        with torch.jit.optimized_execution(False):
            return self.module((images + 1) * (255 / 2), **self.options)


def load(paths: str | None = None, device: torch.device | str = 'cpu') -> PerceptualDistance:
    """LPIPS with weights from files.

    Args:
        paths: comma-separated files or URLs that together hold all tensors: torchvision's vgg16 (its
            classifier is ignored) and the heads file of the `lpips` package, or one state dict of that
            package's LPIPS module. Or a single TorchScript file (`ScriptLPIPS`), a program that PyTorch's
            interpreter runs. None: `URLS`, 528 MiB, downloaded once.
    Raises: UserError for a missing file, a failed download, or files without exactly these weights.
    """
    # A TorchScript file is the complete network.
    sources = [source.strip() for source in (paths or URLS).split(',')]
    files = [local_path(source, pinned=True) for source in sources]
    scripts = [source for source, file in zip(sources, files) if is_torchscript(file)]
    if scripts and len(sources) > 1:
        raise UserError(
            f'{scripts[0]} is a TorchScript file, which is a complete LPIPS network. Give only this file.'
        )
    if scripts:
        warn_of_program(sources[0], files[0])
        return _load_script(files[0], sources[0], device)

    # Other files each hold some of the weights.
    weights = {}
    for source, file in zip(sources, files):
        found = _read_tensors(file, source)
        if twice := sorted(weights.keys() & found.keys()):
            raise UserError(
                f'{source} holds {twice[0]}, which an earlier file also has. Give {WHAT}, each once.'
            )
        weights.update(found)
    network = LPIPS()
    load_weights(network, weights, ', '.join(sources), f'LPIPS, those of {WHAT}')
    return network.to(device)


def _read_tensors(file: str | os.PathLike, source: str) -> dict[str, object]:
    """LPIPS's weights in a file, by our names."""
    # Read all tensors.
    try:
        with open(file, 'rb') as opened:
            named = read_saved(opened)
    except MalformedPickle as error:
        kind = another_kind(file, 'weights of LPIPS', own=('a PyTorch file', 'text'), instead=OURS)
        reason = kind.rstrip() if kind else 'is not a file of plain tensors.'
        raise UserError(
            f'{source} cannot be read: it {reason} Give {WHAT}, or one TorchScript file.'
        ) from error

    # Rename those of a known layout, and leave out the others, such as VGG16's classifier.
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
    cure = "Give NVIDIA's vgg16.pt, a file with the same interface, or weights."
    try:
        # The arguments of forward tell whether it is a network like NVIDIA's.
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

    # Try it on two images.
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
        raise UserError(f'{source} does not return one floating-point vector per image, [N, D]. {cure}')
    return network
