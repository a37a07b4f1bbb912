"""A sweep runs what is missing, loses nothing to what fails, and says all of it in one table."""

import csv
import statistics

import commands
import pytest
from test_report import write_run
import tiny

from ssn_jax import config as config_lib, metrics, sweep
from ssn_jax.errors import UserError


def base(**fields):
    config = config_lib.default_config()
    config.update_from_flattened_dict(fields)
    return config


def plan(workdir, *axes, **fields):
    return sweep.plan(base(**fields), sweep.parse_axes(base(), axes), workdir)


# --- What is to be run ----------------------------------------------------------------------------


def test_values_are_of_their_fields_type():
    axes = ('seed=0,2', 'noise.bounded=true,False', 'noise.beta=1,1e-3', 'data.category=a,b c')
    axes += ('optimizer.drops=(0.3,1.0),(0.1, 0.5)',)
    parsed = sweep.parse_axes(base(), axes)
    assert [list(values.values()) for values in parsed.values()] == [
        *([0, 2], [True, False], [1.0, 1e-3], ['a', 'b c'], [(0.3, 1.0), (0.1, 0.5)])
    ]
    assert list(parsed['noise.beta']) == ['1', '1e-3']


def test_rows_are_the_cross_product(tmp_path):
    rows = plan(tmp_path, 'noise.std=0.1,0.2', 'data.root=/a,/b', 'seed=4,3', epochs=7)
    assert [row.label for row in rows] == [
        f'noise.std={std}, data.root={root}' for std in ('0.1', '0.2') for root in ('/a', '/b')
    ]
    assert rows[0].run_of(3) == tmp_path / 'noise.std=0.1,data.root=%2Fa' / 'seed-3'
    for row, std in zip(rows, (0.1, 0.1, 0.2, 0.2), strict=True):
        assert list(row.configs) == [3, 4]
        assert all(seed == config.seed for seed, config in row.configs.items())
        assert {(c.noise.std, c.epochs, c.seeds) for c in row.configs.values()} == {(std, 7, 1)}
    spaced = plan(tmp_path, 'data.root=/d/a b,/d/ab')
    assert len({row.workdir for row in spaced}) == 2
    (row,) = plan(tmp_path, 'seed=5')
    assert (row.label, row.run_of(5)) == ('mod1_a', tmp_path / 'mod1_a' / 'seed-5')
    (row,) = plan(tmp_path, 'noise.std=1', seed=2, seeds=3)
    assert list(row.configs) == [2, 3, 4]


@pytest.mark.parametrize(
    'axes, words',
    [
        ([], 'nothing to sweep'),
        (['noise.beta'], '--sweep noise.beta has no values'),
        (['noise.bta=1'], 'did you mean noise.beta'),
        (['noise=1'], 'noise.beta'),
        (['seeds=3'], '--sweep seed=0,1,2'),
        (['noise.beta=1,a'], "--sweep noise.beta: 'a'"),
        (['noise.beta=1,'], "''"),
        (['seed=1.5'], 'int'),
        (['noise.bounded=2'], 'bool'),
        (['noise.beta=0.1,0.10'], "'0.10' twice"),
        (['noise.beta=1', 'noise.beta=2'], 'given twice'),
        (['epochs=1,2'], '--config.epochs'),
        (['noise.beta=-1'], '--config.noise.beta=-1.0'),
        (['resize=(0,0),(1'], '--config.resize'),
        (['data.root=' + 'a' * 300], 'too long'),
    ],
)
def test_a_wrong_axis_is_one_line(axes, words, tmp_path):
    with pytest.raises(UserError) as caught:
        sweep.plan(base(), sweep.parse_axes(base(), axes, ['epochs']), tmp_path)
    assert words in str(caught.value) and '\n' not in str(caught.value)


def test_seeds_are_set_once():
    with pytest.raises(UserError, match=r'--config\.seeds'):
        sweep.parse_axes(base(), ['seed=0,1'], ['seeds'])


