"""LPIPS on random weights: against a plain reimplementation, from every layout of files, and from files that are something else."""

import zipfile

import pytest
import torch
import torch.nn.functional as F

from dnnlib.util import UserError
from metrics import lpips
from metrics.lpips import LPIPS, load

VGG16 = [64, 64, 'pool', 128, 128, 'pool', 256, 256, 256, 'pool', 512, 512, 512, 'pool', 512, 512, 512]
MEASURED = (2, 4, 7, 10, 13)  # after how many convolutions


@pytest.fixture(scope='module')
def weights():
    """Random weights by torchvision's names, and heads by the lpips package's. He et al.'s scale, and heads that double from layer to layer, because
    random features become more and more alike: so all layers matter."""
    generator = torch.Generator().manual_seed(0)
    features, heads, channels, number = {}, {}, 3, 0
    for width in VGG16:
        if width != 'pool':
            scale = (2 / (9 * channels)) ** 0.5
            features[f'features.{number}.weight'] = (
                torch.randn(width, channels, 3, 3, generator=generator) * scale
            )
            features[f'features.{number}.bias'] = torch.randn(width, generator=generator) * 0.1
            channels = width
        number += 1 if width == 'pool' else 2
    for k, width in enumerate((64, 128, 256, 512, 512)):
        heads[f'lin{k}.model.1.weight'] = torch.rand(1, width, 1, 1, generator=generator) * 2**k
    return features, heads


@pytest.fixture(scope='module')
def files(weights, tmp_path_factory):
    """vgg16.pth as torchvision's, with a classifier; heads.pth and whole.pth as the lpips package's."""
    features, heads = weights
    folder, slices = tmp_path_factory.mktemp('lpips'), {}
    for name, tensor in features.items():
        _, number, kind = name.split('.')
        slices[f'net.slice{1 + sum(int(number) > pool for pool in (3, 8, 15, 22))}.{number}.{kind}'] = tensor
    torch.save(
        dict(features, **{'classifier.0.weight': torch.zeros(2, 2), 'classifier.0.bias': torch.zeros(2)}),
        folder / 'vgg16.pth',
    )
    torch.save(heads, folder / 'heads.pth')
    scaling = {f'scaling_layer.{name}': torch.zeros(1, 3, 1, 1) for name in ('shift', 'scale')}
    twice = {name.replace('lin', 'lins.'): tensor for name, tensor in heads.items()}
    torch.save({**scaling, **slices, **heads, **twice}, folder / 'whole.pth')
    return folder


@pytest.fixture(scope='module')
def network(files):
    return load(f'{files / "vgg16.pth"},{files / "heads.pth"}')


def pictures(count, channels=3, size=16, seed=1):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize('tf32', [pytest.param(False, marks=pytest.mark.slow), True])
def test_tensorfloat_32_is_used_inside_of_lpips_alone_in_both_passes(network, tf32, monkeypatch):
    convolutions, seen = torch.backends.cudnn, []
    monkeypatch.setattr(convolutions, 'allow_tf32', False)
    monkeypatch.setattr(network, 'tf32', tf32)
    remember = lambda *_: seen.append(convolutions.allow_tf32)
    entered = network.features['0'].register_forward_pre_hook(remember)
    left = network.features['0'].register_forward_hook(
        lambda module, args, out: [out.register_hook(remember)][1:] or None
    )
    x = pictures(2, size=32).requires_grad_()
    images = x * 1
    images.register_hook(remember)
    distance = network(images, pictures(2, size=32, seed=2).requires_grad_())
    assert convolutions.allow_tf32 is False
    distance.sum().backward()
    entered.remove(), left.remove()
    # Two images forward, two first layers backward, then the images.
    assert seen == [tf32] * 4 + [False] and convolutions.allow_tf32 is False
    assert torch.equal(distance.detach(), network(x, pictures(2, size=32, seed=2)).detach())


