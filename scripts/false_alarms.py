"""Measures whether a decision keeps the false alarms that it was asked for, on several data sets.

    python scripts/false_alarms.py --sets folder:MVTEC/bottle ksdd2:KSDD --workdir false_alarms

A set is data.name:FOLDER. The normal images of both its splits are split anew, --splits times: 30 %
are tested, with all defects, and the rest is trained on (configs/edge.py). Three thresholds are
chosen for each rate: on out-of-part scores (the default), on the scores of the images that were
trained on, and on a fifth of the images, kept aside by a training of its own (holdout). With
--together '[^_]+' images whose names begin alike, such as those of a roll or a piece, are all
tested or all trained on. With --official the set's own test split is tested instead.

Every training is a command of its own in a folder of its own; the same command goes on with what is
missing. table.md has the rates that were seen, pooled over sets and splits, with their 90 %
intervals (Clopper and Pearson), and the share of defects that were found, set by set. Below, of the
out-of-part thresholds, how far the false alarms of a split lie from what was promised: their mean
square distance, where 1 is what the chance of which images were drawn alone makes (the number is
then beta-binomial), and more is what the retrained head adds. Last, for each split, whether the
drift test tells its normal test images, in the order of their names, from those trained on.
"""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
from scipy import stats

from ssn_jax import decide, decision, drift, files, predictor, run as run_lib, terminal
from ssn_jax.data import images, layouts
from ssn_jax.errors import UserError

RATES = (0.01, 0.05, 0.1)
WAYS = ('out of part', 'trained on', 'holdout')


def main() -> None:
    """Runs what is missing, and writes the table after each training."""
    parser = terminal.Parser('false_alarms', __doc__)
    parser.add_argument('--sets', nargs='+', required=True, metavar='NAME:FOLDER')
    parser.add_argument('--workdir', type=terminal.path, required=True)
    parser.add_argument('--splits', type=int, default=1, help='of each set (%(default)s)')
    parser.add_argument(
        '--together', metavar='PATTERN', help='how names that belong together begin'
    )
    parser.add_argument('--official', action='store_true', help="the sets' own splits")
    parser.add_argument(
        '--fields', nargs='+', default=[], metavar='FIELD=VALUE', help='of all runs'
    )
    arguments = parser.parse_args()
    if arguments.official and (arguments.splits > 1 or arguments.together):
        parser.error('--official splits nothing anew: give it without --splits and --together.')
    for split in range(arguments.splits):
        for one in arguments.sets:
            folder = (
                arguments.workdir
                / pathlib.Path(one).name
                / ('official' if arguments.official else f'split-{split}')
            )
            if not (folder / 'found.json').exists():
                print(f'{one}, split {split}', flush=True)
                link(one, folder, split, arguments.together, arguments.official)
                files.write(folder / 'found.json', json.dumps(measure(folder, arguments.fields)))
                files.write(arguments.workdir / 'table.md', table(arguments.workdir))


def link(
    one: str, folder: pathlib.Path, seed: int, together: str | None, official: bool = False
) -> None:
    """Lays out a split as links: `all`, and `held`, of which a fifth lies in `kept`."""
    name, root = one.split(':', 1)
    root = pathlib.Path(root).resolve()
    listing = layouts.ksdd2(root) if name == 'ksdd2' else layouts.folder(root)
    good, defects = [], []
    for record in listing.records:
        known = record.defect == layouts.GOOD
        if record.defect is None:
            known = not images.decode_mask(images.read(record.mask), record.file).any()
        (good if known else defects).append(record)
    groups = {}
    for record in good:
        found = re.match(together, record.image.stem) if together else None
        groups.setdefault(found[0] if found else record.file, []).append(record)
    rng = np.random.default_rng(seed)
    order = [list(groups.values())[i] for i in rng.permutation(len(groups))]
    flat = [record for group in order for record in group]
    sizes = np.cumsum([len(group) for group in order])
    tested = sizes[np.searchsorted(sizes, 0.3 * len(flat))]
    if official:
        flat.sort(key=lambda record: record.split != 'test')
        sizes, tested = np.arange(len(flat) + 1), sum(record.split == 'test' for record in flat)
    held = sizes[np.searchsorted(sizes, tested + 0.2 * (len(flat) - tested))]
    for place, trained in (('all', flat[tested:]), ('held', flat[held:])):
        _link(trained, folder / place / 'train' / 'good')
        _link(flat[:tested], folder / place / 'test' / 'good')
        _link([r for r in defects if r.split == 'test'], folder / place / 'test' / 'defect')
    _link(flat[tested:held], folder / 'kept')


