"""How soon commands answer: --help imports nothing that is slow."""

import pytest
from helpers import ROOT, run_python

SCRIPTS = sorted(
    path.name
    for path in ROOT.glob('*.py')
    if 'click.command' in path.read_text() or 'cli.Group' in path.read_text()
)
SLOW = {
    'torch',
    'scipy',
    'sklearn',
    'PIL',
    'matplotlib',
    'diffusers',
    'transformers',
    'wandb',
    'tensorboard',
    'requests',
    'safetensors',
    'lmdb',
}
REPORT = (
    'import atexit, runpy, sys; atexit.register(lambda: print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)); '
    'sys.argv = sys.argv[1:]; sys.path.insert(0, ""); runpy.run_path(sys.argv[0], run_name="__main__")'
)


def imported_by(*command):
    """(what the command printed, the packages that it imported)."""
    done = run_python('-c', REPORT, *command)
    return done.stdout, set(done.stderr.split())


def test_all_commands_are_among_them():
    assert {
        'train.py',
        'generate.py',
        'fid.py',
        'edit.py',
        'dataset_tool.py',
        'validation.py',
        'search.py',
        'convert.py',
        'demo.py',
        'compare.py',
        'reconstruct_phema.py',
    } <= set(SCRIPTS)


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_imports_nothing_slow(script):
    """torch alone takes more than a second."""
    printed, packages = imported_by(script, '--help')
    assert printed.startswith('Usage:') and 'click' in packages and not packages & SLOW, packages & SLOW


def test_subcommands_help_imports_nothing_slow():
    for command in (['fid.py', 'calc'], ['fid.py', 'ref'], ['edit.py', 'inpaint'], ['convert.py', 'info']):
        printed, packages = imported_by(*command, '--help')
        assert printed.startswith('Usage:') and not packages & SLOW, (command, packages & SLOW)


def test_objectives_import_nothing_slow(tmp_path):
    """Losses import PyTorch when they are first used."""
    script = tmp_path / 'script.py'
    script.write_text(
        'from training.objectives import OBJECTIVES\nfor each in OBJECTIVES.values():\n    each.module()\n'
    )
    _, packages = imported_by(script)
    assert 'training' in packages and not packages & SLOW, packages & SLOW


def test_a_slow_package_would_show(tmp_path):
    """The report is what it says."""
    (tmp_path / 'slow.py').write_text('import PIL.Image\nprint("Usage: none")')
    assert 'PIL' in imported_by(tmp_path / 'slow.py')[1]