def plainly(weights, a, b):
    """Zhang et al.'s formula, layer by layer, in the numbering of torchvision's list of modules."""
    features, heads = ({name: tensor.double() for name, tensor in part.items()} for part in weights)
    distance, convolutions, number = 0, 0, 0
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None]
        for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
    )
    a, b = (a.double() - mean) / std, (b.double() - mean) / std
    for width in VGG16:
        if width == 'pool':
            a, b, number = F.max_pool2d(a, 2), F.max_pool2d(b, 2), number + 1
            continue
        a, b = (
            F.conv2d(
                x, features[f'features.{number}.weight'], features[f'features.{number}.bias'], padding=1
            ).relu()
            for x in (a, b)
        )
        convolutions, number = convolutions + 1, number + 2
        if convolutions in MEASURED:
            difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
            head = heads[f'lin{MEASURED.index(convolutions)}.model.1.weight'].flatten()
            distance = distance + torch.einsum('nchw,c->nhw', difference**2, head).mean(dim=(1, 2))
    return distance


# ----------------------------------------------------------------------------
# The distance.


def as_it_is(network):
    """The same distance without a change of size."""
    other = LPIPS(resolution=None)
    other.load_state_dict(network.state_dict())
    return other


def test_it_is_the_published_formula(network, weights):
    """In FP64 the reimplementation, in FP32 ours. Each layer has a share of 2 % at least, so that a mistake in any of them would show."""
    distance, a, b = as_it_is(network), pictures(2), pictures(2, seed=2)
    whole = distance(a, b)
    torch.testing.assert_close(whole.double(), plainly(weights, a, b), rtol=1e-4, atol=0)
    assert whole.shape == (2,) and (distance(a, a) == 0).all()
    for head in distance.heads:
        share = head.weight.clone()
        head.weight.zero_()
        assert (distance(a, b) < 0.98 * whole).all()
        head.weight.copy_(share)


def measured_at(network, images):
    """What `compare` is given for images."""
    seen = []
    network.compare = lambda a, b: seen.extend([a, b])
    network(images, images.flip(0))
    del network.compare
    assert torch.equal(seen[0], seen[1].flip(0))
    return seen[0]


@pytest.mark.parametrize(
    'size, resolution, expected',
    [(32, 224, 224), (255, 224, 224), (256, 224, 256), (300, 224, 300), (32, 64, 64), (32, None, 32)],
)
def test_images_below_256_pixels_are_brought_to_224(size, resolution, expected):
    network, images = lpips.PerceptualDistance(resolution), pictures(2, size=size)
    got = measured_at(network, images)
    assert got.shape == (2, 3, expected, expected)
    torch.testing.assert_close(
        got, F.interpolate(images, size=expected, mode='bilinear') if expected != size else images
    )


def test_oblong_images_are_small_by_their_short_side():
    assert measured_at(lpips.PerceptualDistance(), pictures(2, size=300)[..., :200]).shape == (2, 3, 224, 224)


def test_gray_images_are_repeated_to_color_and_others_refused(network):
    gray = pictures(2, channels=1)
    assert torch.equal(measured_at(network, gray), measured_at(network, gray.repeat(1, 3, 1, 1)))
    with pytest.raises(UserError, match=r'these have 4 channels\. Use --cm_loss=pseudo_huber'):
        network(pictures(1, channels=4), pictures(1, channels=4))


def test_it_computes_in_fp32_and_gradients_flow_to_the_images_alone(network):
    """Against central differences along a random direction, in FP32 and over kinks: to a few percent."""
    distance_of = as_it_is(network)
    a, b, direction = (
        pictures(1).double().requires_grad_(),
        pictures(1, seed=2).double(),
        pictures(1, seed=3).double(),
    )
    distance = distance_of(a, b)
    distance.sum().backward()
    assert distance.dtype == torch.float32 and a.grad.dtype == torch.float64
    step = 1e-3
    with torch.no_grad():
        slope = (distance_of(a + step * direction, b) - distance_of(a - step * direction, b)) / (2 * step)
    assert (a.grad * direction).sum() == pytest.approx(float(slope), rel=0.05)
    assert (
        all(not p.requires_grad and p.grad is None for p in distance_of.parameters())
        and not distance_of.training
    )


