"""The report: its numbers by hand, its page in a parser and in a browser, and what it refuses."""

import base64
from html.parser import HTMLParser
import itertools
import json
import re
import shutil
import statistics
import subprocess

import cv2
import numpy as np
import pytest

from ssn_jax import config as config_lib, metrics, run as run_lib
from ssn_jax.errors import UserError
from ssn_jax.report import figures, markup, page as page_lib, published

BROWSERS = ('chromium-headless-shell', 'chromium', 'chromium-browser', 'google-chrome')
# Puts what a browser makes of a page into its title.
MEASURE = """<script>
onload = () => {
  document.title = JSON.stringify({
    window: innerWidth, page: document.documentElement.scrollWidth, mode: document.compatMode,
    images: [...document.images].map(i => i.complete && i.naturalWidth > 0),
  });
};
</script>"""


def write_run(folder, name='mod1_a', seed=0, auroc=0.6, config=None, embedded=False, **results):
    """A finished run's folder with made-up results; returns it."""
    config = config or config_lib.load(name)
    config.seed = seed
    (folder / 'figures').mkdir(parents=True)
    (folder / 'config.json').write_text(config_lib.to_json(config))
    values = dict.fromkeys(metrics.METRICS, 0.5) | {'I-AUROC': auroc, 'AP-loc': None}
    chosen = {'threshold': 0.0, 'probability': 0.5, 'split': 'train', 'tpr': 1.0, 'fpr': 0.0}
    content = {
        'config': config.name,
        'data': 'synthetic' if embedded else config.data.name,
        'category': config.data.category,
        'embedded': embedded,
        'seed': seed,
        'epochs': config.epochs,
        'backbone': config.backbone.name,
        'weights': 'random (seed 0)' if embedded else 'w.safetensors',
        'metrics': values,
        'undefined': {'AP-loc': 'no masks'},
        'decision': chosen | {'test_tpr': 0.8, 'test_fpr': None},
        'youden_on_test': {'threshold': 0.0, 'tpr': 0.9, 'fpr': 0.1},
        'train_masks': 0,
        'test_images': 6,
        'parameters': 4_560_579,
        'seconds_per_epoch': 2.0 + seed,
        'devices': '1 x cpu',
    }
    (folder / 'results.json').write_text(json.dumps(content | results))
    (folder / 'train.csv').write_text('epoch,loss,seconds\n1,900,2\n2,nan,2\n3,0.5,2\n')
    image = np.zeros((40, 60, 3), np.uint8)
    assert cv2.imwrite(str(folder / 'figures' / 'overlays.png'), image)
    return folder


def write_benchmark(path):
    """What `ssn-jax benchmark --json` prints."""
    ours = {'name': 'mod1_a', 'engine': 'openvino', 'precision': 'float32'}
    ours |= {'image_size': [256, 256], 'params': 4_560_579}
    other = ours | {'name': 'SuperSimpleNet', 'published': {'I-AUROC': 0.984}, 'ms': 1.0}
    rows = [
        other | {'batch': 1},
        ours | {'batch': 1, 'ms': 10.0},
        ours | {'batch': 16, 'ms': 128.0},
        *(ours | {'engine': 'xla', 'batch': batch, 'ms': 1.0} for batch in (1, 16)),
        ours | {'precision': 'bfloat16', 'batch': 1, 'failed': 'no bfloat16'},
        ours | {'precision': 'bfloat16', 'batch': 1, 'ms': 1.0},
    ]
    path.write_text(json.dumps({'machine': 'Some CPU, 2 cores; jax 0.10.1', 'rows': rows}))
    return path


@pytest.fixture
def runs(tmp_path):
    """Runs of three configs, one of them with three seeds and one of it with another field."""
    runs = tmp_path / 'runs'
    for seed, auroc in enumerate((0.5, 0.6, 0.7)):
        write_run(runs / f'a{seed}', seed=seed, auroc=auroc)
    louder = config_lib.default_config()
    louder.noise.std = 0.5
    write_run(runs / 'louder', config=louder, auroc=0.8)
    write_run(runs / 'mod2', 'mod2', auroc=0.7)
    write_run(runs / 'drawn <b>', 'mod1_b', embedded=True, parameters=5_740_227)
    return sorted(runs.iterdir())


