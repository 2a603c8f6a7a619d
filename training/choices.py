"""The names of grids, hops, distances and weights that options choose from.

Imports nothing, so that `train.py --help` reads them without PyTorch.
"""

# Noise levels: the student's grid, and what its nodes are evenly spaced in (`grids.student_grid`).
STUDENT_GRIDS = ('edm', 'full')
SIGMA_GRIDS = ('karras', 'cosine')
SAMPLING_MODES = ('edm', 'vp', 'uniform')  # distribution of edges, `grids.edge_probabilities`

# Steps of a teacher (`consistency_ops.teacher_hop`), and the network evaluations that each takes.
HOP_COST = dict(heun=2, ddim=1, addim=1)
HOPS = tuple(HOP_COST)
# Solvers of a segment by a teacher (`segment_solvers.solve_between`), and the evaluations of each of their steps.
SEGMENT_SOLVER_COST = dict(heun=2, ipndm=1, dpmpp=1)
SEGMENT_SOLVERS = tuple(SEGMENT_SOLVER_COST)

# Where the targets of two-time students come from (`objectives.loss_flowmap`).
FLOW_MAP_TARGETS = ('hop', 'solution', 'mixed', 'tangent')

# Times of moment matching (`objectives.loss_mm`).
MM_TIMES = ('grid', 'uniform')

# Losses of multistep students (`consistency_ops.image_distance`, `consistency_ops.edge_weight`).
DISTANCES = ('pseudo_huber', 'l2_root', 'l2', 'huber')
# fmt: off
WEIGHT_MODES = (
    'sqrt_karras', 'edm', 'karras', 'vlike', 'snr+1', 'snr', 'truncated-snr', 'flat', 'uniform', 'sqrt_gap',
)
# fmt: on

# Weights of pairs of times (`time_schedules.ect_weight`, `time_schedules.tcm_weight`).
ECT_WEIGHTS = ('gap', 'flat', 'inv', 'inv_sum', 'snr', 'karras', 'c_in_squared')
TCM_WEIGHTS = ('flat', 'karras')

# Derivatives of networks (`objectives.tangents.derivative`) and the evaluations that each takes, forward mode as
# measured on a CPU; weights of losses made of them.
JVP_COST = dict(forward=4.5, difference=2)
JVPS = tuple(JVP_COST)
TANGENT_WEIGHTS = ('adaptive', 'prior')


def check_choice(what: str, value: object, known: tuple[str, ...]) -> None:
    """Raises: ValueError unless `value` is one of `known`; `what` names it in the message."""
    if value not in known:
        raise ValueError(f'{what} {value!r} is not one of {", ".join(known)}')
