"""DINOv2 (Oquab et al. 2023) as a feature detector, for FD-DINOv2 (Stein et al. 2023) as EDM2 computes it.

The network is that of `transformers`. Three details follow the code behind published values. Images are
resized to 224x224, bicubically with antialiasing, without rounding or clipping. The feature is the CLS token
after the last layer norm. The learned position embeddings, of 37x37 patches in the released models, are
resampled to 16x16 by the authors' method, which `transformers` lacks (`resample_positions`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.downloads import file_sha256, local_path
from dnnlib.limits import JSON_FILE, SAFETENSORS_HEADER, UNREADABLE, check_size, read_at_most
from dnnlib.text import first_line
from dnnlib.util import UserError

REPOSITORY = 'facebook/dinov2-large'
LARGE = (1024, 24, 14)  # features, layers, patch size of ViT-L/14, by which FD-DINOv2 is defined
RESOLUTION = 224  # pixels
OFFSET = 0.1  # the authors' `interpolate_offset`
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's colors
WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
SIZES = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'image_size', 'patch_size')
# Fields of the configuration that describe the network, with their types.
FIELDS = (
    dict.fromkeys((*SIZES, 'mlp_ratio', 'num_channels'), int)
    | dict(layer_norm_eps=float, hidden_act=str)
    | dict.fromkeys(('qkv_bias', 'use_swiglu_ffn', 'use_mask_token'), bool)
)
MAX_FIELD, MAX_LAYERS = 1_000_000, 100  # far beyond any released model
CURE = f'Give a folder with {REPOSITORY}, as save_pretrained writes it.'


def resample_positions(positions: Tensor, side: int) -> Tensor:
    """Resample position embeddings to another number of patches, as the authors' code does.

    Bicubic, without antialiasing, with a scale of (side + 0.1) / K instead of side / K: the 0.1 was meant to
    guard against rounding, but it shifts the sampling positions, so that the network's outputs depend on it.

    Args:
        positions: [1, 1 + K², D]: the CLS token's, then those of K x K patches, row by row.
        side: patches per side of the result.
    Returns: [1, 1 + side², D].
    """
    cls, patches = positions[:, :1], positions[:, 1:]
    old = math.isqrt(patches.shape[1])
    if old == side:
        return positions
    scale = (side + OFFSET) / old
    # [1, D, K, K]
    grid = patches.unflatten(1, (old, old)).movedim(-1, 1)
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode='bicubic')
    return torch.cat([cls, grid.flatten(2).mT], dim=1)


class DINOv2(torch.nn.Module):
    """CLS features [N, D] of uint8 images [N, 3, H, W] of any size."""

    img_channels, has_classes = 3, False

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        # Only the released size is called FD-DINOv2.
        config = model.config
        sizes = (config.hidden_size, config.num_hidden_layers, config.patch_size)
        self.name = 'dinov2-large' if sizes == LARGE else f'dinov2-{sizes[0]}x{sizes[1]}'
        self.metric_name = 'FD-DINOv2' if sizes == LARGE else 'Fréchet distance'

        # Resample the position embeddings to the resolution of the metric.
        embeddings = model.embeddings
        resampled = resample_positions(
            embeddings.position_embeddings.detach(), RESOLUTION // config.patch_size
        )
        embeddings.position_embeddings = torch.nn.Parameter(resampled)
        self.model = model
        self.register_buffer('mean', torch.tensor(MEAN).reshape(-1, 1, 1))
        self.register_buffer('std', torch.tensor(STD).reshape(-1, 1, 1))

    def features(self, images: Tensor) -> Tensor:
        """float32 [N, D]."""
        x = F.interpolate(images.float(), size=(RESOLUTION, RESOLUTION), mode='bicubic', antialias=True) / 255
        return self.model((x - self.mean) / self.std).last_hidden_state[:, 0]


def load_dinov2(folder: str | None, device: torch.device, sha256: str | None = None) -> tuple[DINOv2, str]:
    """(network, SHA-256 of its weights) from a folder by `save_pretrained`; None: the released ViT-L/14.

    The released model comes from Hugging Face's cache, or is downloaded and pinned like any URL
    (`local_path`). Weights are read from safetensors and the configuration as plain data: no code of a
    repository runs.

    Raises: UserError without the `transformers` package, for a failed download, another digest, or a model
        other than DINOv2.
    """
    with _quiet_transformers() as transformers:
        config_path, weights_path = _files(folder, sha256)
        config = transformers.Dinov2Config(**_read_config(config_path))
        model = _build(transformers.Dinov2Model, config, weights_path)
    return DINOv2(model).eval().requires_grad_(False).to(device), file_sha256(weights_path)


@contextlib.contextmanager
def _quiet_transformers():
    """The package without progress bars and warnings, whose subjects `_build` checks."""
    try:
        import transformers  # takes seconds
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            f'DINOv2 needs the transformers package ({error}): pip install -e .[dinov2]'
        ) from error

    # Restore the settings afterwards: they are global.
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _files(folder: str | None, sha256: str | None) -> tuple[Path, Path]:
    """Paths of the configuration and the weights. Raises: UserError if missing, or for another digest."""
    if folder is None:
        return _released(CONFIG), _released(WEIGHTS, sha256)
    if not os.path.isdir(folder):
        raise UserError(f'dinov2:{folder}: there is no such folder. {CURE}')
    for name in (CONFIG, WEIGHTS):
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(f'{folder} has no {name}. {CURE}')
    return Path(folder, CONFIG), local_path(Path(folder, WEIGHTS), sha256=sha256)


def _released(name: str, sha256: str | None = None) -> Path:
    """Local path of a file of the released model."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(REPOSITORY, name)
    try:
        return local_path(
            cached if isinstance(cached, str) else hf_hub_url(REPOSITORY, name), sha256=sha256, pinned=True
        )
    except UserError as error:
        raise UserError(
            f"{error} Or run transformers.Dinov2Model.from_pretrained('{REPOSITORY}').save_pretrained"
            "('FOLDER') on a machine with a connection, and pass dinov2:FOLDER here."
        ) from error


