"""One page of any number of runs: results beside the published ones, efficiency, figures.

A page is a list of blocks (heading, paragraph, table, figures); `markdown` and `html` are two
ways of writing the same blocks.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import re
import shutil
import statistics

from absl import logging
import cv2

from ssn_jax import config as config_lib, decision, files, metrics, run as run_lib
from ssn_jax.errors import UserError
from ssn_jax.report import figures, markup, published

EXPLANATION = (
    'Metrics are of the last epoch and in percent; with several seeds they are mean ± standard '
    'deviation. Published results stand beside runs of the same config; differences are own minus '
    'published, in percentage points, where both have as many epochs.'
)


# --- Runs and their rows --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone.

    Attributes:
      label: the config's name, and whatever tells the row from others of the same config.
      runs: by seed.
      beside: the published result of the same, if there is one.
      setting: the values that the label tells, by field.
    """

    label: str
    runs: list[run_lib.Run]
    beside: published.Result | None
    setting: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def where(self) -> tuple[str, str]:
        """Data set and category."""
        return self.runs[0].results['data'], self.runs[0].results['category']

    def each(self, value_of: Callable[[dict], float | None]) -> list[float | None]:
        """A value of each run's results, None where a run has none."""
        return [value_of(run.results) for run in self.runs]


def make_rows(runs: Sequence[run_lib.Run]) -> list[Row]:
    """Runs that differ in seed alone, together; ordered by data set, category and config.

    Raises:
      UserError: two runs have the same config and the same seed.
    """
    groups: dict[str, list[run_lib.Run]] = {}
    fields = {}
    for run in runs:
        identity = config_lib.identity(run.config)
        del identity['seed']
        content = [run.results.get(name) for name in ('data_sha256', 'backbone_sha256')]
        key = json.dumps([identity, content], sort_keys=True)
        # Data are told by their content, but people know them by their folder.
        fields.setdefault(key, identity | {'data.root': run.config.data.root})
        for other in groups.setdefault(key, []):
            if other.config.seed == run.config.seed:
                raise UserError(
                    f'{other.workdir} and {run.workdir} have the same config and the same seed: '
                    'name one of them.'
                )
        groups[key].append(run)

    def alike(run):
        return run.results['data'], run.results['category'], run.config.name

    rows = []
    for key, members in groups.items():
        first = members[0]
        others = [fields[k] for k, m in groups.items() if alike(m[0]) == alike(first)]
        setting = {f: v for f, v in fields[key].items() if any(o[f] != v for o in others)}
        label = make_label(first.config.name, setting)
        members.sort(key=lambda run: run.config.seed)
        rows.append(Row(label, members, published.find(first.config, first.results), setting))
    return sorted(rows, key=lambda row: (row.where, row.label))


def make_label(name: str, setting: Mapping[str, object]) -> str:
    """A config's name, and what tells it from others of the same name."""
    return ' · '.join([name, *(f'{field}={value}' for field, value in setting.items())])


def read_benchmark(path: pathlib.Path) -> tuple[str, dict[str, dict]]:
    """The machine and our measurements in float32 by config, of `ssn-jax benchmark --json`."""
    try:
        content, found = json.loads(path.read_text()), {}
        for row in content['rows']:
            if 'published' in row or 'ms' not in row or row['precision'] != 'float32':
                continue
            of = found.setdefault(row['name'], {k: row[k] for k in ('params', 'image_size')})
            if row['batch'] == 1:
                of.setdefault('ms', float(row['ms']))
            elif row['batch'] == 16:
                of.setdefault('images_per_s', 16e3 / float(row['ms']))
        return str(content['machine']), found
    except FileNotFoundError:
        raise UserError(f'no file at {path}: --benchmark takes one.') from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'{path} is no output of ssn-jax benchmark --json: redirect that into a file.'
        ) from None


def speed_of(row: Row, benchmark: tuple[str, dict] | None) -> Mapping:
    """What a benchmark measured of a row's network, {} if it did not.

    Configs that differ in training alone have one network: another's measurement of the same size
    stands in. A run may have changed its config's backbone or image size, so its name is no proof.
    """
    run = row.runs[0]
    ours = run.results['parameters'], list(run.config.image_size)
    measured = benchmark[1] if benchmark else {}
    same = {n: m for n, m in measured.items() if (m['params'], m['image_size']) == ours}
    return same.get(run.config.name) or next(iter(same.values()), {})


# --- Tables ---------------------------------------------------------------------------------------