def _link(records, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        link = folder / record.file.replace('/', '-')
        if not link.is_symlink():
            link.symlink_to(record.image)


def measure(folder: pathlib.Path, fields: list[str]) -> dict:
    """Scores of normal test images, of defects, and those that each way chooses on."""
    runs = {'all': [], 'held': ['decision.parts=0']}
    found = {}
    for place, more in runs.items():
        flags = {'data.name': 'folder', 'data.root': folder / place}
        flags = [f'--config.{name}={value}' for name, value in flags.items()]
        flags += [f'--config.{field}' for field in (*fields, *more)]
        command = [sys.executable, '-m', 'ssn_jax', 'train', '--config', 'edge', '--quiet', *flags]
        if subprocess.run([*command, '--workdir', str(folder / f'run-{place}')]).returncode:
            raise UserError(f'{folder} ended so: the same command goes on with it.')
        scores = run_lib.read_scores(folder / f'run-{place}')
        test, model = scores.of('test'), predictor.open_run(folder / f'run-{place}')
        tested = {'normal': test.normal().tolist(), 'defects': test.score[test.label > 0].tolist()}
        if place == 'all':
            found['out of part'] = tested | {'chosen on': scores.unseen().score.tolist()}
        other = folder / 'all' / 'train' if place == 'all' else folder / 'kept'
        on = decide.score_folder(model, other, layouts.GOOD).normal().tolist()
        found['trained on' if place == 'all' else 'holdout'] = tested | {'chosen on': on}
    return found


def table(workdir: pathlib.Path) -> str:
    """What there is, in Markdown."""
    found = {}
    for path in sorted(workdir.glob('*/*/found.json')):
        found.setdefault(path.parent.parent.name, []).append(json.loads(path.read_text()))
    lines = [f'| asked | threshold chosen on | FPR seen | {" | ".join(found)} |']
    lines += ['|---|---|---' + '|---' * len(found) + '|']
    for rate in RATES:
        for way in WAYS:
            cells, false, images_of = [], 0, 0
            for splits in found.values():
                rates = [_rates(split[way], rate) for split in splits]
                alarms, normal, missed, defects = np.sum(rates, 0)
                false, images_of = false + alarms, images_of + normal
                hit = f'{100 - 100 * missed / defects:.1f}' if defects else '–'
                cells.append(f'{100 * alarms / normal:.1f} / {hit}')
            low, high = decision.binomial(int(false), int(images_of))
            seen = f'{100 * false / images_of:.1f} [{100 * low:.1f}, {100 * high:.1f}]'
            seen += f' of {images_of:.0f}'
            lines.append(f'| {100 * rate:g} % | {way} | {seen} | {" | ".join(cells)} |')
    outcomes = [split['out of part'] for splits in found.values() for split in splits]
    lines.append('')
    for rate in RATES:
        spread = np.mean([distance(x['chosen on'], x['normal'], rate) ** 2 for x in outcomes])
        lines.append(f'{100 * rate:g} %: {spread:.2f} of {len(outcomes)}')
    lines.append('')
    for name, splits in found.items():
        for split in splits:
            watch = drift.Watch(split['out of part']['chosen on'])
            for score in split['out of part']['normal']:
                watch.update(score)
            lines.append(f'{name}: {watch}')
    return '\n'.join(lines) + '\n'


def distance(known: list[float], new: list[float], rate: float) -> float:
    """How many standard deviations more false alarms were seen than promised.

    Args:
      known: scores (n,) that the threshold is chosen on.
      new: scores (m,) that are judged.
      rate: asked for.

    Returns:
      The distance, in standard deviations of the number that exchangeable scores would give: k of
      the n + m are among the highest, so it is BetaBinomial(m, k, n + 1 - k) distributed.
    """
    chosen = decision.by_rate(np.float32(known), rate)
    k = round(chosen['promised'] * (len(known) + 1))
    expected = stats.betabinom(len(new), k, len(known) + 1 - k)
    seen = int((np.float32(new) >= chosen['threshold']).sum())
    return float((seen - expected.mean()) / expected.std())


def _rates(scores, rate):
    """False alarms, normal images, missed defects, and defects, at a rate that is asked for."""
    chosen_on, normal, defects = (np.float32(scores[x]) for x in ('chosen on', 'normal', 'defects'))
    threshold = decision.by_rate(chosen_on, rate)['threshold']
    return (normal >= threshold).sum(), len(normal), (defects < threshold).sum(), len(defects)


if __name__ == '__main__':
    terminal.guard(main)
