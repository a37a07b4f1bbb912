"""Several seeds of one config at once: they share the features, and each is a run of its own.

`steps.make_epoch` maps an epoch over a leading axis of seeds, which `stack` adds and `unstack`
takes away again. One seed has no such axis.
"""

import json
import pathlib
import re
import statistics

from absl import logging
import jax
import jax.numpy as jnp
import ml_collections

from ssn_jax import config as config_lib, files, metrics
from ssn_jax.errors import UserError


def runs_of(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[tuple[ml_collections.ConfigDict, pathlib.Path]]:
    """The config and workdir of each seed's run, as if it were the only one.

    Args:
      config: the user's; `seeds` runs from `seed` on.
      workdir: of the one run, or the folder of their workdirs, seed-N.

    Raises:
      UserError: there are several, and the folder holds something else.
    """
    if config.seeds == 1:
        return [(config, workdir)]
    _check_folder(workdir)
    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        single = config.copy_and_resolve_references()
        single.seed, single.seeds = seed, 1
        runs.append((single, workdir / f'seed-{seed}'))
    return runs


def single_runs(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The workdirs of each seed's run in a folder that `runs_of` made; else the folder itself.

    Of a sweep those that have results: results.md beside them says what failed.
    """
    if (workdir / 'config.json').exists():
        return [workdir]
    swept = [path.parent for path in workdir.glob('*/seed-*/results.json')]
    return sorted(workdir.glob('seed-*')) or sorted(swept) or [workdir]


def _check_folder(workdir: pathlib.Path) -> None:
    if (workdir / 'config.json').exists():
        raise UserError(
            f'{workdir} holds a single run, and --config.seeds makes a folder for each of '
            'several: choose another --workdir.'
        )
    paths = workdir.iterdir() if workdir.is_dir() else []
    names = [p.name for p in paths if not files.is_draft(p)]
    other = [name for name in names if not re.fullmatch(r'seed-\d+|summary\.json', name)]
    if other:
        raise UserError(
            f'{workdir} holds something else than runs of several seeds ({min(other)}): choose '
            'another --workdir.'
        )


def stack(trees: list):
    """Trees of arrays, one of each seed, as one with a leading axis; the tree of one as it is."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *trees)


def unstack(tree, count: int) -> list:
    """The trees of each of `count` seeds."""
    if count == 1:
        return [tree]
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def stack_states(states: list):
    """Train states of the same step as one, which has that step."""
    return stack(states).replace(step=states[0].step)


def unstack_states(state, count: int) -> list:
    """The train states of each of `count` seeds."""
    if count == 1:
        return [state]
    each = unstack(state.replace(step=()), count)
    return [one.replace(step=state.step) for one in each]


def other_results(
    runs: list[tuple[ml_collections.ConfigDict, pathlib.Path]], workdir: pathlib.Path
) -> list[dict]:
    """Results of complete runs in a folder beside those of `runs_of`, but for the seed the same."""
    config, own = config_lib.identity(runs[0][0]) | {'seed': None}, [path for _, path in runs]
    found = []
    for file in workdir.glob('seed-*/results.json'):
        if file.parent in own or not (file.parent / 'config.json').exists():
            continue
        try:
            theirs = config_lib.identity(config_lib.from_json(file.parent / 'config.json'))
            if theirs | {'seed': None} == config:
                results = json.loads(file.read_text())
                summarise([results, results])  # Has it everything?
                found.append(results)
        except (UserError, OSError, ValueError, KeyError, TypeError) as e:
            logging.warning(
                '%s cannot be read (%s): summary.json is without it; its own command, given again, '
                'writes it anew.',
                file,
                ' '.join(str(e).split()),
            )
    return found


def summarise(results: list[dict]) -> dict:
    """What summary.json holds, of several runs' results.

    Returns:
      config, data, category, embedded and epochs of all, `seeds`, and under `metrics` each
      metric's `mean`, `std` (of a sample) and `values` by seed; None where it is undefined.
    """
    results = sorted(results, key=lambda r: r['seed'])
    summary = {k: results[0][k] for k in ('config', 'data', 'category', 'embedded', 'epochs')}
    summary |= {'seeds': [r['seed'] for r in results], 'metrics': {}, 'undefined': {}}
    for name in metrics.METRICS:
        values = [r['metrics'][name] for r in results]
        if None in values:  # What is undefined follows from the test split, for all alike.
            summary['metrics'][name] = None
            summary['undefined'][name] = results[0]['undefined'][name]
            continue
        mean, std = statistics.fmean(values), statistics.stdev(values)
        summary['metrics'][name] = {'mean': mean, 'std': std, 'values': values}
    return summary


def format_summary(summary: dict) -> str:
    """Mean and standard deviation of the seven metrics as a table for the terminal."""
    embedded = ', embedded data' if summary['embedded'] else ''
    seeds = summary['seeds']
    last = seeds[-1]
    shown = f'{seeds[0]} to {last}' if last - seeds[0] < len(seeds) else ', '.join(map(str, seeds))
    lines = [
        f'{summary["config"]} on {summary["data"]} {summary["category"]}{embedded}, '
        f'{summary["epochs"]} epochs, seeds {shown}, mean ± standard deviation'
    ]
    for name, value in summary['metrics'].items():
        text = summary['undefined'].get(name)
        if value is not None:
            text = f'{100 * value["mean"]:6.2f} ± {100 * value["std"]:.2f} %'
        lines.append(f'  {name:12s} {text}')
    return '\n'.join(lines)