def mean_and_spread(values: Sequence[float | None], scale: float = 1.0, digits: int = 1) -> str:
    """The mean, from two values on with the sample standard deviation, as text.

    Values that are None are left out, and how many remain is said.
    """
    known = [scale * v for v in values if v is not None]
    if not known:
        return markup.NOTHING
    text = f'{statistics.fmean(known):.{digits}f}'
    if len(known) > 1:
        text += f' ± {statistics.stdev(known):.{digits}f}'
    return text if len(known) == len(values) else f'{text} ({len(known)} of {len(values)})'


def metrics_table(rows: Sequence[Row]) -> markup.Table:
    """The seven metrics in percent, each row with the published ones and the differences."""
    table = markup.Table(['system', 'epochs', 'seeds', *metrics.METRICS, 'seconds of training'])
    for row in rows:
        values = {name: row.each(lambda r, n=name: r['metrics'][n]) for name in metrics.METRICS}
        table.add(
            row.label,
            str(row.runs[0].config.epochs),
            str(len(row.runs)),
            *(mean_and_spread(v, 100) for v in values.values()),
            mean_and_spread(row.each(lambda r: r.get('train_seconds'))),
        )
        if row.beside is None:
            continue
        theirs, differences, epochs = [], [], published.epochs(row.beside)
        alike = row.runs[0].config.epochs == epochs
        for name in metrics.METRICS:
            value, known = row.beside.metrics.get(name), [v for v in values[name] if v is not None]
            both = value is not None and known and alike
            theirs.append(markup.NOTHING if value is None else f'{100 * value:.1f}')
            difference = 100 * (statistics.fmean(known) - value) if both else None
            differences.append(markup.NOTHING if difference is None else f'{difference:+.1f}')
        table.add('published', str(epochs), '', *theirs, '', quiet=True)
        if alike:
            table.add('difference', '', '', *differences, '', quiet=True)
    return table


def decision_table(rows: Sequence[Row]) -> markup.Table:
    """The thresholds and what they do on the test split, in percent."""
    head = ['system', 'category', 'threshold (probability)', 'chosen on', 'test TPR', 'test FPR']
    table = markup.Table([*head, 'Youden on test: threshold', 'TPR', 'FPR'])
    for row in rows:
        chosen = [run.results['decision'] for run in row.runs]
        youden = [run.results.get('youden_on_test', {}) for run in row.runs]
        logits = [y.get('threshold') for y in youden]
        probabilities = [None if x is None else decision.sigmoid(x) for x in logits]
        table.add(
            row.label,
            row.where[1],
            mean_and_spread([c.get('probability') for c in chosen], digits=4),
            chosen[0]['split'],
            *(mean_and_spread([c.get(f'test_{x}') for c in chosen], 100) for x in ('tpr', 'fpr')),
            mean_and_spread(probabilities, digits=4),
            *(mean_and_spread([y.get(x) for y in youden], 100) for x in ('tpr', 'fpr')),
        )
        if row.beside and row.beside.decision:
            d = row.beside.decision
            point = f'{d["probability"]:.4f}', f'{100 * d["tpr"]:.1f}', f'{100 * d["fpr"]:.1f}'
            table.add('published', '', *[markup.NOTHING] * 4, *point, quiet=True)
    return table


def recall_table(rows: Sequence[Row]) -> markup.Table:
    """How many of each kind of defect in the test split are found, in percent.

    Seeds share their test images, so together they say no more of new defects than one: the
    interval is that of the mean number found.
    """
    interval = f'{100 * decision.CONFIDENCE:.0f} % interval'
    table = markup.Table(['system', 'category', 'defect', 'images', 'found', interval])
    for row in rows:
        known = [run.results['recall'] for run in row.runs if run.results.get('recall')]
        for kind, first in known[0].items() if known else ():
            found, images = [of[kind]['found'] for of in known], first['images']
            ends = decision.binomial(round(statistics.fmean(found)), images)
            share, shown = mean_and_spread(found, 100 / images), [f'{100 * x:.0f}' for x in ends]
            table.add(row.label, row.where[1], kind, str(images), share, ' to '.join(shown))
    return table


def efficiency_table(rows: Sequence[Row], benchmark: tuple[str, dict] | None) -> markup.Table:
    """Size and speed of every row; without a benchmark, of training alone."""
    inference = {'ms': 'ms, batch 1', 'images_per_s': 'images/s, batch 16', 'mb': 'MB, batch 1'}
    head = ['system', 'category', 'M parameters', 'seconds an epoch', 'trained on']
    table = markup.Table([*head, *inference.values()])

    def speed(of: Mapping) -> list[str]:
        return [markup.NOTHING if of.get(k) is None else f'{of[k]:.2f}' for k in inference]

    for row in rows:
        table.add(
            row.label,
            row.where[1],
            f'{row.runs[0].results["parameters"] / 1e6:.1f}',
            mean_and_spread(row.each(lambda r: r.get('seconds_per_epoch')), digits=2),
            row.runs[0].results['devices'] if row.runs[0].history else markup.NOTHING,
            *speed(speed_of(row, benchmark)),
        )
        theirs = published.efficiency(row.runs[0].config)
        if theirs:
            size, device = f'{theirs["params"] / 1e6:.1f}', f'published ({published.DEVICE})'
            nothing = [markup.NOTHING] * 2
            table.add(device, '', size, *nothing, *speed(theirs), quiet=True)
    return table


