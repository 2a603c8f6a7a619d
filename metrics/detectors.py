"""Feature detectors: networks that turn images into the vectors whose statistics are compared."""
from __future__ import annotations

import os
import urllib.parse

import torch

from dnnlib.util import UserError, file_sha256, local_path

INCEPTION_URL = 'https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/files/metrics/inception-2015-12-05.pt'


class Detector:
    """A TorchScript feature detector.

    A script may declare `img_channels`, an int attribute, where it wants something else than colour images.
    One whose `forward` has an argument `return_features` (NVIDIA's Inception) is asked for its features, not its classes.

    Attributes:
        name: file name without its suffix.
        digest: SHA-256 of the file.
        dim: D, number of features; None until the first call.
        img_channels: channels the detector wants.
        metric_name: 'FID' for NVIDIA's Inception, for others 'Fréchet distance'.
    """

    def __init__(self, module: torch.jit.ScriptModule, name: str, digest: str, device: torch.device):
        self.module, self.name, self.digest, self.device = module, name, digest, device
        self.dim: int | None = None
        self.img_channels = int(getattr(module, 'img_channels', 3))
        inception = any(argument.name == 'return_features' for argument in module.forward.schema.arguments)
        self.options = dict(return_features=True) if inception else {}
        self.metric_name = 'FID' if inception else 'Fréchet distance'

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, D] of uint8 images [N, C, H, W]; grey images are repeated to the channels that the detector wants."""
        if images.shape[1] == 1:
            images = images.expand(-1, self.img_channels, -1, -1)
        if images.shape[1] != self.img_channels:
            raise UserError(f'Detector {self.name} wants images of {self.img_channels} channels, these have {images.shape[1]}. '
                            'Convert the images, or use another detector.')
        try:
            with torch.no_grad():
                features = self.module(images.to(self.device), **self.options)
        except torch.OutOfMemoryError as error:
            raise UserError(f'Detector {self.name} ran out of GPU memory on {len(images)} images. Lower --batch.') from error
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f'Detector {self.name} failed on uint8 images of shape {tuple(images.shape)}: {reason}. '
                            'Use a detector for such images.') from error
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images) or not features.is_floating_point():
            raise UserError(f'Detector {self.name} did not return a float tensor [N, D] for N images. '
                            'Use a detector with one feature vector an image.')
        self.dim = features.shape[1]
        return features


def load_detector(source: str | os.PathLike, device: torch.device | str = 'cpu', sha256: str | None = None) -> Detector:
    """The TorchScript detector at a path or URL, ready for images on `device`.

    The one exception to the rule that loading a file runs no code from it: TorchScript is a program, executed by
    PyTorch's interpreter. Use detectors from sources that you trust, and pin them by `sha256`.

    Raises: UserError for a missing file, a failed download, another digest, or a file that is not TorchScript.
    """
    path = local_path(source, sha256=sha256)
    try:
        module = torch.jit.load(path, map_location=device).eval()
        takes_images = hasattr(module, 'forward')
    except (RuntimeError, ValueError) as error:
        raise UserError(f'{source} is not a TorchScript file. Save detectors with torch.jit.script(network).save(path).') from error
    if not takes_images:
        raise UserError(f'{source} has no forward method. Save detectors with torch.jit.script(network).save(path).')
    name = os.path.splitext(os.path.basename(urllib.parse.urlsplit(os.fspath(source)).path))[0]
    return Detector(module, name, sha256.lower() if sha256 else file_sha256(path), torch.device(device))
