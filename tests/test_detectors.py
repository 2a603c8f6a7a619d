"""Feature detectors: TorchScript files, FID's Inception against pytorch-fid's numbers, DINOv2 against its formulas."""

import functools
import http.server
import json
import pickle
import sys
import threading
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from golden import golden_numbers

from dnnlib import downloads
from dnnlib.downloads import file_sha256
from dnnlib.util import UserError
from metrics import dinov2
from metrics.detectors import INCEPTION_URL, Detector, ScriptNetwork, load_detector
from metrics.weights import load_weights


def save(module, path):
    torch.jit.script(module).save(path)
    return path


def images(count, channels=3, size=(8, 8), seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (count, channels, *size), dtype=np.uint8)
    )


class Bomb:
    def __reduce__(self):
        return exec, ('raise SystemExit("code ran")',)


# ----------------------------------------------------------------------------
# TorchScript.


class Pooled(torch.nn.Module):
    """Fixed random features: convolution, ReLU, mean over the image."""

    def __init__(self, dim: int = 6, channels: int = 3):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, dim, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(
                torch.randn(self.conv.weight.shape, generator=torch.Generator().manual_seed(dim))
            )

    def forward(self, images):
        return self.conv(images.float() / 255).relu().mean([2, 3])


class Gray(Pooled):
    def __init__(self, img_channels=1):
        super().__init__(channels=1)
        self.img_channels = img_channels


class TwoHeads(Pooled):
    """Classes unless asked for features, with the arguments of NVIDIA's Inception. The biased classes are all the first one."""

    def forward(
        self, images, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ):
        features = self.conv(images.float() / 255).relu().mean([2, 3])
        if return_features:
            return features
        logits = features[:, :2]
        if not no_output_bias:
            logits = logits + torch.tensor([100.0, 0.0])
        return logits.softmax(dim=1)


class OddHeads(Pooled):
    def forward(self, images, return_features: bool = False):
        return self.conv(images.float() / 255).relu().mean([2, 3]) if return_features else torch.zeros(2)


class Images(torch.nn.Module):
    def forward(self, images):
        return images


class Labeled(torch.nn.Module):
    def forward(self, images, labels):
        return labels


def test_gray_images_become_color_unless_the_detector_wants_gray(tmp_path):
    color, gray = (
        load_detector(save(Pooled(), tmp_path / 'c.pt')),
        load_detector(save(Gray(), tmp_path / 'g.pt')),
    )
    x = images(4, channels=1)
    torch.testing.assert_close(color(x), color(x.repeat(1, 3, 1, 1)))
    assert (color.img_channels, gray.img_channels, gray(x).shape, gray.dim, gray.name) == (
        3,
        1,
        (4, 6),
        6,
        'g',
    )
    with pytest.raises(UserError, match='expects 1 channels'):
        gray(images(4))


def test_a_detector_with_two_heads_gives_features_and_probabilities_without_the_output_bias(tmp_path):
    """With its bias the first class would have probability 1."""
    detector = load_detector(save(TwoHeads(), tmp_path / 'inception.pt'))
    plain = load_detector(save(Pooled(), tmp_path / 'plain.pt'))
    expected = plain(images(3))
    features, probabilities = detector.with_probabilities(images(3))
    assert (detector.metric_name, detector.has_classes, detector.dim) == (
        'FID',
        True,
        6,
    ) and not features.requires_grad
    assert (plain.metric_name, plain.has_classes) == ('Fréchet distance', False)
    for actual in (features, detector(images(3))):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(probabilities, expected[:, :2].softmax(dim=1))


def test_a_detector_without_classes_says_so(tmp_path):
    with pytest.raises(UserError, match='plain has no classes'):
        load_detector(save(Pooled(), tmp_path / 'plain.pt')).with_probabilities(images(3))