@pytest.mark.parametrize('name', ['thesis.tex', 'noise.std=9/seed-0', 'noise.std=1/seed-7'])
def test_a_folder_of_something_else_is_refused(name, tmp_path):
    for allowed in ('results.csv', 'noise.std=1/summary.json', '.results.csv.7.tmp'):
        (tmp_path / allowed).parent.mkdir(exist_ok=True)
        (tmp_path / allowed).write_text('')
    plan(tmp_path, 'noise.std=1', 'seed=0,1')
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf'{name.split("/seed-0")[0]}.*--workdir'):
        plan(tmp_path, 'noise.std=1', 'seed=0,1')


def test_a_run_of_another_config_is_refused(tmp_path):
    write_run(tmp_path / 'noise.std=1' / 'seed-0', config=base(**{'noise.std': 1.0, 'epochs': 7}))
    with pytest.raises(UserError, match=r'different: epochs; epochs is \d+ there and \d+ here'):
        plan(tmp_path, 'noise.std=1')


# --- Running it -----------------------------------------------------------------------------------


def test_seeds_that_follow_each_other_train_together():
    numbers = [0, 1, 2, 5, 7, 8]
    configs = {seed: base(seed=seed) for seed in numbers}
    assert sweep.groups(configs, numbers) == [[0, 1, 2], [5], [7, 8]]
    apart = {
        seed: base(seed=seed, **{'supervision.kind': 'masks', 'supervision.mask_count': 1})
        for seed in numbers
    }
    assert sweep.groups(apart, numbers) == [[seed] for seed in numbers]


@pytest.mark.parametrize(
    'status, told, reason',
    [
        (0, 'error: no', None),
        (-9, 'epoch: 10%', 'killed by SIGKILL'),
        (1, 'epoch: 10%\rerror: no data.\n', 'error: no data.'),
        (1, 'Traceback\n  x\njax.errors.JaxRuntimeError: OUT: 1\n---\nA note', 'OUT: 1'),
        (3, 'something\nelse\n', 'else'),
        (3, '', 'exit status 3'),
    ],
)
def test_why_a_process_failed(status, told, reason):
    found = sweep.explain(status, told)
    assert found == reason or found.endswith(reason)


@pytest.fixture
def processes(monkeypatch):
    """Instead of processes: what each is called with, and a function that says how it ends."""
    calls = []

    def run_process(row, seeds, arguments):
        calls.append((row.setting['noise.std'], seeds))
        return processes.end(row, seeds)

    monkeypatch.setattr(sweep, '_run_process', run_process)
    processes = type('Processes', (), {'calls': calls})
    return processes


def finish(row, seed, **results):
    """A run's results as its process leaves them."""
    return write_run(row.run_of(seed), config=row.configs[seed], seed=seed, **results)


def tables(workdir, rows, failed):
    text = sweep.write_tables(workdir, rows, failed)
    assert (workdir / 'results.md').read_text() == text
    with (workdir / 'results.csv').open(newline='') as f:
        return list(csv.DictReader(f)), text


