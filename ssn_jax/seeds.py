"""Several runs that differ in their seed alone, each in a folder of its own."""

import json
import pathlib
import re
import statistics

from absl import logging
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


def other_results(
    runs: list[tuple[ml_collections.ConfigDict, pathlib.Path]], workdir: pathlib.Path, ours: dict
) -> list[dict]:
    """Results of complete runs in a folder beside those of `runs_of`, but for the seed the same.

    Args:
      runs: as of `runs_of`.
      workdir: their folder.
      ours: the results of one of them.
    """
    own = [path for _, path in runs]
    config = config_lib.identity(runs[0][0]) | {'seed': None}
    found = []
    for file in workdir.glob('seed-*/results.json'):
        if file.parent in own or not (file.parent / 'config.json').exists():
            continue
        try:
            theirs = config_lib.identity(config_lib.from_json(file.parent / 'config.json'))
            results = json.loads(file.read_text())
            # Learned from the same, and measured on the same.
            alike = all(results.get(x) == ours.get(x) for x in ('data_sha256', 'backbone_sha256'))
            if theirs | {'seed': None} == config and alike:
                summarise([results, results])  # Has it everything?
                found.append(results)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
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
            reasons = (r['undefined'].get(name) for r in results if r['metrics'][name] is None)
            summary['undefined'][name] = next(reasons)
            continue
        mean, std = statistics.fmean(values), statistics.stdev(values)
        summary['metrics'][name] = {'mean': mean, 'std': std, 'values': values}
    return summary
