"""`python -m experiments.guided_digits`: its measure of classes, and that all of it runs."""

import json

import numpy as np
import pytest
import torch
from helpers import assert_one_clear_error, invoke

from experiments import guided_digits
from metrics.small_detectors import Classifier


def test_accuracy_is_the_share_of_images_that_are_taken_for_their_class(tmp_path):
    torch.manual_seed(0)
    network, images = Classifier(1, 10), np.random.default_rng(0).integers(0, 255, [20, 8, 8, 1], np.uint8)
    torch.jit.script(network.eval()).save(tmp_path / 'classifier.pt')
    with torch.no_grad():
        features = network(torch.from_numpy(images).permute(0, 3, 1, 2))
        classes = network.out(features).argmax(dim=1).numpy()
    classes[:5] = (classes[:5] + 1) % 10
    np.savez(tmp_path / 'images.npz', arr_0=images, arr_1=classes)
    assert guided_digits.accuracy(tmp_path / 'images.npz', tmp_path / 'classifier.pt') == 0.75


@pytest.mark.slow
def test_everything_runs_and_is_not_done_twice(tmp_path, forked_commands):
    """As little training as there can be; the numbers mean nothing."""
    out = f'--outdir={tmp_path / "out"}'
    done = invoke(guided_digits.main, out, '--scale=0.001')
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / 'out/results.json').read_text())
    assert [(row['model'], row['nfe']) for row in rows] == [
        ('teacher', 31),
        ('teacher, guided', 62),
        ('mcd-8', 8),
        ('mcd-8, guided', 8),
        ('direct-8', 8),
        ('direct-8, guided', 8),
    ]
    commands = (tmp_path / 'out/commands.txt').read_text()
    again = invoke(guided_digits.main, out, '--scale=0.001')
    assert again.exit_code == 0 and (tmp_path / 'out/commands.txt').read_text() == commands
    assert_one_clear_error(invoke(guided_digits.main, out, '--guidance=3'), 'another folder', status=2)
