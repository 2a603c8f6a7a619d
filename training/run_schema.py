"""What the files of a run hold: tables of name, type and range for training states, options and metadata.

Files of older versions lack entries, and those of newer versions have more. So only entries that resuming
needs are required, and entries that no table names are any plain data.
"""

from __future__ import annotations

import torch

from dnnlib.limits import JSON_FILE, MAX_STEPS
from dnnlib.schema import Dict, Flag, Integer, Kind, ListOf, Maybe, Mismatch, OneOf, Real, Record, Row, Text
from dnnlib.text import printable

STEM = r'(network-snapshot|training-state)-\d{6,18}(-\d{1,18})?'  # of a saved file
DIGEST = Text('[0-9a-f]{64}', words='a SHA-256 digest')
NAME = Text(r'[\w.+-]{1,64}', words='a name')
WORDS, FLAG, COUNT, SHARE = Text(), Flag(), Integer(1), Real(0, 1)
NUMBER, AMOUNT, POSITIVE = Real(), Real(0), Real(1e-30)
SIGMA, RHO, STEPS = Real(1e-9, 1e6), Real(0.1, 1e4), Integer(1, MAX_STEPS)

# ----------------------------------------------------------------------------
# Tensors.


class Numbers(Kind):
    """A dense tensor on the CPU of one of the given types, with finite values not below `low`, and of the
    given shape, if any."""

    def __init__(
        self, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None, low: float = -float('inf')
    ):
        self.dtypes, self.shape, self.low = dtypes, shape, low
        self.words = f'a tensor of {" or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)}' + (
            f' of shape {list(shape)}' if shape is not None else ''
        )

    def check(self, value, where):
        if (
            not isinstance(value, torch.Tensor)
            or value.layout is not torch.strided
            or value.is_meta
            or value.dtype not in self.dtypes
            or self.shape not in (None, tuple(value.shape))
        ):
            self.refuse(value, where)
        if value.numel() and value.dtype is not torch.bool:
            least, most = (bound.item() for bound in torch.aminmax(value))  # NaN if there is any
            if not (self.low <= least and -float('inf') < least and most < float('inf')):
                what = f'{least:g} or less' if least < self.low else 'values that are not finite'
                raise Mismatch(f'has {what} in {printable(where, 200)}')


FLOATS = Numbers(torch.float32, torch.float64, torch.float16, torch.bfloat16)
TENSORS = Dict(Text(r'[\w.-]{1,1000}'), Numbers(*FLOATS.dtypes, torch.int64, torch.int32, torch.bool))
COUNTER = Numbers(torch.int64, torch.int32, shape=(), low=0)

# ----------------------------------------------------------------------------
# Numbers of networks, as attributes and constructor arguments. Those not named here are finite.

NETWORK_NUMBERS = dict(
    sigma_data=Real(1e-6, 1e6),
    sigma_min=Real(0, 1e6),
    sigma_max=Real(1e-9, float('inf')),
    beta_d=Real(1e-6, 1e6),
    beta_min=Real(0, 1e6),
    M=Integer(1, 10_000),
    epsilon_t=Real(0, 1),
    epsilon_s=Real(0, 1),
    boundary=Real(0, 1e6),
    switch=SIGMA,
)

# ----------------------------------------------------------------------------
# The configuration of a run, as in training_options.json and in states.


DATASET = Record(
    dict(
        path=WORDS,
        use_labels=FLAG,
        resolution=COUNT,
        xflip=FLAG,
        cache=FLAG,
        max_size=Maybe(COUNT),
        num_images=COUNT,
        image_shape=ListOf(COUNT, 3, 3),
        label_dim=Integer(0, 1 << 20),
        label_kind=OneOf(('classes', 'vectors')),
        classes=Text(longest=1 << 20),
        digest=DIGEST,
    ),
    required=['path'],
)

# What readers of states need; `recorded.RECORDED` adds every option.
OPTIONS = Record(
    dict(
        objective=NAME,
        teacher=Maybe(WORDS),
        total_nimg=COUNT,
        teacher_digest=Maybe(DIGEST),
        guide=Maybe(WORDS),
        guide_digest=Maybe(DIGEST),
        guidance=Maybe(AMOUNT),
        guidance_interval=Maybe(ListOf(AMOUNT, 2, 2)),
        dataset=DATASET,
        encoder=Maybe(Record({})),
        network=Record(dict(class_name=NAME, kwargs=Record({})), required=['class_name', 'kwargs']),
        sampling=Maybe(Record({})),
        loss=Record({}),
        batch_size=COUNT,
        betas=ListOf(SHARE, 2, 2),
        eps=AMOUNT,
        lr_rampup_nimg=AMOUNT,
        lr_ref_nimg=AMOUNT,
        loss_scaling=Maybe(POSITIVE),
        ema_halflife_nimg=AMOUNT,
        ema_rampup_ratio=Maybe(AMOUNT),
        phema_stds=ListOf(SHARE, 1000),
        seed=Integer(),
        stages=Maybe(ListOf(ListOf(COUNT, 2, 2), 64)),
        run_dir=WORDS,
    ),
    required=[
        'objective',
        'dataset',
        'network',
        'loss',
        'total_nimg',
        'batch_size',
        'betas',
        'seed',
        'ema_halflife_nimg',
        'ema_rampup_ratio',
        'phema_stds',
        'lr_rampup_nimg',
        'lr_ref_nimg',
    ],
)