def runs_table(rows: Sequence[Row]) -> markup.Table:
    """Where everything comes from: a line for every run."""
    table = markup.Table(['run', 'system', 'seed', 'data', 'test images', "backbone's weights"])
    for row in rows:
        for run in row.runs:
            r = run.results
            cells = row.label, str(r['seed']), place(row.where), str(r['test_images'])
            table.add(str(run.workdir), *cells, r['weights'])
    return table


# --- The page -------------------------------------------------------------------------------------


def place(where: tuple[str, str]) -> str:
    """Data set and category in words; a set without categories bears one name twice."""
    return ' '.join(dict.fromkeys(where))


def section_figures(
    folder: pathlib.Path, number: int, rows: Sequence[Row], benchmark: tuple[str, dict] | None
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Draws and copies the figures of one category into `folder`.

    Returns:
      Groups: the heading, and of each figure its file's name and what is seen on it.
    """
    title = place(rows[0].where)
    groups = []
    if benchmark:
        ours, theirs = {}, {}
        for row in rows:
            config, measured = row.runs[0].config, speed_of(row, benchmark)
            known = [v for v in row.each(lambda r: r['metrics']['I-AUROC']) if v is not None]
            if 'ms' in measured and known:
                ours[row.label] = measured['ms'], statistics.fmean(known)
            cost = published.efficiency(config)
            if cost and row.beside and 'I-AUROC' in row.beside.metrics:
                theirs[config.name] = cost['ms'], row.beside.metrics['I-AUROC']
        if ours:
            file = f'trade-off-{number}.png'
            devices = benchmark[0], published.DEVICE
            figures.trade_off(folder / file, ours, theirs, f'{title} · trade-off', devices)
            groups.append(('Trade-off', [(file, f'I-AUROC against latency, {title}')]))

    numbers = {f for row in rows for f, v in row.setting.items() if type(v) in (int, float)}
    pictures = []
    for i, field in enumerate(sorted(numbers), 1):
        ours, theirs = lines_over(rows, field)
        if any(len(points) > 1 for points in ours.values()):
            file = f'setting-{number}-{i}.png'
            figures.over_setting(folder / file, ours, theirs, f'{title} · {field}', field)
            pictures.append((file, f'I-AUROC over {field}, {title}'))
    if pictures:
        groups.append(('Settings', pictures))

    histories = {row.label: row.runs[0].history for row in rows if 'loss' in row.runs[0].history}
    if histories:
        file = f'losses-{number}.png'
        figures.compare_losses(folder / file, histories, f'{title} · loss, first seed')
        groups.append(('Loss', [(file, f'Loss of the first seed of each system, {title}')]))

    for kind, heading in {
        'pixel_pr': 'Precision and recall of the pixels',
        'overlays': 'Best and worst images',
    }.items():
        pictures = []
        for i, row in enumerate(rows, 1):
            run = row.runs[0]
            source = run.workdir / 'figures' / f'{kind}.png'
            if not source.exists():  # A figure that its test split leaves undefined.
                continue
            if cv2.imread(str(source)) is None:
                raise UserError(
                    f'{source} is no readable image: the command of the run, given again, draws '
                    'it anew.'
                )
            file = f'{kind}-{number}-{i}.png'
            shutil.copyfile(source, folder / file)
            pictures.append((file, f'{row.label}, seed {run.config.seed}'))
        if pictures:
            groups.append((heading, pictures))
    return groups


def lines_over(
    rows: Sequence[Row], field: str
) -> tuple[dict[str, list[tuple]], dict[str, list[tuple]]]:
    """I-AUROC over the values of a config field.

    Returns:
      A line for all rows that differ in this field alone: (value, mean, standard deviation or 0)
      in order; and the same of published results for particular values, (value, I-AUROC).
    """
    ours: dict[str, list[tuple]] = {}
    theirs: dict[str, list[tuple]] = {}
    for row in sorted(rows, key=lambda row: row.setting.get(field, 0)):
        known = [v for v in row.each(lambda r: r['metrics']['I-AUROC']) if v is not None]
        if field not in row.setting or not known:
            continue
        name, value = row.runs[0].config.name, row.setting[field]
        others = {f: v for f, v in row.setting.items() if f != field}
        spread = statistics.stdev(known) if len(known) > 1 else 0.0
        point = value, statistics.fmean(known), spread
        ours.setdefault(make_label(name, others), []).append(point)
        if row.beside and field in row.beside.fields and 'I-AUROC' in row.beside.metrics:
            point = value, row.beside.metrics['I-AUROC']
            if point not in theirs.setdefault(name, []):
                theirs[name].append(point)
    return ours, theirs


def make_blocks(
    folder: pathlib.Path, rows: Sequence[Row], benchmark: tuple[str, dict] | None
) -> list[tuple]:
    """The page as blocks (see `markup.markdown`), its figures drawn into `folder`."""
    blocks: list[tuple] = [('heading', 1, 'SuperSimpleNet in JAX: results'), ('text', EXPLANATION)]
    sections: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        sections.setdefault(row.where, []).append(row)
    for number, (where, members) in enumerate(sections.items(), 1):
        blocks.append(('heading', 2, place(where)))
        blocks += [('text', note) for note in notes(members)]
        blocks.append(('table', metrics_table(members)))
        for heading, pictures in section_figures(folder, number, members, benchmark):
            blocks += [('heading', 3, heading), ('pictures', pictures)]
    blocks += [('heading', 2, 'Decision'), ('table', decision_table(rows))]
    recall = recall_table(rows)
    if recall.lines:
        blocks += [('heading', 2, 'Recall of each kind of defect'), ('table', recall)]
    blocks.append(('heading', 2, 'Efficiency'))
    if benchmark:
        text = f'Inference was measured on {benchmark[0]}; published times are of another machine '
        blocks.append(('text', f'{text}({published.DEVICE}).'))
    blocks += [
        ('table', efficiency_table(rows, benchmark)),
        ('heading', 2, 'Runs'),
        ('table', runs_table(rows)),
    ]
    return blocks


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of these rows must know."""
    found = []
    if any(row.runs[0].results['embedded'] for row in rows):
        found.append(
            'These images are the embedded, procedurally drawn ones: the figures say nothing about '
            'a real data set.'
        )
    for row in rows:
        if any(run.results['weights'].startswith('random') for run in row.runs):
            found.append(f'{row.label}: the backbone has random weights.')
        if any((run.workdir / 'imported.json').exists() for run in row.runs):
            found.append(f'{row.label}: imported, not trained here.')
        if row.beside and row.beside.note:
            found.append(f'{row.label}, published: {row.beside.note}.')
    return found


def check_output(output: pathlib.Path) -> None:
    """Raises UserError unless a report can be written: a new folder, or one that holds a report."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f'{output} is a file, no folder: choose another --output.')
    found = {p.relative_to(output).as_posix() for p in output.rglob('*')}
    ours = {'report.md', 'report.html', 'figures'}
    other = sorted(p for p in found - ours if not re.fullmatch(r'figures/[^/]+\.png', p))
    if other or (found and not {'report.md', 'report.html'} <= found):
        name = (other or sorted(found))[0]
        raise UserError(f'{output} exists and holds other files ({name}): choose another --output.')


def write_report(
    workdirs: Sequence[pathlib.Path], output: pathlib.Path, benchmark: pathlib.Path | None = None
) -> None:
    """Writes report.md, report.html and figures/ of runs into `output`, all or nothing.

    Args:
      workdirs: the runs' folders; that of several seeds stands for all of them.
      output: a folder that is new, empty, or holds an earlier report, which is replaced.
      benchmark: output of `ssn-jax benchmark --json`, for the times of inference.

    Raises:
      UserError: a folder is no finished run, or `output` cannot be used.
    """
    check_output(output)
    stray = [path for path in workdirs if path.is_file()]  # runs/* names them too.
    if stray:
        logging.warning('%s is a file, no run: left out.', ', '.join(map(str, stray)))
    folders = [path for path in workdirs if path not in stray]
    if not folders:
        raise UserError('no run is among what was named: name the folders of runs.')
    single = [one for workdir in folders for one in run_lib.single_runs(workdir)]
    distinct = {workdir.resolve(): workdir for workdir in reversed(single)}
    rows = make_rows([run_lib.read_run(workdir) for workdir in distinct.values()])
    measured = read_benchmark(benchmark) if benchmark else None
    with files.writing(output, '--output'), files.replacing(output.absolute()) as draft:
        folder = draft / 'figures'
        folder.mkdir(parents=True)
        blocks = make_blocks(folder, rows, measured)
        files.write(draft / 'report.md', markup.markdown(blocks, folder.name))
        files.write(draft / 'report.html', markup.html(blocks, folder))
        if output.exists():
            shutil.rmtree(output)
