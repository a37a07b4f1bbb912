"""Trains the cross product of config values, and writes one table of all results.

    python scripts/sweep.py --config configs/mod2.py --workdir sweeps/beta
        --sweep noise.beta=0.5,0.05 --sweep seed=0,1,2

Values are separated by commas; those with commas of their own stand in brackets:
--sweep image_size='(256,256),(320,320)'. All other --config.FIELD=VALUE hold for every run. The
same command goes on with what is missing. Exit status: 0; 2 if runs failed; 1 for a mistake.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from ssn_jax import main, terminal
from ssn_jax.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(main)
flags.DEFINE_multi_string('sweep', [], 'FIELD=VALUE,VALUE,...: a config field and its values.')


def sweep(argv: list[str]) -> int:
    """Runs the sweep of the parsed flags; the exit status."""
    del argv
    # After the flags, so that a wrong one is told at once.
    from ssn_jax import data, sweep as sweep_lib
    from ssn_jax.models import weights

    for name in ('distributed', 'coordinator', 'num_processes', 'process_id'):
        if FLAGS[name].present:
            raise UserError(f'--{name} is for a single run: a sweep has one process at a time.')
    if not FLAGS.workdir:
        raise UserError('no folder for the results: add --workdir sweeps/NAME.')
    terminal.set_up_log(FLAGS.quiet)

    workdir = pathlib.Path(FLAGS.workdir)
    given = config_flags.get_override_values(FLAGS['config'])
    config = FLAGS.config
    axes = sweep_lib.parse_axes(config, FLAGS.sweep, given)
    swept = {field.partition('.')[0] for field in axes}
    if data.is_embedded(config.data) and not swept & {'data', 'backbone'}:  # As each run does it.
        config = weights.with_trained_backbone(config, quiet=True)
    rows = sweep_lib.plan(config, axes, workdir)
    arguments = [f'--config={config_flags.get_config_filename(FLAGS["config"])}']
    arguments += [f'--config.{field}={value}' for field, value in given.items() if field != 'seeds']
    arguments += [f'--{name}' for name in ('quiet', 'tensorboard') if FLAGS[name].value]

    def write_tables(failed):
        return sweep_lib.write_tables(workdir, rows, failed)

    failed = sweep_lib.run(rows, arguments, write_tables)
    if not FLAGS.quiet:
        print(write_tables(failed))
    lost = f'; {len(failed)} of its runs failed' if failed else ''
    print(f'The tables are in {workdir}: results.csv, results.md{lost}.')
    return 2 if failed else 0


if __name__ == '__main__':
    main.cli(sweep)