def test_what_fails_takes_nothing_with_it(tmp_path, processes):
    rows = plan(tmp_path, 'noise.std=1,2', 'seed=0,1,2')

    def end(row, seeds):
        if row.setting['noise.std'] == '2':
            return 'error: no data.'
        if len(seeds) > 1:  # Out of memory after the first one was measured.
            finish(row, 0, auroc=0.5, train_seconds=4.0)
            return 'killed by SIGKILL'
        if seeds == [2]:
            return 'killed by SIGKILL'
        finish(row, seeds[0], auroc=0.7, train_seconds=8.0)

    processes.end, seen = end, []
    failed = sweep.run(rows, [], lambda failed: seen.append(dict(failed)))
    # A mistake is not tried again, what was killed is, one by one.
    assert processes.calls == [('1', [0, 1, 2]), ('1', [1]), ('1', [2]), ('2', [0, 1, 2])]
    assert failed[rows[0].label, 2] == 'killed by SIGKILL'
    assert [seed for label, seed in failed if label == rows[1].label] == [0, 1, 2]
    assert [len(f) for f in seen] == [1, 4]

    lines, text = tables(tmp_path, rows, failed)
    assert [(r['noise.std'], r['seeds'], r['failed']) for r in lines] == [
        *(('1', '2', '2'), ('2', '0', '0 1 2'))
    ]
    assert {f'{name}{end}' for name in metrics.METRICS for end in ('', ' std')} <= lines[0].keys()
    assert float(lines[0]['I-AUROC']) == pytest.approx(0.6)
    assert float(lines[0]['I-AUROC std']) == pytest.approx(statistics.stdev((0.5, 0.7)))
    assert (lines[0]['epochs'], lines[0]['seconds'], lines[0]['AP-loc']) == ('300', '6.0', '')
    assert lines[1]['I-AUROC'] == ''
    assert '2 of 6 runs are finished, 4 failed' in text
    assert '| noise.std=1 | 300 | 2 | 60.0 ± 14.1 |' in text
    assert 'noise.std=1, seed 2: killed by SIGKILL' in text

    # The same command goes on with what is missing, and with nothing else.
    processes.calls.clear()
    processes.end = lambda row, seeds: [finish(row, seed) for seed in seeds] and None
    assert sweep.run(plan(tmp_path, 'noise.std=1,2', 'seed=0,1,2'), [], seen.append) == {}
    assert processes.calls == [('1', [2]), ('2', [0, 1, 2])]
    processes.calls.clear()
    assert sweep.run(plan(tmp_path, 'noise.std=1,2', 'seed=0,1,2'), [], seen.append) == {}
    assert processes.calls == []


def test_a_run_that_diverged_or_left_nothing_is_told(tmp_path, processes):
    rows = plan(tmp_path, 'noise.std=1')

    def diverge(row, seeds):
        workdir = finish(row, 0, metrics=dict.fromkeys(metrics.METRICS))
        (workdir / 'train.csv').write_text('epoch,loss,seconds\n1,1,2\n2,nan,2\n')

    processes.end = lambda row, seeds: None
    assert list(sweep.run(rows, [], len).values()) == ['it left no results.json']
    processes.end = diverge
    for _ in range(2):  # It is told again, and not trained again.
        failed = sweep.run(rows, [], len)
        assert 'its loss is nan' in failed[rows[0].label, 0]
    assert len(processes.calls) == 2
    lines, _ = tables(tmp_path, rows, failed)
    assert (lines[0]['failed'], lines[0]['I-AUROC']) == ('0', '')


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_with_a_row_that_fails(tmp_path):
    tiny.write_data(tmp_path / 'data')
    tiny.write_weights(tmp_path / 'w.safetensors')
    line = (
        '--config.data.root=data --config.data.cache=cache --config.backbone.weights=w.safetensors'
    )
    line += ' --config.epochs=1 --config.batch_size=4 --config.image_size=(48,48)'
    line += ' --config.decision.parts=0'
    line += ' --config.sparse=False --sweep data.category=bolt,nut --sweep seed=1,0 --workdir s'
    arguments = ['--config', commands.ROOT / 'configs' / 'mod1_a.py', *line.split()]
    environment = {'PYTHONPATH': str(commands.ROOT), 'XDG_CACHE_HOME': str(tmp_path / 'user')}
    environment['JAX_COMPILATION_CACHE_DIR'] = None  # It has one of its own.
    done = commands.start('sweep', *arguments, cwd=tmp_path, **environment)
    assert done.end() == 2, done.err
    assert "bolt, seed 1: error: data: no category 'bolt'" in done.err
    assert '| data.category=nut | 1 | 2 |' in done.out
    assert '2 of its runs failed' in done.out.splitlines()[-1]
    nut = tmp_path / 's' / 'data.category=nut'
    assert {p.name for p in nut.iterdir()} == {'seed-0', 'seed-1', 'summary.json'}
    assert (tmp_path / 'user' / 'ssn_jax' / 'compiled').is_dir()

    before = {p: p.stat().st_mtime_ns for p in nut.rglob('*')}
    done = commands.start('sweep', *arguments, '--quiet', cwd=tmp_path, **environment)
    assert (done.end(), done.out.count('\n')) == (2, 1), done.err
    assert before == {p: p.stat().st_mtime_ns for p in nut.rglob('*')}
    assert (tmp_path / 's' / 'results.csv').read_text().count('\n') == 3