def test_gradients_are_finite_where_no_feature_answers():
    """Strongly negative biases: every vector of features is 0, and has no direction."""
    network = LPIPS(resolution=None)
    for convolution in network.features.values():
        convolution.bias.fill_(-1e3)
    a = pictures(1).requires_grad_()
    distance = network(a, pictures(1, seed=2))
    distance.sum().backward()
    assert distance == 0 and (a.grad == 0).all()


def test_it_never_asks_the_device():
    """Tensors without values, on the `meta` device, raise wherever a value is needed on the host."""
    a = torch.empty(2, 3, 64, 64, device='meta')
    assert LPIPS().to('meta')(a, a).shape == (2,)


# ----------------------------------------------------------------------------
# Files.


def test_every_layout_of_weights_gives_the_same_network(network, files, tmp_path):
    heads = torch.load(files / 'heads.pth', weights_only=True)
    torch.save(
        {name.replace('.1.', '.0.'): tensor for name, tensor in heads.items()},
        tmp_path / 'without-dropout.pth',
    )
    for paths in (
        f'{files / "heads.pth"} , {files / "vgg16.pth"}',
        str(files / 'whole.pth'),
        f'{files / "vgg16.pth"},{tmp_path / "without-dropout.pth"}',
    ):
        other = load(paths).state_dict()
        assert other.keys() == network.state_dict().keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in network.state_dict().items())
    saved = torch.load(files / 'vgg16.pth', weights_only=True)
    assert torch.equal(network.features['28'].weight, saved['features.28.weight']), (
        'the last convolution before relu5_3'
    )


def test_without_files_it_fetches_the_published_ones(monkeypatch, files, network):
    fetched = []

    def local_path(source, pinned=False):
        fetched.append((source, pinned))
        return files / ('vgg16.pth' if 'vgg16' in source else 'heads.pth')

    monkeypatch.setattr(lpips, 'local_path', local_path)
    assert all(torch.equal(a, b) for a, b in zip(load().state_dict().values(), network.state_dict().values()))
    assert [source.rpartition('/')[2] for source, _ in fetched] == ['vgg16-397923af.pth', 'vgg.pth']
    assert all(source.startswith('https://') and pinned for source, pinned in fetched)


class Script(torch.nn.Module):
    """The manner of NVIDIA's vgg16.pt; its vectors are the pixels that it was given."""

    def forward(
        self, images, resize_images: bool = True, return_features: bool = False, return_lpips: bool = False
    ):
        assert return_lpips and not resize_images
        return images.flatten(1)


class Bare(torch.nn.Module):
    def forward(self, images, return_lpips: bool = False):
        return images.mean(dim=[2, 3]) if return_lpips else images


class Features(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)


class Single(torch.nn.Module):
    def forward(self, images, return_lpips: bool = False):
        return images.mean()


class Picky(torch.nn.Module):
    def forward(self, images, return_lpips: bool = False):
        assert images.shape[1] == 1, 'gray images please'
        return images.flatten(1)


def scripted(module, path):
    torch.jit.script(module).save(path)
    return str(path)


def test_a_script_sees_pixels_from_0_to_255_and_its_squared_distance_is_the_distance(tmp_path):
    network, a, b = (
        load(scripted(Script(), tmp_path / 'vgg16.pt')),
        pictures(2, size=256).requires_grad_(),
        pictures(2, size=256, seed=2),
    )
    distance = network(a, b)
    torch.testing.assert_close(distance, (127.5 * (a - b)).square().sum(dim=(1, 2, 3)), rtol=1e-5, atol=0)
    distance.sum().backward()
    torch.testing.assert_close(a.grad, 2 * 127.5**2 * (a - b).detach(), rtol=1e-3, atol=0.1)
    seen = network._embed(torch.tensor([-1.0, 0.0, 1.0]).expand(1, 3, 1, 3))
    assert seen.unique().tolist() == [0, 127.5, 255]


def test_a_script_may_lack_the_argument_that_resizes_and_small_images_are_enlarged_for_it(tmp_path):
    network, images = load(scripted(Bare(), tmp_path / 'bare.pt')), pictures(2, channels=1)
    assert measured_at(network, images).shape == (2, 3, 224, 224) and network(images, images + 1).shape == (
        2,
    )