# ----------------------------------------------------------------------------
# Training states.

PROGRESS = Record(
    dict(
        nimg=Integer(0, 10**15),
        tick=Integer(0, 10**12),
        tick_start_nimg=Integer(0, 10**15),
        due=FLAG,
        begun=FLAG,
        fid=Maybe(NUMBER),
        states=Dict(Text(STEM, words='the name of a saved file'), Maybe(NUMBER)),
        names=Dict(Text(STEM, words='the name of a saved file'), Integer()),
        wandb_id=Maybe(Text(r'[\w-]{1,128}', words='the name of a run at W&B')),
    ),
    required=['nimg', 'tick', 'tick_start_nimg'],
)


class Moments(Kind):
    """State of the optimizer for the vector of all parameters; empty before the first step."""

    words = 'the moments of one vector of parameters'
    fields = Record(
        dict(
            step=Numbers(*FLOATS.dtypes, shape=(), low=0),
            exp_avg=FLOATS,
            exp_avg_sq=Numbers(*FLOATS.dtypes, low=0),
        ),
        required=['step', 'exp_avg', 'exp_avg_sq'],
        others=None,
    )

    def check(self, value, where):
        if not isinstance(value, dict) or not value.keys() <= {0}:
            self.refuse(value, where)
        for moments in value.values():
            self.fields.check(moments, where)


UPDATE = Record(
    dict(
        optimizer=Record(dict(state=Moments()), required=['state']),
        scale=Numbers(*FLOATS.dtypes, shape=(), low=1e-30),
        whole_in_a_row=COUNTER,
        bad_in_a_row=COUNTER,
        bad_steps=COUNTER,
    ),
    required=['optimizer', 'scale', 'whole_in_a_row', 'bad_in_a_row', 'bad_steps'],
)

STATE = Record(
    dict(
        net=TENSORS,
        update=UPDATE,
        auxiliary=Record(dict(net=TENSORS, update=UPDATE), ['net', 'update'], others=None),
        averages=Record(
            dict(ema=TENSORS, phema=Dict(SHARE, TENSORS, 1000), waiting=ListOf(Real(0, 1), 1001)),
            required=['ema', 'phema'],
            others=None,
        ),
        loss=Record(dict(target=TENSORS, per_image=FLOATS), others=Kind()),
        progress=PROGRESS,
        stats=ListOf(Row((ListOf(Text(longest=200)), Numbers(torch.float64)))),
        rng=ListOf(
            Record(dict(cpu=Numbers(torch.uint8), cuda=Numbers(torch.uint8)), ['cpu'], others=None),
            longest=100_000,
        ),
        options=Text(longest=JSON_FILE),
    ),
    required=['net', 'update', 'averages', 'loss', 'progress', 'stats', 'rng', 'options'],
    others=Kind(),
)

# ----------------------------------------------------------------------------
# Metadata of snapshots.

METADATA = Record(
    dict(
        objective=NAME,
        kimg=AMOUNT,
        nimg=Integer(),
        seed=Integer(),
        S=STEPS,
        steps=ListOf(STEPS, MAX_STEPS, 1),
        sigma_min=Real(0, 1e6),
        sigma_max=Real(1e-9, float('inf')),
        rho=RHO,
        student_grid=OneOf(('edm', 'full')),
        sigma_grid=OneOf(('karras', 'cosine')),
        sigma_data=Real(1e-6, 1e6),
        num_timesteps=Integer(2, 1_000_000),
        clip_denoised=FLAG,
        sigmas=ListOf(Real(0, 1e6), MAX_STEPS + 1, 2),
        solver=NAME,
        label_kind=OneOf(('classes', 'vectors')),
        classes=Text(longest=1 << 20),
        label_dropout=SHARE,
        guide=WORDS,
        guide_digest=DIGEST,
        guidance=AMOUNT,
        guidance_interval=ListOf(AMOUNT, 2, 2),
        encoder=Kind(),
        ema=NAME,
        ema_halflife_kimg=AMOUNT,
        ema_std=SHARE,
        fid=Maybe(Real(nan=True)),
        digest=DIGEST,
    ),
    others=Kind(),  # which readers have found to be plain
)
