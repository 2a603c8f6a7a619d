"""Short runs of every objective: what train.py is told. Diffusion and the rounds of `pd` have tests of their own."""

from helpers import FAST, TINY_NETWORK

from training.objectives import OBJECTIVES

# {case: options}; a case is an objective, and after a comma what is special about it.
RUNS = {
    'mcd': [
        '--hop=addim',
        '--sigma_grid=cosine',
        '--keep_ties',
        '--top-mass=0.3',
        '--anchor_hops=4',
        '--T_anneal_steps=6',
    ],
    'mct': [*TINY_NETWORK, '--T_anneal_kimg=0.2'],
    'direct': ['--substeps=2', '--T_end=16', '--student_grid=full'],
    'flowmap': ['--target=mixed', '--steps=1,2', '--T=4', '--reuse=6'],
    'flowmap, solution': ['--target=solution', '--steps=1,2', '--T=4', '--pool=2'],
    'flowmap, hop': ['--target=hop', '--steps=1,2', '--T=4', '--precision=bf16'],
    'flowmap, tangent': ['--target=tangent', '--steps=1,2', '--T=4', '--tangent_warmup=8'],
    'flowmap, difference': [
        '--target=tangent',
        '--steps=1,2',
        '--T=4',
        '--tangent_warmup=8',
        '--jvp=difference',
        '--precision=bf16',
        '--dropout=0.1',
    ],
    'cm-cd': ['--N=6', '--mu0=0.5', '--cm_loss=l2', '--hop=ddim', '--mid_t=0.8'],
    'cm-ct': [*TINY_NETWORK, '--s1=8', '--schedule_steps=20', '--cm_loss=pseudo_huber', '--mid_t=0.8'],
    'ict': [*TINY_NETWORK, '--s0=4', '--s1=16', '--schedule_steps=20', '--mid_t=0.8'],
    'ect': [*TINY_NETWORK, '--stage_steps=8', '--mid_t=0.8', '--q=4'],
    'tcm': ['--stage_steps=8', '--mid_t=0.8', '--boundary_share=0.5'],
    'scd': ['--tangent_warmup=8', '--mid_t=0.8'],
    'scd, two segments': ['--tangent_warmup=8', '--S=2', '--jvp=difference'],
    'scd, half precision': ['--tangent_warmup=8', '--mid_t=0.8', '--precision=bf16', '--dropout=0.1'],
    'sct': [*TINY_NETWORK, '--tangent_warmup=4', '--jvp=difference', '--tangent_weight=prior', '--mid_t=0.8'],
    'mm': ['--aux_lr=1e-3', '--aux_ahead=3', '--grad-clip=10', '--lr_schedule=constant', '--lr_rampup=0'],
    'sid': ['--aux_ahead=1', '--u_max=0.7'],
}
# Further runs of an objective, which are slow together.
SLOW = {
    *('flowmap, solution', 'flowmap, hop', 'flowmap, difference', 'flowmap, tangent'),
    *('scd, half precision', 'scd, two segments'),
}

SHORT = [
    '--cond=1',
    *FAST,
    '--batch=64',
    '--lr=2e-3',
    '--ema=1kimg',
    '--phema=0.1',
    '--dropout=0',
    '--tick=0.32',
    '--dump=1',
    '--snap=1',
]


def arguments(case: str, digits, teacher, consistency_model) -> list[str]:
    """The command line of a short run, but for its folder and its length."""
    objective = case.partition(',')[0]
    kind = OBJECTIVES[objective]
    options = [f'--data={digits}', f'--objective={objective}', *SHORT, *RUNS[case]]
    options += ['--S=2'] if kind.fixed_steps else []
    options += ['--T_start=4', '--T_end=16'] if objective in ('mcd', 'mct') else []
    if kind.teacher:
        options.append(f'--teacher={teacher if kind.teacher == "diffusion" else consistency_model}')
    return options
