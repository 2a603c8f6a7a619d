"""Runs of every objective that an earlier version made, for tests that they load, resume and sample as they did.

`python tests/old_runs.py golden/runs.tar.xz` made them, at the version that golden/README.md names: a teacher, and for each objective a run of eight
steps with the state after the fourth, its options and statistics, the last snapshot, and images that were sampled from it.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = [
    '--cond=1',
    '--workers=0',
    '--seed=0',
    '--nosubdir',
    '--lr_rampup=0.1',
    '--batch=32',
    '--tick=0.032',
    '--snap=8',
    '--dump=1',
    '--keep=8',
    '--ema=10kimg',
    '--dropout=0.1',
    '--duration=0.000256',
]
NETWORK = ['--arch=adm', '--cbase=4', '--cres=1', '--num_blocks=1', '--attn_resolutions=none']
GRID = ['--S=2', '--T_start=4', '--T_end=8']
# What train.py is told, besides; {teacher} and {ect} are snapshots.
RUNS = dict(
    diffusion=[*NETWORK, '--phema=0.1'],
    mcd=['--consistency=True', '--teacher={teacher}', *GRID],
    mct=['--objective=mct', *NETWORK, *GRID],
    direct=['--objective=direct', '--teacher={teacher}', *GRID],
    **{
        'cm-cd': ['--objective=cm-cd', '--teacher={teacher}', '--cm_loss=l2', '--mu0=0.9'],
        'cm-ct': ['--objective=cm-ct', *NETWORK, '--cm_loss=l2', '--s1=8'],
    },
    ict=['--objective=ict', *NETWORK, '--s0=4', '--s1=8'],
    ect=['--objective=ect', '--transfer={teacher}', *NETWORK],
    tcm=['--objective=tcm', '--teacher={ect}'],
    edm2=[
        '--arch=edm2',
        '--cbase=8',
        '--cres=1',
        '--num_blocks=1',
        '--attn_resolutions=none',
        '--phema=none',
    ],
)
STATE = 'training-state-000000-128.pt'


def train(name: str, data: Path, outdir: Path, folder: Path, *extra: str) -> None:
    """A run of the table, or with `--resume` in `extra` the rest of one; `folder` has the teacher's and the first stage's snapshots."""
    places = {
        other: folder / source / 'network-snapshot-000000-256.pkl'
        for other, source in (('teacher', 'diffusion'), ('ect', 'ect'))
    }
    options = [
        option.format(**places) for option in RUNS[name] if not (extra and option.startswith('--transfer'))
    ]  # a state has the weights
    command = [
        sys.executable,
        '-W',
        'ignore',
        'train.py',
        f'--outdir={outdir}',
        f'--data={data}',
        *COMMON,
        *options,
        *extra,
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def sample(network: Path, dest: Path) -> None:
    """Eight images, as float32 before they are quantized, by the solver that suits the snapshot."""
    import numpy as np
    import torch

    from training import samplers
    from training.checkpoint import load_network

    net = load_network(network)
    shape = net.img_channels, net.img_resolution, net.img_resolution
    latents = torch.randn([8, *shape], generator=torch.Generator().manual_seed(0))
    labels = torch.eye(net.label_dim)[torch.arange(8) % net.label_dim] if net.label_dim else None
    with torch.no_grad():
        np.savez(dest, images=samplers.sample(net, latents, labels).float().numpy())


def main(dest: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, 'runs')
        data = Path(place, 'digits.zip')
        subprocess.run(
            [sys.executable, 'dataset_tool.py', '--source=digits', f'--dest={data}', '--max-images=256'],
            cwd=ROOT,
            check=True,
        )
        for name in RUNS:
            train(name, data, folder / name, folder)
            kept = {STATE, 'training_options.json', 'stats.jsonl', 'network-snapshot-000000-256.pkl'} | {
                path.name for path in (folder / name).glob('network-snapshot-*-0.100.pkl')
            }
            for path in (folder / name).iterdir():
                if path.name not in kept:
                    path.unlink()
            sample(folder / name / 'network-snapshot-000000-256.pkl', folder / name / 'images.npz')
        with tarfile.open(dest, 'w:xz') as archive:
            archive.add(folder, 'runs')


if __name__ == '__main__':
    main(sys.argv[1])
