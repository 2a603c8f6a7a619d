"""Images, or latents, from a snapshot, one for each seed."""
from __future__ import annotations

import functools
import os

import click

from dnnlib import UserError, cli

STUDENT, CM, TEACHER = 'Students', 'Consistency models (--solver=cm)', 'Teachers (probability-flow ODE)'


def sampling_options(group: str | None = None, teachers: bool = True,
                     steps: str = "a student's own; 1 for a consistency model; 18 for a teacher"):
    """A decorator for commands: the options that say how a network is sampled, as a dict `sampling`. `group` heads the general ones.

    Args:
        teachers: whether those of teachers are among them.
        steps: the default number, in words.
    """
    solvers, what_it_is = ['student', 'cm'], 'what the snapshot is'
    if teachers:
        solvers, what_it_is = ['student', 'euler', 'heun', 'addim', 'cm'], f'{what_it_is}: student, cm for a consistency model, heun for a teacher'
    general, student, cm, teacher = (dict(group=name) for name in (group, STUDENT, CM, TEACHER))
    options = [
        cli.option('--class', 'class_idx', metavar='INT', type=click.IntRange(min=0), **general,
                   help='Class of all images.  [default: random, by seed]'),
        cli.option('--steps', metavar='INT', type=click.IntRange(min=1), **general,
                   help=f'Sampling steps.  [default: {steps}]'),
        cli.option('--solver', type=click.Choice(solvers), **general, help=f'Sampler.  [default: {what_it_is}]'),
        cli.option('--sigma_min', metavar='FLOAT', type=cli.POSITIVE, **general, help='Lowest noise level.  [default: varies]'),
        cli.option('--sigma_max', metavar='FLOAT', type=cli.POSITIVE, **general, help='Highest noise level.  [default: varies]'),
        cli.option('--rho', metavar='FLOAT', type=cli.RHO, **general, help='Exponent of the noise levels.  [default: 7]'),
        cli.option('--force-steps', is_flag=True, **student, help='Sample a student with another number of steps than it was trained for.'),
        cli.option('--taus', metavar='LIST', type=cli.NumberList(float), **cm, help='Noise levels after sigma_max to ask at, as in 2.5,0.8.'),
        cli.option('--mid_t', metavar='FLOAT', type=cli.POSITIVE, **cm, help='A single one, for two steps.'),
        cli.option('--ts', metavar='LIST', type=cli.NumberList(), **cm, help='The same by indices of --timesteps levels, as in 0,22,39.'),
        cli.option('--timesteps', metavar='INT', type=click.IntRange(min=2), **cm,
                   help="Levels that --ts counts in.  [default: the snapshot's; 40]"),
    ]
    options += [] if not teachers else [
        cli.option('--xvar_scale', metavar='FLOAT', type=cli.Number(min=0), **teacher,
                   help='Of --solver=addim: factor on the variance that it adds; 0 is DDIM.  [default: 1]'),
        cli.option('--S_churn', 'S_churn', metavar='FLOAT', type=cli.Number(min=0), **teacher, help='Amount of noise added.  [default: 0]'),
        cli.option('--S_min', 'S_min', metavar='FLOAT', type=cli.Number(min=0), **teacher, help='Lowest noise level with added noise.  [default: 0]'),
        cli.option('--S_max', 'S_max', metavar='FLOAT', type=cli.Number(min=0, infinite=True), **teacher, help='Highest such level.  [default: inf]'),
        cli.option('--S_noise', 'S_noise', metavar='FLOAT', type=cli.Number(), **teacher, help='Scale of the added noise.  [default: 1]'),
        cli.option('--disc', 'discretization', type=click.Choice(['edm', 'vp', 've', 'iddpm', 'cosine']), **teacher,
                   help='Time steps.  [default: edm]'),
        cli.option('--schedule', type=click.Choice(['linear', 'vp', 've']), **teacher, help='Noise schedule sigma(t).  [default: linear]'),
        cli.option('--scaling', type=click.Choice(['none', 'vp']), **teacher, help='Signal scaling s(t).  [default: none]'),
    ]

    def decorate(command):
        @functools.wraps(command)
        def collected(**values):
            return command(sampling={name: values.pop(name) for name in names}, **values)
        for option in reversed(options):
            collected = option(collected)
        names = [parameter.name for parameter in collected.__click_params__[-len(options):]]
        return collected
    return decorate


