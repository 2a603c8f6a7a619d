"""Two-time students and losses by the network's derivative, run in other ways: on two processes, with the optimizer
divided, in half precision, compiled; each with an evaluation of all averages at the end."""

import functools

import pytest
import torch
from helpers import invoke, lines, run, run_ranks
from objective_runs import RUNS, arguments

import train

STEPS = 5
CASES = [case for case in RUNS if case.startswith(('flowmap', 'scd', 'sct'))]
COMPILED = ['flowmap, difference', 'scd, two segments', 'sct', 'scd']  # the last one by forward mode


def marked(cases, fast):
    return [case if case == fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture
def short_run(digits, teacher, consistency_model, rulers, tmp_path):
    """A function that trains in a folder of the given name, in FP32 unless told, and evaluates.

    It returns losses, step by step, and distances, {average: FID}.
    """

    def short_run(name, case, *extra, start=run):
        options = [
            f'--outdir={tmp_path / name}',
            *arguments(case, digits, teacher, consistency_model),
            f'--duration={STEPS * 64e-6}',
            '--tick=0.064',
            '--snap=0',
            '--dump=0',
            '--precision=fp32',
            '--val=1',
            f'--val_ref={rulers / "pca.npz"}',
            f'--val_detector={rulers / "pca.pt"}',
            '--val_num=64',
            '--val_batch=32',
            '--val_emas=all',
            *extra,
        ]
        start('train.py', *options)
        loss = f'Loss/{case.partition(",")[0]}'
        losses = [tick[loss]['mean'] for tick in lines(tmp_path / name / 'stats.jsonl')]
        distances = {line['ema']: line['fid'] for line in lines(tmp_path / name / 'metrics-val.jsonl')}
        assert len(losses) == STEPS and distances.keys() == {'ema', 'phema-0.100'}
        return losses, distances

    return short_run


@pytest.mark.parametrize('case', marked(CASES, fast='flowmap'))
def test_two_processes_and_a_divided_optimizer_come_to_the_same(short_run, case):
    """The same images, noise, levels and trajectories, whoever handles them: FP32 sums in another order. Without dropout,
    whose masks depend on the split."""
    losses, distances = short_run('one', case, '--dropout=0')
    for name, extra in dict(two='--batch-gpu=16', divided='--shard=optimizer').items():
        found, theirs = short_run(name, case, '--dropout=0', extra, start=functools.partial(run_ranks, 2))
        assert found == pytest.approx(losses, rel=1e-3, abs=1e-9), name
        assert theirs == pytest.approx(distances, rel=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_half_precision_trains_alike(short_run, case):
    """BF16 has eight bits, and losses are of differences: to a tenth, or where they are next to nothing to a thousandth of an
    image's."""
    (losses, _), (rounded, _) = short_run('plain', case), short_run('half', case, '--precision=bf16')
    assert losses != rounded and rounded == pytest.approx(losses, rel=0.1, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize('case', COMPILED)
def test_a_compiled_run_is_the_plain_run(short_run, case, monkeypatch):
    """Up to the order of FP32 sums, whose differences the central difference divides by 2e-3. (`test_execution` has compiled
    code itself; here the compiler's graphs are run as they are.)"""

    def in_process(script, *options):
        result = invoke(train.main, *options)
        assert result.exit_code == 0, result.output

    compile_ = torch.nn.Module.compile
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, 'compile', lambda net, **_: compile_(net, backend=backend))
    torch._dynamo.reset()
    losses, distances = short_run('plain', case, start=in_process)
    assert not graphs
    compiled, theirs = short_run('compiled', case, '--compile', start=in_process)
    assert graphs
    assert compiled == pytest.approx(losses, rel=1e-3, abs=1e-6)
    assert theirs == pytest.approx(distances, rel=1e-3)
