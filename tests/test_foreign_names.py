"""Names in archives and folders that would forge lines or move the cursor are shown escaped, whoever repeats them."""

import zipfile

import pytest
from helpers import FAST, TINY_NETWORK, run
from pictures import png, random_images

EVIL = 'cat\nError: forged\x1b[2J\r\u202e'


def archive(path, images, *others):
    """A zip of images in class folders of evil names, beside others that are no images."""
    with zipfile.ZipFile(path, 'w') as file:
        for i, image in enumerate(images):
            file.writestr(f'{EVIL}{i % 2}/{i}{EVIL}.png', image)
        for name in others:
            file.writestr(name, b'x')
    return path


def assert_clean(done):
    """Its lines are its own, and it obeys no escape sequence."""
    text = done.stdout + done.stderr
    assert '\x1b' not in text and '\r' not in text and '\u202e' not in text and 'Traceback' not in text, text
    assert not any(line.startswith('Error: forged') for line in text.splitlines()), text
    assert '\\x1b[2J' in text, text


@pytest.mark.parametrize('broken', [False, True])
def test_a_conversion_shows_them_escaped(tmp_path, broken):
    images = [png(image) for image in random_images(4)]
    source = archive(
        tmp_path / 'a.zip', [*images[:3], b'no png' if broken else images[3]], f'{EVIL}/notes{EVIL}.xyz'
    )
    done = run('dataset_tool.py', f'--source={source}', f'--dest={tmp_path / "out.zip"}', check=False)
    assert done.returncode == int(broken)
    assert_clean(done)


@pytest.mark.parametrize('script', ['train.py', 'fid.py'])
def test_whoever_reads_such_data_does_too(tmp_path, rulers, script):
    images = [png(image) for image in random_images(4, size=8, channels=1)]
    source = archive(tmp_path / 'a.zip', [*images[:3], b'no png'], f'notes{EVIL}.xyz')
    arguments = dict(
        train=[f'--outdir={tmp_path}', f'--data={source}', *TINY_NETWORK, *FAST, '--dry-run'],
        fid=[
            'ref',
            f'--data={source}',
            f'--dest={tmp_path / "x.npz"}',
            f'--detector={rulers / "pca.pt"}',
            '--skip-bad',
        ],
    )[script.removesuffix('.py')]
    done = run(script, *arguments, check=False)
    assert done.returncode == int(script == 'train.py'), done.stderr
    assert_clean(done)


def test_a_file_that_is_called_so_is_shown_escaped_by_those_that_describe_it(tmp_path, teacher):
    path = tmp_path / f'{EVIL}.pkl'
    path.write_bytes(teacher.read_bytes())
    done = run('convert.py', 'info', path)
    assert_clean(done)
