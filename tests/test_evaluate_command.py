"""Evaluation from a run's folder alone: the same numbers, other data, several devices."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import commands
import cv2
import pytest
import tiny

from ssn_jax import cli, config as config_lib, metrics, pipeline
from ssn_jax.errors import UserError
from ssn_jax.report import page, text as text_lib

pytestmark = pytest.mark.usefixtures('small_programs')

EVENTS = importlib.util.find_spec('tensorboardX') is not None
SCRIPT = commands.ROOT / 'scripts' / 'evaluate.py'


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    workdir = tiny.fake_run(tmp_path_factory.mktemp('evaluate'))
    tiny.finish(workdir, quiet=True, events=EVENTS)
    return workdir


def main(*arguments):
    cli.evaluate([str(x) for x in arguments])


def printed(text):
    """The metrics in full by name."""
    lines = [line.split() for line in text.splitlines() if '%' in line]
    return {words[0]: float(words[-1]) for words in lines if words[0] in metrics.METRICS}


@pytest.mark.slow
def test_the_metrics_are_those_of_the_run(workdir, tmp_path, capsys):
    results = json.loads((workdir / 'results.json').read_text())
    before = sorted(workdir.rglob('*'))
    main('--workdir', workdir, '--output', tmp_path / 'scores.csv', '--quiet')
    captured = capsys.readouterr()
    assert printed(captured.out) == results['metrics']
    assert f'test FPR {100 * results["decision"]["test_fpr"]:.1f} %' in captured.out
    assert captured.err == '' and sorted(workdir.rglob('*')) == before
    with (tmp_path / 'scores.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    assert [row['file'] for row in rows] == [
        f'nut/test/{kind}/{i:03d}.png' for kind in ('good', 'spot') for i in range(3)
    ]
    threshold = results['decision']['threshold']
    for row in rows:
        called = 'defective' if float(row['score']) >= threshold else 'normal'
        assert row['decision'] == called
        assert row['label'] == str(int(row['defect'] == 'spot'))


@pytest.mark.slow
@pytest.mark.skipif(not EVENTS, reason='tensorboardX is missing')
def test_event_files_and_a_line_that_says_where_everything_is(workdir):
    found = tiny.scalars(workdir / 'tensorboard')
    results = json.loads((workdir / 'results.json').read_text())
    for name, value in results['metrics'].items():
        assert found[f'test/{name}', 1] == pytest.approx(value)
    assert found['train/loss', 1] == 1
    line = text_lib.summary(workdir)
    assert str(workdir) in line and '\n' not in line
    for path in workdir.iterdir():
        assert path.name in line or path.name in ('config.json', 'origin.json', 'log.txt')


@pytest.mark.slow
def test_other_data_on_four_devices(workdir, tmp_path):
    """Data under another name, in a process of 4 devices: the same metrics, but for rounding."""
    results = json.loads((workdir / 'results.json').read_text())
    shutil.copytree(workdir.parent / 'data' / 'nut', tmp_path / 'bolt')
    for file in (tmp_path / 'bolt/test/good').iterdir():
        file.unlink()
    image = cv2.imread(str(workdir.parent / 'data/nut/train/good/000.png'))
    assert cv2.imwrite(str(tmp_path / 'bolt/test/good/0.png'), image)
    done = commands.start(
        *('evaluate', '--workdir', workdir, '--config.eval_batch_size=1'),
        *(f'--config.data.root={tmp_path}', '--config.data.category', 'bolt'),
        cwd=tmp_path,
        XLA_FLAGS='--xla_force_host_platform_device_count=4',
    )
    assert done.end() == 0, done.err
    assert 'mvtec_ad bolt: 4 test images' in done.out
    values = printed(done.out)
    assert list(values) == list(metrics.METRICS) and values != results['metrics']


@pytest.mark.slow
def test_without_test_images(tmp_path, capsys, caplog):
    """The threshold is chosen; a folder of test images alone is measured on afterwards."""
    workdir = tiny.fake_run(tmp_path)
    tiny.write_data(tmp_path / 'data')
    (tmp_path / 'data/nut/test').rename(tmp_path / 'test')
    run = config_lib.from_json(workdir / 'config.json')
    results = pipeline.train_and_evaluate(run, workdir, events=EVENTS)
    assert results == json.loads((workdir / 'results.json').read_text())
    assert results['metrics'] == dict.fromkeys(metrics.METRICS)
    assert set(results['undefined'].values()) == {'there are no test images'}
    assert results['decision']['threshold'] is not None and results['test_images'] == 0
    assert caplog.text.count('nothing can be measured') == 1
    table = text_lib.format_table(results)
    assert len(table.splitlines()) == 3 and 'nothing is measured: there are no test' in table
    page.write_report([workdir], tmp_path / 'report')
    assert (tmp_path / 'report/report.html').exists()
    with pytest.raises(UserError, match='test: holds no images'):
        main('--workdir', workdir)

    shutil.copytree(tmp_path / 'test', tmp_path / 'new/test')
    shutil.copytree(tmp_path / 'data/nut/ground_truth', tmp_path / 'new/masks')
    capsys.readouterr()
    only_test = '--config.data.name=folder', f'--config.data.root={tmp_path / "new"}'
    main('--workdir', workdir, *only_test)
    found = capsys.readouterr().out
    named = '--config.data.normal_test_dir=test/good', '--config.data.defect_dir=test/spot'
    main('--workdir', workdir, only_test[1], *named, '--config.data.mask_dir=masks/spot')
    again = capsys.readouterr().out
    assert printed(found).keys() == set(metrics.METRICS) and printed(again) == printed(found)


def test_a_user_error_is_exit_status_1(tmp_path):
    """Of the script as a shell starts it."""
    done = subprocess.run(
        [sys.executable, SCRIPT, '--workdir', tmp_path],
        env=os.environ | {'PYTHONPATH': str(commands.ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('error: ') and len(done.stderr.splitlines()) == 1