def sampling_arguments(net, network: str, class_idx: int | None, solver: str | None, steps: int | None, force_steps: bool, **options) -> dict:
    """What `generation.generate_batch` takes, from the values of `sampling_options`. Raises: UserError where they do not fit the network."""
    from training import generation, samplers
    options = {name: value for name, value in options.items() if value is not None}
    solver, steps = samplers.resolve(net, solver, steps, force_steps, **options)
    choose_labels = generation.uniform_labels
    if class_idx is not None:
        if class_idx >= net.label_dim:
            raise UserError(f'--class={class_idx} does not exist: {network} has {net.label_dim or "no"} classes')
        choose_labels = generation.fixed_labels(class_idx)
    return dict(choose_labels=choose_labels, solver=solver, steps=steps, force_steps=force_steps, **options)


@click.command(cls=cli.Command)
@cli.option('--network', metavar='PKL|URL', required=True, help='Snapshot to sample from.')
@cli.option('--outdir', metavar='DIR', required=True, help='Folder for the images, %06d.png after their seeds.')
@cli.option('--seeds', metavar='LIST', type=cli.IntRanges(), default='0-63', show_default=True, help='Seeds, as in 1,2,5-10.')
@cli.option('--subdirs', is_flag=True, help='A folder for every 1000 seeds.')
@cli.option('--latents', 'as_latents', is_flag=True, help='Write what the network draws, undecoded: float32 [C, H, W], %06d.npy.')
@cli.option('--batch', metavar='INT', type=click.IntRange(min=1), default=64, show_default=True, help='Images that a process generates at a time.')
@sampling_options()
def main(network, outdir, seeds, subdirs, as_latents, batch, sampling):
    """Generate images from a snapshot: a student by its own grid, a teacher by solving the probability-flow ODE.

    \b
    A student, 50,000 images on four GPUs:
      torchrun --standalone --nproc_per_node=4 generate.py --network=network-snapshot-157698.pkl \\
          --outdir=samples --seeds=0-49999 --batch=128 --steps=8
    \b
    A teacher by Heun's method with 256 steps, 511 network evaluations:
      python generate.py --network=edm-imagenet-64x64-cond-adm.pkl --outdir=out --steps=256

    An image depends on its seed alone, not on the batch or on the number of processes.
    """
    import tqdm

    from torch_utils import distributed
    from training import encoders, generation, samplers
    from training.checkpoint import load_network
    distributed.init()
    with distributed.main_process_first():
        net = load_network(network, distributed.get_device())
        if not as_latents:  # a VAE that is missing is better missed now
            encoders.encoder_of(net, distributed.get_device())
    arguments = sampling_arguments(net, network, **sampling)
    try:
        os.makedirs(outdir, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={outdir} cannot be made: {error.strerror}') from error

    generate, save, extension = ((generation.generate_latents, generation.save_latents, 'npy') if as_latents else
                                 (generation.generate_batch, generation.save_images, 'png'))
    nfe = samplers.evaluations(arguments['solver'], arguments['steps'])
    what = f'{len(seeds)} {"latents" if as_latents else "images"}'
    distributed.print0(f'Generating {what} to "{outdir}" ({arguments["solver"]}, {nfe} evaluations each)...')
    batches = list(generation.split_batches(seeds, batch, distributed.get_rank(), distributed.get_world_size()))
    for part in tqdm.tqdm(batches, unit='batch', disable=None if distributed.is_main() else True, dynamic_ncols=True):
        drawn = generate(net, part, **arguments)
        folders = [os.path.join(outdir, f'{seed - seed % 1000:06d}') if subdirs else outdir for seed in part]
        save(drawn, [os.path.join(folder, f'{seed:06d}.{extension}') for folder, seed in zip(folders, part)])
    distributed.barrier()
    distributed.print0('Done.')
    distributed.shutdown()


if __name__ == '__main__':
    main()