def test_detectors_are_known_by_their_digest(tmp_path):
    path = save(Pooled(), tmp_path / 'd.pt')
    assert load_detector(path, sha256=file_sha256(path).upper()).digest == file_sha256(path)
    with pytest.raises(UserError, match='does not have the SHA-256'):
        load_detector(path, sha256='0' * 64)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(a folder, the URL under which it is served); downloads go to an empty cache."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setattr(downloads, 'DEFAULT_CACHE_DIR', tmp_path / 'cache')
    handler = type('Quiet', (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *args: None))
    with http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(handler, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield folder, f'http://127.0.0.1:{server.server_port}'
        server.shutdown()
        thread.join()


def test_a_downloaded_detector_stays_the_one_of_the_first_download(served, tmp_path):
    """A changed byte in the cache is repaired from the server, unless the server has another file by now."""
    folder, url = served
    path = save(Pooled(), folder / 'ours-1.pt')
    detector = load_detector(f'{url}/ours-1.pt')
    assert (detector.name, detector.digest) == ('ours-1', file_sha256(path))
    (cached,) = (tmp_path / 'cache').glob('*.pt')
    for _ in range(2):
        assert load_detector(f'{url}/ours-1.pt').digest == detector.digest
        cached.write_bytes(b'?' + cached.read_bytes()[1:])
    save(Pooled(dim=7), path)
    with pytest.raises(UserError, match=f'not {detector.digest}') as error:
        load_detector(f'{url}/ours-1.pt')
    assert f'--detector-sha256={file_sha256(path)}' in str(error.value)
    assert load_detector(f'{url}/ours-1.pt', sha256=file_sha256(path)).digest == file_sha256(path)


def code_in_a_zip(path):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a/code/b.py', 'x')


@pytest.mark.parametrize(
    'write, words',
    [
        (lambda path: path.write_bytes(b'junk'), 'is not a detector. Give a TorchScript file'),
        (lambda path: path.write_bytes(b''), 'is not a detector'),
        (lambda path: torch.save(Bomb(), path), 'is not a detector'),
        (code_in_a_zip, 'TorchScript file that cannot be loaded'),
        (lambda path: path.write_bytes(pickle.dumps(Bomb())), INCEPTION_URL),
        (lambda path: torch.save(Bomb(), path, _use_new_zipfile_serialization=False), 'is not a detector'),
        (lambda path: torch.save([1], path), 'holds a list'),
        (lambda path: torch.save({1: torch.zeros(2)}, path), 'holds a dict'),
        (
            lambda path: torch.save(dict(a=torch.zeros(2)), path),
            r'lacks Conv2d_1a_3x3.conv.weight, .* and \d+ more; has unexpected a',
        ),
        (lambda path: save(Gray(img_channels=0), path), 'img_channels=0'),
        (lambda path: save(Gray(img_channels='RGB'), path), "img_channels='RGB'"),
    ],
    ids=[
        'junk',
        'empty',
        'object',
        'broken script',
        'pickle',
        'old object',
        'list',
        'odd names',
        'other weights',
        'no channels',
        'odd channels',
    ],
)
def test_files_that_are_no_detectors_are_refused_without_running_them(tmp_path, write, words):
    path = tmp_path / 'file.pkl'
    write(path)
    with pytest.raises(UserError, match=words) as error:
        load_detector(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_what_a_detector_cannot_do_is_one_clear_error(tmp_path):
    for module, words in (
        (Images(), 'did not return one feature vector'),
        (Labeled(), 'failed on uint8 images'),
    ):
        with pytest.raises(UserError, match=words):
            load_detector(save(module, tmp_path / 'd.pt'))(images(2))
    with pytest.raises(UserError, match='did not return one probability vector'):
        load_detector(save(OddHeads(), tmp_path / 'd.pt')).with_probabilities(images(2))
    with pytest.raises(UserError, match='failed on uint8 images') as error:
        load_detector(save(Pooled(), tmp_path / 'pooled.pt'))(images(2)[..., :2, :2])
    assert '\n' not in str(error.value)


class Settings:
    """A network that fails, having noted PyTorch's settings."""

    metric_name, img_channels, has_classes = 'Fréchet distance', 3, False

    def features(self, images):
        self.seen = current_settings()
        raise RuntimeError('no')


def current_settings():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled()


@pytest.mark.parametrize('convolutions, products', [(True, True), (True, False), (False, False)])
def test_detectors_compute_in_full_precision_and_leave_the_settings_as_they_were(convolutions, products):
    network, (*before, _) = Settings(), current_settings()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
    try:
        with pytest.raises(UserError):
            Detector(network, 'settings', '', torch.device('cpu'))(images(1))
        assert network.seen == (False, False, False) and current_settings() == (convolutions, products, True)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_running_out_of_gpu_memory_names_the_option():
    network = Settings()
    network.features = lambda images: (_ for _ in ()).throw(torch.OutOfMemoryError())
    with pytest.raises(UserError, match='Lower --batch'):
        Detector(network, 'large', '', torch.device('cpu'))(images(1))


def test_scripts_run_unoptimized_so_that_their_first_calls_are_like_the_later_ones(tmp_path):
    """On a GPU the profiling executor fuses a program after its first calls, and the rounding changes; on a CPU nothing shows."""
    network = ScriptNetwork(torch.jit.load(save(TwoHeads(), tmp_path / 'd.pt')), 3)
    seen = []
    network.module = lambda images, **options: seen.append(torch._C._get_graph_executor_optimize())
    network.with_probabilities(images(1))
    assert seen == [False, False] and torch._C._get_graph_executor_optimize()


# ----------------------------------------------------------------------------
# FID's Inception.


@pytest.fixture(scope='module')
def golden():
    return golden_numbers('inception-fid.npz')


@pytest.fixture(scope='module')
def inception_weights(golden):
    """A state dict by the golden file's recipe: entries in the order of their names, from one generator."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in zip(golden['names'].tolist(), golden['shapes'].tolist()):
        shape = tuple(int(size) for size in shape.strip('()').split(',') if size)
        if name.endswith('num_batches_tracked'):
            weights[name] = torch.tensor(0)
        elif name == 'fc.bias':
            weights[name] = torch.zeros(shape)
        elif name.endswith('running_var'):
            weights[name] = 1 + 0.1 * torch.rand(shape, generator=generator)
        elif '.bn.' in name:
            weights[name] = float(name.endswith('weight')) + 0.1 * torch.randn(shape, generator=generator)
        else:
            weights[name] = (2 / np.prod(shape[1:])) ** 0.5 * torch.randn(shape, generator=generator)
    return weights


@pytest.fixture(scope='module')
def inception_file(inception_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp('inception') / 'pt_inception-2015-12-05-6726825d.pth'
    torch.save(inception_weights, path)
    return path


def test_inception_from_a_state_dict_equals_pytorch_fid(golden, inception_weights, inception_file):
    """Features of standard deviation 0.3, to 1e-4 of that at least; rounding alone leaves 1e-6."""
    detector = load_detector(inception_file)
    assert sorted(detector.network.state_dict()) == golden['names'].tolist()
    features, probabilities = detector.with_probabilities(torch.from_numpy(golden['images']))
    expected = golden['features']
    assert np.abs(features.numpy() - expected).max() < 1e-5 < 1e-4 * expected.std()
    assert (detector.name, detector.metric_name, detector.dim) == (
        'pt_inception-2015-12-05-6726825d',
        'FID',
        2048,
    )
    assert (
        detector.has_classes and detector.img_channels == 3 and detector.digest == file_sha256(inception_file)
    )
    logits = expected.astype(np.float64) @ inception_weights['fc.weight'].numpy().T
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(probabilities, odds / odds.sum(axis=1, keepdims=True), rtol=1e-4)


def test_inception_from_a_file_of_an_old_pytorch(golden, inception_weights, tmp_path):
    """Not a zip; without counters of batches. The output bias changes neither features nor probabilities."""
    weights = {
        name: tensor for name, tensor in inception_weights.items() if not name.endswith('num_batches_tracked')
    }
    torch.save(
        dict(weights, **{'fc.bias': torch.linspace(-9, 9, 1008)}),
        tmp_path / 'old.pth',
        _use_new_zipfile_serialization=False,
    )
    torch.save(weights, tmp_path / 'new.pth')
    x = torch.from_numpy(golden['images'][:1])
    old, new = (load_detector(tmp_path / name).with_probabilities(x) for name in ('old.pth', 'new.pth'))
    assert np.abs(old[0].numpy() - golden['features'][:1]).max() < 1e-5
    torch.testing.assert_close(old, new, rtol=0, atol=0)


def tiny_network():
    network = torch.nn.Sequential()
    network.add_module('conv', torch.nn.Conv2d(1, 2, 3, bias=False))
    network.add_module('bn', torch.nn.BatchNorm2d(2))
    return network


def test_counters_of_batches_that_are_absent_are_zero():
    network = tiny_network()
    weights = {
        name: torch.ones_like(tensor)
        for name, tensor in network.state_dict().items()
        if 'batches' not in name
    }
    network.bn.num_batches_tracked.fill_(5)
    load_weights(network, weights, 'file.pth', 'a network')
    assert network.bn.num_batches_tracked == 0 and (network.bn.running_mean == 1).all()


def test_inception_resizes_large_images_without_antialiasing(inception_file):
    """Of 897 = 3 · 299 pixels it sees every third; the golden images are smaller than 299 and do not show it."""
    detector, x = load_detector(inception_file), images(1, size=(897, 897))
    torch.testing.assert_close(detector(x), detector(x[..., 1::3, 1::3]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda weights: weights.pop('conv.weight'), 'it lacks conv.weight. '),
        (
            lambda weights: weights.update({'AuxLogits.fc.bias': torch.zeros(1)}),
            'it has unexpected AuxLogits.fc.bias. ',
        ),
        (
            lambda weights: weights.update({'bn.bias': torch.zeros(1)}),
            r'another shape at bn.bias \[1\] instead of \[2\]. ',
        ),
        (
            lambda weights: weights.update({'bn.bias': torch.tensor([0.0, torch.nan])}),
            'NaN or infinite numbers at bn.bias. ',
        ),
        (
            lambda weights: weights.update({'bn.bias': torch.tensor([0.0, torch.inf])}),
            'NaN or infinite numbers at bn.bias. ',
        ),
        (lambda weights: weights.update({'bn.bias': [0.0, 0.0]}), 'no plain tensor at bn.bias. '),
        (
            lambda weights: weights.update({'bn.bias': torch.zeros(2).to_sparse()}),
            'no plain tensor at bn.bias. ',
        ),
        (
            lambda weights: weights.update({'bn.bias': torch.zeros(2, dtype=torch.complex64)}),
            'no plain tensor at bn.bias. ',
        ),
        (
            lambda weights: weights.update({f'x{i}': torch.zeros(1) for i in range(9)}),
            'it has unexpected x0, x1, x2 and 6 more. ',
        ),
        (
            lambda weights: (weights.pop('conv.weight'), weights.update(a=1)),
            'it lacks conv.weight; has unexpected a. ',
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(change, words):
    network = tiny_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights = {name: torch.full_like(tensor, 7) for name, tensor in before.items()}
    change(weights)
    with pytest.raises(UserError, match=words) as error:
        load_weights(network, weights, 'file.pth', 'a network')
    assert str(error.value).startswith('file.pth does not hold the weights of a network: ')
    torch.testing.assert_close(dict(network.state_dict()), before)


# ----------------------------------------------------------------------------
# DINOv2.


@pytest.fixture(scope='module')
def transformers():
    return pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def tiny_dinov2(transformers, tmp_path_factory):
    """A folder as save_pretrained writes it: 2 layers, random weights, patches and positions as in the released models."""
    folder = tmp_path_factory.mktemp('dinov2') / 'tiny'
    torch.manual_seed(0)
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=518)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.2 if parameter.ndim > 1 else 0.5)
                + ('norm' in name and 'weight' in name)
            )
    model.save_pretrained(folder)
    return folder


def cubic(x, a):
    """Keys' kernel of cubic convolution."""
    x = np.abs(x)
    return np.where(
        x < 1, (a + 2) * x**3 - (a + 3) * x**2 + 1, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0)
    )


def sampled_positions(positions):
    """Position embeddings [1 + 37², D] at 16 x 16 patches, by the authors' convention: sample i lies at (i + 1/2) · 37 / 16.1 − 1/2, at the
    edges the outermost patches are repeated, and the kernel is not widened (a = −3/4)."""
    at = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    matrix = np.zeros((16, 37))
    for row, center in enumerate(at):
        for tap in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            matrix[row, np.clip(tap, 0, 36)] += cubic(center - tap, -0.75)
    grid = positions[1:].reshape(37, 37, -1)
    return np.concatenate([positions[:1], np.einsum('ij,kl,jld->ikd', matrix, matrix, grid).reshape(256, -1)])


def resized(image):
    """uint8 [3, H, W] to [3, 224, 224] by Pillow, in floating point."""
    return np.stack(
        [
            np.asarray(
                PIL.Image.fromarray(np.float32(channel)).resize((224, 224), PIL.Image.Resampling.BICUBIC)
            )
            for channel in image
        ]
    )


def norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weight + bias


def cls_feature(image, weights, heads):
    """The CLS token after the last layer norm, from a vision transformer's formulas (Dosovitskiy et al. 2021) with layer scale, in FP64."""

    def linear(x, name):
        return x @ weights[f'{name}.weight'].T + weights[f'{name}.bias']

    pixels = (resized(image) / 255 - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape(
        [0.229, 0.224, 0.225], (3, 1, 1)
    )
    patches = pixels.reshape(3, 16, 14, 16, 14).transpose(1, 3, 0, 2, 4).reshape(256, -1)
    kernel = weights['embeddings.patch_embeddings.projection.weight']
    tokens = (
        patches @ kernel.reshape(len(kernel), -1).T + weights['embeddings.patch_embeddings.projection.bias']
    )
    x = np.concatenate([weights['embeddings.cls_token'][0], tokens]) + sampled_positions(
        weights['embeddings.position_embeddings'][0]
    )
    for layer in (f'encoder.layer.{i}' for i in range(2)):
        y = norm(x, weights[f'{layer}.norm1.weight'], weights[f'{layer}.norm1.bias'])
        q, k, v = (
            linear(y, f'{layer}.attention.attention.{name}').reshape(257, heads, -1)
            for name in ('query', 'key', 'value')
        )
        scores = np.einsum('qhd,khd->hqk', q, k) / np.sqrt(q.shape[-1])
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum('hqk,khd->qhd', odds / odds.sum(-1, keepdims=True), v).reshape(257, -1)
        x = x + linear(y, f'{layer}.attention.output.dense') * weights[f'{layer}.layer_scale1.lambda1']
        y = norm(x, weights[f'{layer}.norm2.weight'], weights[f'{layer}.norm2.bias'])
        y = F.gelu(torch.from_numpy(linear(y, f'{layer}.mlp.fc1'))).numpy()
        x = x + linear(y, f'{layer}.mlp.fc2') * weights[f'{layer}.layer_scale2.lambda1']
    return norm(x[0], weights['layernorm.weight'], weights['layernorm.bias'])


@pytest.mark.parametrize('size', [(32, 32), (224, 224), (300, 260)])
def test_dinov2_equals_the_formulas_of_its_authors(tiny_dinov2, size):
    """Smaller, equal and larger images. The weights are read from the file, under their names there, which are those of the released model."""
    from safetensors.numpy import load_file

    weights = {
        name: tensor.astype(np.float64)
        for name, tensor in load_file(tiny_dinov2 / 'model.safetensors').items()
    }
    x = images(2, size=size)
    detector = load_detector(f'dinov2:{tiny_dinov2}')
    expected = np.stack([cls_feature(image, weights, heads=2) for image in x.numpy()])
    assert 0.3 < expected.std() < 3 and expected[0] != pytest.approx(expected[1], abs=0.01)
    np.testing.assert_allclose(detector(x), expected, atol=2e-5)
    assert detector.dim == 16 and detector.digest == file_sha256(tiny_dinov2 / 'model.safetensors')


def test_the_positions_that_transformers_would_use_give_other_features(transformers, tiny_dinov2):
    """So that the test above tells them apart: without the authors' 0.1 every feature moves by more than rounding."""
    detector = load_detector(f'dinov2:{tiny_dinov2}')
    theirs = transformers.Dinov2Model.from_pretrained(tiny_dinov2).embeddings.position_embeddings
    ours = detector.network.model.embeddings.position_embeddings
    assert ours.shape == (1, 257, 16)
    plain = (
        F.interpolate(theirs[:, 1:].unflatten(1, (37, 37)).movedim(-1, 1), size=(16, 16), mode='bicubic')
        .flatten(2)
        .mT
    )
    assert (ours[:, 1:] - plain).abs().max() > 0.01


def test_positions_of_224_pixels_stay_as_they_are():
    positions = torch.randn(1, 257, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dinov2.resample_positions(positions, 16), positions)


def test_only_vit_l_14_gives_fd_dinov2(tiny_dinov2, monkeypatch):
    detector = load_detector(f'dinov2:{tiny_dinov2}')
    assert (detector.name, detector.metric_name, detector.has_classes) == (
        'dinov2-16x2',
        'Fréchet distance',
        False,
    )
    assert dinov2.LARGE == (1024, 24, 14)
    monkeypatch.setattr(dinov2, 'LARGE', (16, 2, 14))
    detector = load_detector(f'dinov2:{tiny_dinov2}')
    assert (detector.name, detector.metric_name) == ('dinov2-large', 'FD-DINOv2')


def test_dinov2_is_known_by_the_digest_of_its_weights(tiny_dinov2):
    digest = file_sha256(tiny_dinov2 / 'model.safetensors')
    assert load_detector(f'dinov2:{tiny_dinov2}', sha256=digest).digest == digest
    with pytest.raises(UserError, match='does not have the SHA-256'):
        load_detector(f'dinov2:{tiny_dinov2}', sha256='0' * 64)


def test_loading_dinov2_prints_nothing(tiny_dinov2, capfd):
    load_detector(f'dinov2:{tiny_dinov2}')
    assert capfd.readouterr() == ('', '')


def test_transformers_is_silenced_while_loading_only(transformers):
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        with dinov2._quiet_transformers():
            assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity(before)


def change_config(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(
        json.dumps({name: value for name, value in (config | changes).items() if value is not None})
    )


def change_weights(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / 'model.safetensors')
    change(weights)
    save_file(weights, folder / 'model.safetensors')


@pytest.mark.parametrize(
    'damage, words',
    [
        (lambda folder: (folder / 'config.json').unlink(), 'has no config.json'),
        (lambda folder: (folder / 'model.safetensors').unlink(), 'has no model.safetensors'),
        (lambda folder: (folder / 'config.json').write_text('{'), 'cannot be read as a model configuration'),
        (lambda folder: (folder / 'config.json').write_text('[]'), 'type None, not dinov2'),
        (lambda folder: change_config(folder, model_type='vit'), "type 'vit', not dinov2"),
        (
            lambda folder: change_config(folder, model_type='dinov2_with_registers'),
            "'dinov2_with_registers', not dinov2",
        ),
        (lambda folder: change_config(folder, patch_size=15), 'does not fit color images of 224x224'),
        (lambda folder: change_config(folder, num_channels=1), 'does not fit color images'),
        (lambda folder: change_config(folder, hidden_size='16'), "hidden_size is '16'"),
        (lambda folder: change_config(folder, num_hidden_layers=0), 'num_hidden_layers is 0'),
        (lambda folder: change_config(folder, image_size=[518, 518]), 'image_size is'),
        (lambda folder: change_config(folder, num_attention_heads=None), 'lacks num_attention_heads'),
        (lambda folder: change_config(folder, hidden_act='rm -rf'), 'cannot be read as the weights'),
        (lambda folder: change_config(folder, hidden_size=32), 'cannot be read as the weights'),
        (lambda folder: change_config(folder, num_hidden_layers=3), '18 differ, such as encoder.layer.2'),
        (lambda folder: (folder / 'model.safetensors').write_bytes(b'junk'), 'cannot be read as the weights'),
        (
            lambda folder: change_weights(folder, lambda weights: weights.pop('layernorm.bias')),
            '1 differ, such as layernorm.bias',
        ),
        (
            lambda folder: change_weights(folder, lambda weights: weights.update(extra=torch.zeros(1))),
            '1 differ, such as extra',
        ),
        (
            lambda folder: change_weights(folder, lambda weights: weights['layernorm.bias'].fill_(torch.nan)),
            'NaN or infinite numbers at layernorm.bias',
        ),
    ],
)
def test_folders_of_anything_else_than_dinov2_are_refused(tiny_dinov2, tmp_path, damage, words):
    folder = tmp_path / 'model'
    folder.mkdir()
    for path in tiny_dinov2.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        load_detector(f'dinov2:{folder}')
    assert (
        str(folder) in str(error.value)
        and 'save_pretrained' in str(error.value)
        and '\n' not in str(error.value)
    )


@pytest.mark.parametrize('folder', ['', 'no/such/folder'])
def test_a_missing_folder_is_named(transformers, folder):
    with pytest.raises(UserError, match=f'dinov2:{folder}: there is no such folder'):
        load_detector(f'dinov2:{folder}')


def test_the_released_model_comes_from_hugging_faces_cache_without_asking_a_server(
    transformers, tiny_dinov2, monkeypatch
):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, 'try_to_load_from_cache', lambda repository, name: str(tiny_dinov2 / name)
    )
    assert load_detector('dinov2').digest == file_sha256(tiny_dinov2 / 'model.safetensors')


def test_the_released_model_is_downloaded_once_and_pinned(transformers, tiny_dinov2, served, monkeypatch):
    import huggingface_hub

    folder, url = served
    for path in tiny_dinov2.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(huggingface_hub, 'try_to_load_from_cache', lambda repository, name: None)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_url', lambda repository, name: f'{url}/{name}')
    digest = load_detector('dinov2').digest
    for path in folder.iterdir():
        path.unlink()
    assert load_detector('dinov2').digest == digest
    for path in downloads.DEFAULT_CACHE_DIR.glob('*.safetensors'):
        path.write_bytes(b'?' + path.read_bytes()[1:])
    with pytest.raises(UserError, match=r'404.*save_pretrained\(.FOLDER.\).*dinov2:FOLDER'):
        load_detector('dinov2')


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match=r'pip install -e \.\[dinov2\]'):
        load_detector(f'dinov2:{tmp_path}')


def test_transformers_and_diffusers_are_imported_only_where_they_are_used():
    """Each takes seconds."""
    from helpers import run_python

    users = 'metrics.dinov2, metrics.inception, metrics.detectors, training.networks.encoders'
    run_python(
        '-c',
        f'import sys, {users}, training.interchange.diffusers; '
        'assert not {"transformers", "diffusers"} & {*sys.modules}',
    )
