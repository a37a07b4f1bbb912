"""scripts/gpu.sh in small, on a CPU: it is stopped, goes on, and sums up; and its arithmetic."""

import csv
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import commands
import numpy as np
import pytest
import tiny

from ssn_jax.errors import UserError

SCRIPT = commands.ROOT / 'scripts' / 'gpu.sh'
_spec = importlib.util.spec_from_file_location('gpu', SCRIPT.with_suffix('.py'))
gpu = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu)


def start(folder: pathlib.Path, *arguments) -> subprocess.Popen:
    """Starts the script as a shell does, in a process group of its own."""
    environment = {'PYTHON': sys.executable, 'PYTHONPATH': str(commands.ROOT)}
    environment |= {'JAX_PLATFORMS': 'cpu', 'XDG_CACHE_HOME': str(folder / 'cache')}
    return subprocess.Popen(
        ['bash', SCRIPT, *map(str, arguments)],
        cwd=folder,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit status, and what it has printed to stdout and stderr."""
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def rows(path: pathlib.Path) -> list[list[str]]:
    with path.open(newline='') as file:
        return list(csv.reader(file))


@pytest.mark.slow
def test_it_is_stopped_and_goes_on(tmp_path):
    tiny.write_data(tmp_path / 'data')
    tiny.write_weights(tmp_path / 'w.safetensors')
    shutil.copytree(tmp_path / 'data/nut', tmp_path / 'data/bottle')
    command = ('results', '--trial', '--data', 'data', '--weights', 'w.safetensors')
    only = 'mod1_a-bottle|mod1_a-bottle-float32*'
    command += ('--epochs', 12, '--only', only)
    results = tmp_path / 'results'

    status, out, _ = end(start(tmp_path, *command, '--seconds', 1))
    assert status == 124 and 'goes on with mod1_a-bottle' in out
    assert json.loads((results / 'summary.json').read_text())['runs'] == {}

    process, losses = start(tmp_path, *command), results / 'runs/mod1_a-bottle/train.csv'
    while not losses.exists() or len(rows(losses)) < 2:
        assert process.poll() is None, end(process)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, out, err = end(process)
    assert status == 143 and out.endswith('goes on with mod1_a-bottle.\n'), (out, err)
    assert not (results / 'mod1_a-bottle.out').exists()
    assert json.loads((results / 'summary.json').read_text())['runs'] == {}

    status, out, err = end(start(tmp_path, *command))
    assert status == 0, (out, err, (results / 'log.txt').read_text()[-2000:])
    assert 'Resuming results/runs/mod1_a-bottle after epoch' in (results / 'log.txt').read_text()
    assert [row[0] for row in rows(losses)] == ['epoch', *map(str, range(1, 13))]
    steps = rows(results / 'steps.csv')
    complete = [name for name, status, _ in steps if status == '0']
    assert len(set(complete)) == len(complete) == 3
    assert [row[:2] for row in steps if row[1] != '0'] == [['mod1_a-bottle', '143']]

    summary = json.loads((results / 'summary.json').read_text())
    text = (results / 'summary.txt').read_text()
    assert list(summary['runs']) == ['mod1_a-bottle']
    for name, run in summary['runs'].items():
        expected = json.loads((results / 'runs' / name / 'results.json').read_text())
        assert run['metrics'] == expected['metrics'] and name in text
        for value in expected['metrics'].values():
            assert f'{100 * value:.2f} %' in text
    assert summary['runs']['mod1_a-bottle']['evaluated_again'] == 0

    off = summary['runs']['mod1_a-bottle']['off_cpu']
    assert list(off) == ['float32']
    assert max(off['float32'].values()) < gpu.ROUNDING and 'float32 is kept' in text

    before = {path: path.stat().st_mtime_ns for path in results.glob('*.out')}
    status, out, _ = end(start(tmp_path, *command))
    assert status == 0 and ' ...' not in out
    assert before == {path: path.stat().st_mtime_ns for path in results.glob('*.out')}
    status, _, err = end(start(tmp_path, 'results', '--trial', '--epochs', 7))
    assert status == 1 and 'choose another folder' in err


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['--speed'], 'no flag --speed'),
        (['--epochs'], '--epochs needs a value'),
        (['--epochs', 'many'], '--epochs=many'),
        (['--seconds', '1m'], '--seconds=1m'),
    ],
)
def test_wrong_flags(arguments, said, tmp_path):
    status, _, err = end(start(tmp_path, 'results', *arguments))
    assert status == 1 and err.startswith('error: ') and said in err
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_only_a_trial_begins(tmp_path):
    with pytest.raises(UserError, match=r'no GPU.*--trial'):
        gpu.begin(tmp_path, 'epochs=300 trial=0')
    assert not list(tmp_path.iterdir())


def test_how_far_scores_are_from_the_cpus(tmp_path):
    cpu = np.array([[1.0, 10.0], [3.0, 30.0]])  # Of standard deviations 1 and 10.
    for name, scores in {
        'float32-cpu': cpu,
        'float32': cpu - [[0, 1e-3], [0, 0]],
        'bfloat16': cpu - [[0.2, 0], [0.1, 3]],
    }.items():
        lines = ['score,map_maximum', *(','.join(map(str, row)) for row in scores)]
        (tmp_path / f'a-{name}.csv').write_text('\n'.join(lines))
    found = gpu.off_cpu(tmp_path, 'a')
    assert found['float32'] == pytest.approx({'score': 0, 'map_maximum': 1e-4})
    assert found['bfloat16'] == pytest.approx({'score': 0.2, 'map_maximum': 0.3})
    assert list(found) == ['float32', 'bfloat16'] and gpu.off_cpu(tmp_path, 'b') == {}


def test_metrics_that_are_printed_again(tmp_path):
    printed = (
        'mod1_a, epoch 3\n  I-AUROC  75.00 %   0.75\n  AP-loc  no masks\n  AUPRO 1.00 %   0.0125\n'
    )
    (tmp_path / 'out').write_text(printed)
    metrics = {'I-AUROC': 0.75, 'AP-loc': None, 'AUPRO': 0.01}
    assert gpu.evaluated_again(tmp_path / 'out', metrics) == pytest.approx(0.0025)
    assert gpu.evaluated_again(tmp_path / 'none', metrics) is None


def test_what_a_benchmark_measured_is_listed():
    rows = [{'name': 'auto', 'ms': 2.5}, {'name': 'other', 'failed': 'no such operation'}]
    found = {'machine': {}, 'latency': {'rows': rows}, 'against': 'skipped', 'runs': {}}
    assert gpu.lines(found)[2:] == ['latency:', '  name auto, ms 2.5', 'against: skipped']