class Bomb:
    def __reduce__(self):
        return exec, ('raise SystemExit("code ran")',)


def saved(value, path):
    torch.save(value, path)
    return str(path)


def altered_heads(files, path, **changes):
    """heads.pth with another tensor for some names, or without them (None)."""
    heads = {
        **torch.load(files / 'heads.pth', weights_only=True),
        **{f'{name}.model.1.weight': tensor for name, tensor in changes.items()},
    }
    return saved({name: tensor for name, tensor in heads.items() if tensor is not None}, path)


WRONG = {
    'no such file': (lambda files, path: str(path), 'does not exist'),
    'a missing head': (lambda files, path: altered_heads(files, path, lin3=None), r'lacks heads\.3\.weight'),
    'a head of another shape': (
        lambda files, path: altered_heads(files, path, lin1=torch.ones(1, 192, 1, 1)),
        r'another shape at heads\.1\.weight',
    ),
    'a number that is none': (
        lambda files, path: altered_heads(files, path, lin0=torch.full([1, 64, 1, 1], torch.nan)),
        'NaN or infinite',
    ),
    'no tensor': (
        lambda files, path: altered_heads(files, path, lin0='text'),
        r'no plain tensor at heads\.0\.weight',
    ),
    'nothing else': (lambda files, path: saved({}, path), 'has no weights of LPIPS'),
    'a list': (lambda files, path: saved([torch.ones(2)], path), 'has no weights of LPIPS'),
    'another network': (
        lambda files, path: saved({'conv.weight': torch.ones(2)}, path),
        'has no weights of LPIPS',
    ),
    'code': (lambda files, path: saved({'lin0.model.1.weight': Bomb()}, path), 'not a file of plain tensors'),
    'the same file again': (
        lambda files, path: str(files / 'vgg16.pth'),
        r'holds features\.0\.bias, which an earlier file also has',
    ),
    'a script besides': (lambda files, path: scripted(Script(), path), 'Give only this file'),
}


@pytest.mark.parametrize('name', WRONG)
def test_files_that_do_not_make_lpips_are_named_and_what_is_wrong_with_them(files, tmp_path, name):
    prepare, words = WRONG[name]
    path = prepare(files, tmp_path / 'file')
    with pytest.raises(UserError, match=words) as caught:
        load(f'{files / "vgg16.pth"},{path}')
    assert path in str(caught.value) and '\n' not in str(caught.value)


def test_text_is_no_file_of_weights(tmp_path):
    (tmp_path / 'page.html').write_text('<html></html>')
    with pytest.raises(UserError, match=r'page\.html cannot be read'):
        load(tmp_path.joinpath('page.html').as_posix())


@pytest.mark.parametrize(
    'module, words',
    [(Features(), 'no argument return_lpips'), (Single(), r'\[N, D\]'), (Picky(), 'gray images please')],
)
def test_scripts_of_another_kind_are_refused(tmp_path, module, words):
    with pytest.raises(UserError, match=words):
        load(scripted(module, tmp_path / 'script.pt'))


def test_a_script_that_is_cut_off_or_has_no_forward_is_refused(tmp_path):
    path = scripted(Script(), tmp_path / 'script.pt')
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / 'cut.pt', 'w') as cut:
        for entry in whole.namelist():
            if not entry.endswith('data.pkl'):
                cut.writestr(entry, whole.read(entry))
    with pytest.raises(UserError, match='cannot be loaded'):
        load(str(tmp_path / 'cut.pt'))


def test_a_script_from_a_url_is_loaded_from_its_copy_and_named_by_the_url(tmp_path, monkeypatch):
    copies = {
        'https://host/vgg16.pt': scripted(Script(), tmp_path / 'one.pt'),
        'https://host/features.pt': scripted(Features(), tmp_path / 'two.pt'),
    }
    monkeypatch.setattr(lpips, 'local_path', lambda source, pinned=False: copies[source])
    assert isinstance(load('https://host/vgg16.pt'), lpips.ScriptLPIPS)
    with pytest.raises(UserError, match=r'^https://host/features\.pt is a TorchScript file whose forward'):
        load('https://host/features.pt')