def _read_config(path: Path) -> dict:
    """The `FIELDS` of a configuration. Raises: UserError unless it is DINOv2 for color images of 224x224."""
    # Read it as plain data.
    try:
        with open(path, 'rb') as file:
            config = json.loads(read_at_most(file, JSON_FILE, 'a configuration'))
    except UNREADABLE as error:
        raise UserError(
            f'{path} cannot be read as a model configuration ({first_line(error)}). {CURE}'
        ) from error
    kind = config.get('model_type') if isinstance(config, dict) else None
    if kind != 'dinov2':
        raise UserError(f'{path} describes a model of type {kind!r}, not dinov2. {CURE}')

    # Take the known fields only, within the range of any released model.
    fields = {name: config[name] for name in FIELDS if name in config}
    for name, value in fields.items():
        most = MAX_LAYERS if name == 'num_hidden_layers' else MAX_FIELD
        if type(value) is not FIELDS[name] or (FIELDS[name] in (int, float) and not 0 < value <= most):
            raise UserError(f'{path}: {name} is {repr(value)[:40]}, which no released DINOv2 has. {CURE}')

    # Check that it is complete and fits the images.
    if absent := [name for name in SIZES if name not in fields]:
        raise UserError(f'{path} lacks {", ".join(absent)}. {CURE}')
    if RESOLUTION % fields['patch_size'] or fields.get('num_channels', 3) != 3:
        raise UserError(
            f'{path} describes a DINOv2 that does not fit color images of {RESOLUTION}x{RESOLUTION}. {CURE}'
        )
    return fields


def _build(model_class, config, path: Path) -> torch.nn.Module:
    """The model with the weights of a file, in FP32. Raises: UserError unless they fit exactly."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Check sizes first: a hostile configuration could make us allocate a huge model.
        with open(path, 'rb') as file:
            # A safetensors file begins with the length of its JSON header.
            header = int.from_bytes(file.read(8), 'little')
            check_size(header, SAFETENSORS_HEADER, 'the header of a safetensors file')
            if (least := _least_weights(config)) > os.fstat(file.fileno()).st_size:
                raise ValueError(f'which are at least {least:,} bytes')
        weights = {name: tensor.float() for name, tensor in load_file(path).items()}
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, attn_implementation='sdpa'
        )
    except (SafetensorError, *UNREADABLE) as error:
        raise UserError(
            f'{path} cannot be read as the weights that {CONFIG} describes ({first_line(error)}). {CURE}'
        ) from error

    # transformers only warns about other names, and initializes what is missing at random.
    if wrong := sorted(name for kind in ('missing_keys', 'unexpected_keys') for name in report[kind]):
        raise UserError(
            f'{path} does not hold exactly the weights that {CONFIG} describes: {len(wrong)} differ, '
            f'such as {wrong[0]}. {CURE}'
        )
    if broken := sorted(name for name, tensor in weights.items() if not tensor.isfinite().all()):
        raise UserError(f'{path} has NaN or infinite numbers at {broken[0]}. {CURE}')
    return model


def _least_weights(config) -> int:
    """Lower bound on the bytes of such a network's weights: its matrices at one byte per number."""
    # The patches' embedding and positions; per layer, four matrices of attention and two of the MLP.
    width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    embeddings = width * (patches + 3 * config.patch_size**2)
    return embeddings + config.num_hidden_layers * width**2 * (4 + 2 * config.mlp_ratio)