@pytest.fixture
def made(runs, tmp_path):
    """The folder of a report of these runs."""
    page_lib.write_report(runs, tmp_path / 'report', write_benchmark(tmp_path / 'bench.json'))
    return tmp_path / 'report'


def message(*arguments):
    """The one line that a report ends with."""
    with pytest.raises(UserError) as caught:
        page_lib.write_report(*arguments)
    text = str(caught.value)
    assert '\n' not in text and 0 < len(text) < 500
    return text


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.sources, self.rows = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == 'tr':
            self.rows.append([])
        if tag == 'img':
            self.sources.append(dict(attributes)['src'])
        if tag not in ('meta', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ('td', 'th'):
            self.rows[-1].append(data)


# --- Numbers --------------------------------------------------------------------------------------


def test_runs_that_differ_in_seed_alone_are_one_row(runs):
    rows = page_lib.make_rows([run_lib.read_run(run) for run in runs])
    assert [(row.label, len(row.runs)) for row in rows] == [
        ('mod1_a · noise.std=0.015', 3),
        ('mod1_a · noise.std=0.5', 1),
        ('mod2', 1),
        ('mod1_b', 1),
    ]
    table = page_lib.metrics_table(rows[:3])
    column = table.head.index('I-AUROC')
    cells = [line[column] for line in table.lines]
    spread = 100 * statistics.stdev((0.5, 0.6, 0.7))
    # No published run has noise of 0.5.
    expected = [f'60.0 ± {spread:.1f}', '51.1', '+8.9', '80.0']
    assert cells == [*expected, '70.0', '67.8', '+2.2']
    assert table.lines[0][:3] == ['mod1_a · noise.std=0.015', '300', '3']
    absent = table.head.index('AP-loc')
    assert {line[absent] for line in table.lines} == {markup.NOTHING}
    assert table.quiet == {1, 2, 5, 6}
    for row in rows[:3]:
        for run in row.runs:
            run.config.epochs = 20
    shorter = page_lib.metrics_table(rows[:3])
    assert [line[:2] for line in shorter.lines if line[0] in ('published', 'difference')] == [
        ['published', '300']
    ] * 2


def test_some_seeds_without_a_value_are_told():
    assert page_lib.mean_and_spread([0.5, None, 0.7], 100) == '60.0 ± 14.1 (2 of 3)'
    assert page_lib.mean_and_spread([None], 100) == markup.NOTHING
    assert page_lib.mean_and_spread([0.25], digits=4) == '0.2500'


@pytest.mark.parametrize(
    'name, change, results, expected',
    [
        ('mod2', {'noise.beta': 0.05}, {}, {'I-AUROC': 0.723}),
        ('mod2', {'noise.beta': 0.2}, {}, None),
        ('mod2', {'name': 'mine', 'seed': 3, 'epochs': 20}, {}, {'I-AUROC': 0.678}),
        ('mod1_a', {'noise.std': 0.1}, {}, None),
        ('mod1_a', {'features.layers': (1, 2, 3)}, {}, None),
        ('mod1_a', {'batch_size': 8}, {}, None),
        ('mixed', {}, {'train_masks': 53}, {'AP-loc': 0.680}),
        ('mixed', {}, {'train_masks': 25}, None),
        ('mod3', {}, {'backbone': 'resnet18'}, None),
        ('supervised', {}, {'train_masks': 246}, {'AP-det': 0.978, 'AP-loc': 0.813}),
        ('baseline', {}, {'category': 'carpet'}, {'I-AUROC': 0.984, 'AUPRO': 0.923}),
        ('baseline', {}, {'category': 'nut'}, None),
        ('baseline', {}, {'data': 'synthetic'}, None),
    ],
)
def test_what_is_published_beside_a_run(name, change, results, expected):
    config = config_lib.load(name)
    config.update_from_flattened_dict(change)
    facts = {'data': config.data.name, 'category': config.data.category, 'train_masks': 0}
    found = published.find(config, facts | {'backbone': config.backbone.name} | results)
    assert (found and found.metrics) == expected


def test_efficiency_and_decision(runs, tmp_path):
    rows = page_lib.make_rows([run_lib.read_run(run) for run in runs])
    benchmark = page_lib.read_benchmark(write_benchmark(tmp_path / 'b.json'))
    lines = page_lib.efficiency_table(rows, benchmark).lines
    assert lines[0][2:] == ['4.6', '3.00 ± 1.00', '1 x cpu', '10.00', '125.00', '–']
    assert lines[1][2:] == ['4.5', '–', '–', '7.78', '398.47', '52.43']
    # Another training of the same network has its speed.
    measured = [page_lib.speed_of(row, benchmark).get('ms') for row in rows]
    assert measured == [10.0, 10.0, 10.0, None]
    assert page_lib.speed_of(rows[0], None) == {}
    # Another backbone under the same name has another speed, and nothing published beside it.
    other = config_lib.default_config()
    other.backbone.name, other.adaptor = 'wide_resnet50_2', 'conv'
    run = write_run(tmp_path / 'other', config=other, parameters=33_719_363)
    lines = page_lib.efficiency_table(page_lib.make_rows([run_lib.read_run(run)]), benchmark).lines
    assert len(lines) == 1 and lines[0][5:] == ['–'] * 3
    smaller = config_lib.default_config()
    smaller.image_size = (64, 64)
    run = write_run(tmp_path / 'smaller', config=smaller)
    lines = page_lib.efficiency_table(page_lib.make_rows([run_lib.read_run(run)]), benchmark).lines
    assert lines[0][5:] == ['–'] * 3
    lines = page_lib.decision_table(rows).lines
    assert lines[2][2:] == ['0.5000', 'train', '80.0', '–', '0.5000', '90.0', '10.0']


def test_recall_of_each_kind_of_defect(tmp_path):
    """Seeds of the same 20 images are 20 images; a run of before has none to show."""
    for seed, found in enumerate((18, 20)):
        recall = {'crack': {'images': 20, 'found': found, 'interval': [0, 1]}}
        recall['<b>spot|'] = {'images': 1, 'found': 1, 'interval': [0.05, 1]}
        write_run(tmp_path / f'a{seed}', seed=seed, recall=recall)
    write_run(tmp_path / 'old', 'mod2')
    folders = sorted(tmp_path.iterdir())
    rows = page_lib.make_rows([run_lib.read_run(run) for run in folders])
    crack, spot = page_lib.recall_table(rows).lines
    # 19 of 20 or more have a chance of 0.05 at a rate of 0.784, 19 or fewer at 0.997.
    assert crack[2:] == ['crack', '20', '95.0 ± 7.1', '78 to 100']
    assert spot[2:] == ['<b>spot|', '1', '100.0 ± 0.0', '5 to 100']
    page_lib.write_report(folders, tmp_path / 'report')
    cells = Page((tmp_path / 'report/report.html').read_text()).rows
    assert any(''.join(row[2:]) == ''.join(crack[2:]) for row in cells)
    page_lib.write_report([folders[-1]], tmp_path / 'other')
    assert 'Recall' not in (tmp_path / 'other/report.md').read_text()


def test_a_sweep_beside_what_is_published(tmp_path):
    expected = []
    for beta, auroc, theirs in ((0.05, 0.6, 0.723), (0.1, 0.5, 0.678), (0.2, 0.4, None)):
        for seed in (0, 1):
            config = config_lib.default_config()
            config.name, config.noise.kind, config.noise.beta = 'mod2', 'learned', beta
            folder = tmp_path / 'sweep' / f'noise.beta={beta}' / f'seed-{seed}'
            write_run(folder, config=config, seed=seed, auroc=auroc + 0.1 * seed)
        expected.append((beta, auroc + 0.05, statistics.stdev((0, 0.1)), theirs))
    runs = [run_lib.read_run(run) for run in run_lib.single_runs(tmp_path / 'sweep')]
    ours, theirs = page_lib.lines_over(page_lib.make_rows(runs), 'noise.beta')
    assert list(ours) == ['mod2']
    for point, expect in zip(ours['mod2'], expected, strict=True):
        assert point == pytest.approx(expect[:3])
    assert theirs == {'mod2': [(0.05, 0.723), (0.1, 0.678)]}
    page_lib.write_report([tmp_path / 'sweep'], tmp_path / 'report')
    assert (tmp_path / 'report' / 'figures' / 'setting-1-1.png').exists()


# --- The page -------------------------------------------------------------------------------------


def test_page_is_whole_and_self_contained(made):
    text = (made / 'report.html').read_text()
    page = Page(text)
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert not tags & {'script', 'link', 'iframe', 'object'}
    assert 'http://' not in text and 'https://' not in text and 'url(' not in text
    # Overlays of four rows, losses of two categories, trade-off and noise.std of one.
    assert len(page.sources) == 8
    for source in page.sources:
        head, _, encoded = source.partition(',')
        assert head == 'data:image/png;base64'
        image = np.frombuffer(base64.b64decode(encoded, validate=True), np.uint8)
        assert cv2.imdecode(image, cv2.IMREAD_COLOR) is not None
    widths = [len(row) for row in page.rows]
    assert set(widths) >= {4 + len(metrics.METRICS)}
    assert any('drawn <b>' in cell for row in page.rows for cell in row)  # Names are no markup.
    assert 'procedurally drawn' in text and 'random weights' in text


def test_markdown_says_the_same_and_finds_its_figures(made):
    text = (made / 'report.md').read_text()
    for line in ('## mvtec_ad screw', '## Efficiency', '51.1', '+8.9', 'drawn \\<b>'):
        assert line in text
    names = [line.split('](')[1].rstrip(')') for line in text.splitlines() if line[:2] == '![']
    assert sorted(names) == sorted(f'figures/{p.name}' for p in (made / 'figures').iterdir())
    for a, b in itertools.pairwise(text.splitlines()):  # A table's lines have equally many cells.
        if a.startswith('|') and b.startswith('|'):
            assert a.count('|') == b.count('|')


def test_a_report_replaces_an_earlier_one(made, runs):
    page_lib.write_report(runs[:1], made)
    assert {p.name for p in made.parent.iterdir()} == {'runs', 'report', 'bench.json'}
    assert '+8.9' not in (made / 'report.md').read_text()
    assert len(list((made / 'figures').iterdir())) == 2


def test_no_run_leads_out_of_the_report(tmp_path):
    """What a run calls itself is text; a folder of its figures may be a link, and is only read."""
    odd = config_lib.default_config()
    odd.name = odd.data.category = odd.data.name = '../../evil'
    run = write_run(tmp_path / 'runs/a', config=odd, weights='/etc/passwd', devices='`<b>|')
    (run / 'figures').rename(tmp_path / 'elsewhere')
    (run / 'figures').symlink_to(tmp_path / 'elsewhere')
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    page_lib.write_report([run], tmp_path / 'report')
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    made = {p.relative_to(tmp_path).parts[0] for p in after.keys() - before.keys()}
    assert made == {'report'} and before == {p: after[p] for p in before}
    assert '../../evil' in (tmp_path / 'report/report.html').read_text()


@pytest.mark.parametrize('losses', [[], [float('nan')], [0.0, -1.0], [1e9, 1e-9]])
def test_new_figures_of_odd_values(losses, tmp_path):
    history = {'epoch': list(range(1, len(losses) + 1)), 'loss': losses}
    figures.compare_losses(tmp_path / 'l.png', {'a': history, 'b': history}, 'title')
    figures.trade_off(tmp_path / 't.png', {'a': (1.0, 0.5)}, {}, 'title', ('cpu', 'gpu'))
    for name in ('l', 't'):
        assert cv2.imread(str(tmp_path / f'{name}.png')) is not None


@pytest.mark.slow
@pytest.mark.parametrize('width', [390, 1400])
def test_page_in_a_browser(width, made, tmp_path):
    """No broken image, nothing wider than the screen, and nothing that the page's policy stops."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:
        pytest.skip(f'no headless browser: install one of {", ".join(BROWSERS)}')
    text = (made / 'report.html').read_text()
    allowed = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / 'measured.html').write_text(allowed.replace('</body>', f'{MEASURE}</body>'))
    options = ['--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path / "p"}']
    options += [f'--window-size={width},800', '--enable-logging=stderr', '--dump-dom']
    done = subprocess.run(
        [program, *options, (tmp_path / 'measured.html').as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert 'CONSOLE' not in done.stderr, done.stderr
    found = json.loads(re.search('<title>(.*?)</title>', done.stdout)[1])
    assert found['window'] == width and found['page'] <= width
    assert found['images'] == [True] * 8 and found['mode'] == 'CSS1Compat'


# --- Bad input ------------------------------------------------------------------------------------


def damaged_log(runs, tmp_path):
    (runs[0] / 'train.csv').write_text('epoch,loss\nx,1\n')
    return runs, 'cannot be read'


def damaged_figure(runs, tmp_path):
    path = runs[0] / 'figures' / 'overlays.png'
    path.write_bytes(path.read_bytes()[:20])
    return runs, 'overlays.png is no readable image'


def one_run_twice(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / 'copy')
    return [*runs, tmp_path / 'copy'], 'the same seed'


def newer_run(runs, tmp_path):
    (runs[0] / 'config.json').write_text('{"version": 1000}')
    return runs, 'newer'


@pytest.mark.parametrize('case', [damaged_log, damaged_figure, one_run_twice, newer_run])
def test_bad_runs_are_one_line_and_leave_nothing(case, runs, tmp_path):
    workdirs, words = case(runs, tmp_path)
    before = set(tmp_path.iterdir())
    assert words in message(workdirs, tmp_path / 'report')
    assert set(tmp_path.iterdir()) == before


def test_a_file_among_the_runs_is_left_out(runs, tmp_path, caplog):
    (tmp_path / 'notes.txt').write_text('')
    page_lib.write_report([tmp_path / 'notes.txt', *runs], tmp_path / 'out')
    assert 'notes.txt is a file' in caplog.text and (tmp_path / 'out/report.md').exists()
    with pytest.raises(UserError, match='no run is among'):
        page_lib.write_report([tmp_path / 'notes.txt'], tmp_path / 'other')


def test_a_run_named_twice_counts_once(runs, tmp_path):
    page_lib.write_report([runs[0], runs[0] / '..' / runs[0].name], tmp_path / 'report')
    assert f'| {runs[0]} |' in (tmp_path / 'report' / 'report.md').read_text()


def test_folders_with_other_files_are_left_alone(made, runs, tmp_path):
    for name in ('thesis.tex', 'figures/photo.jpg'):
        (made / name).write_text('')
        assert name in message(runs, made)
        (made / name).unlink()
    (tmp_path / 'figures').mkdir()
    (tmp_path / 'file').write_text('')
    assert 'holds other files' in message(runs, tmp_path)
    assert 'is a file' in message(runs, tmp_path / 'file')
    assert 'cannot be written' in message(runs, tmp_path / 'file' / 'report')


@pytest.mark.parametrize('text', ['', '{}', '[]', '{"machine": "cpu", "rows": [1]}'])
def test_bad_benchmarks_are_one_line(text, runs, tmp_path):
    path = tmp_path / 'bench.json'
    path.write_text(text)
    assert str(path) in message(runs, tmp_path / 'report', path)
    assert not (tmp_path / 'report').exists()
