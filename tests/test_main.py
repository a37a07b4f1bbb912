"""The main job as a user meets it: its command line, what it refuses, and what it leaves."""

import csv
import json
import os
from pathlib import Path
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

from absl import flags
import cv2
from flax import traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from ssn_jax import config as config_lib, main, metrics, weights
from ssn_jax.data import synthetic
from ssn_jax.models import resnet

REPO = Path(__file__).parents[1]
MOD2 = REPO / 'configs' / 'mod2.py'
SIZE = (64, 64)


def command(*arguments, cwd, timeout=60, **env):
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, '-m', 'ssn_jax.main', *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {'PYTHONPATH': str(REPO)} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
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


@pytest.fixture(scope='session')
def real(tmp_path_factory):
    """A tiny category 'nut' in MVTec AD's layout: noise, with a bright square as the defect."""
    root = tmp_path_factory.mktemp('real')
    rng = np.random.default_rng(0)

    def write(name, defective=False):
        image = rng.integers(90, 110, (*SIZE, 3), np.uint8)
        mask = np.zeros(SIZE, np.uint8)
        if defective:
            row, column = rng.integers(0, 40, 2)
            mask[row : row + 20, column : column + 20] = 255
            image[mask > 0] += 100
            _write(root / 'nut/ground_truth/square' / f'{Path(name).stem}_mask.png', mask)
        _write(root / 'nut' / name, image)

    for i in range(6):
        write(f'train/good/{i}.png')
    for i in range(3):
        write(f'test/good/{i}.png')
        write(f'test/square/{i}.png', defective=True)
    return root


def _write(file, image):
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), image)


@pytest.fixture(scope='session')
def resnet18(tmp_path_factory):
    """A safetensors file of random ResNet18 weights under torchvision's names."""
    model = resnet.BACKBONES['resnet18']
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    rng = np.random.default_rng(0)
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(
        jax.eval_shape(model.init, jax.random.key(0), image)
    ).items():
        if path[-1] == 'kernel':
            height, width, inputs, outputs = leaf.shape
            spread = np.sqrt(2 / (height * width * inputs))
            value = rng.normal(0, spread, (outputs, inputs, height, width))
        else:
            value = np.full(leaf.shape, path[-1] in ('scale', 'var'))
        tensors[weights.backbone_name(path)] = value.astype(np.float32)
    file = tmp_path_factory.mktemp('weights') / 'resnet18.safetensors'
    safetensors.numpy.save_file(tensors, file)
    return file


# --- The command line -----------------------------------------------------------------------------

CONFIGS = {
    'syntax.py': 'x = = 1',
    'empty.py': '',
    'number.py': 'def get_config(): return 3',
    'nothing.py': 'def get_config(): pass',
    'raises.py': 'def get_config(): raise ValueError("no\\nway")',
    'imports.py': 'import no_such_module',
}


WRONG_COMMAND_LINES = {  # What is typed, MOD2 standing for its path, and what the error holds.
    '': ['--config configs/mod2.py'],
    '--config.epochs=3': ['--config configs/mod2.py'],
    '--config': ['--config'],
    '--config MOD2 --config.epochs=abc': ['--config.epochs=abc'],
    '--config MOD2 --config.epochs=2.5': ['--config.epochs=2.5'],
    '--config MOD2 --config.noise.beta=x': ['--config.noise.beta=x'],
    '--config MOD2 --config.noise.bounded=maybe': ['--config.noise.bounded=maybe'],
    '--config MOD2 --config.noise=3': ['--config.noise:', 'noise.beta'],
    '--config MOD2 --config.noise.bta=1': ['--config.noise.bta', 'noise.beta'],
    '--config MOD2 --config.qqq 1': ['--config.qqq', 'ssn_jax/config.py'],
    '--config MOD2 --epochs=3': ['epochs', '--config.FIELD=VALUE'],
    '--config MOD2 --workdir': ['--workdir'],
    '--config MOD2 runs/a': ["'runs/a'"],
    '--config.epochs=3 --config MOD2': ['--config.epochs=3'],
    '--config missing.py': ['missing.py'],
    '--config missing.py --config.epochs=3': ['missing.py'],
    '--config .': ["'.'"],
    '--config syntax.py': ['syntax.py', 'line 1'],
    '--config empty.py': ['empty.py', 'get_config'],
    '--config number.py': ['number.py', 'ConfigDict'],
    '--config nothing.py': ['nothing.py', 'ConfigDict'],
    '--config raises.py': ['raises.py', 'way'],
    '--config imports.py --config.epochs=3': ['imports.py', 'no_such_module'],
}


@pytest.mark.parametrize('line', WRONG_COMMAND_LINES)
def test_a_wrong_command_line_is_one_line(line, tmp_path):
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    arguments = line.replace('MOD2', str(MOD2)).split()
    done = command(*arguments, cwd=tmp_path, PYTHONDONTWRITEBYTECODE='1')
    assert (done.returncode, done.stdout) == (1, '')
    check_one_error(done.stderr, *WRONG_COMMAND_LINES[line])
    assert tree(tmp_path) == before


def test_help_needs_no_config(tmp_path):
    done = command('--help', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert '--config configs/mod2.py' in done.stdout and '--workdir' in done.stdout


# --- Bad input ------------------------------------------------------------------------------------


@pytest.fixture
def case(tmp_path, real, resnet18, monkeypatch):
    """A run that would succeed, for a test to break: its config, data and workdir."""
    config = config_lib.default_config()
    config.image_size = SIZE
    config.epochs, config.batch_size = 1, 4
    config.data.category = 'nut'
    config.data.cache = str(tmp_path / 'cache')
    root = tmp_path / 'real'
    shutil.copytree(real, root)
    config.data.root, config.backbone.weights = str(root), str(resnet18)
    return SimpleNamespace(
        config=config, root=root, category=root / 'nut', workdir=tmp_path / 'run', tmp=tmp_path
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


BAD_INPUTS = {}


def bad_input(change):
    """Registers a function that breaks a case and returns what the error must then hold."""
    BAD_INPUTS[change.__name__] = change
    return change


@bad_input
def missing_root(c):
    c.config.data.root = str(c.tmp / 'nowhere')
    return c.tmp / 'nowhere', '--config.data.root'


@bad_input
def empty_root(c):
    shutil.rmtree(c.category)
    return c.root, 'empty', '--config.data.root'


@bad_input
def missing_category(c):
    c.config.data.category = 'bolt'
    return 'bolt', 'nut', '--config.data.category'


@bad_input
def missing_embedded_category(c):
    c.config.data.root = ''
    return 'nut', 'screw'


@bad_input
def no_train_good(c):
    shutil.rmtree(c.category / 'train')
    return (c.category / 'train/good',)


@bad_input
def empty_train_good(c):
    for file in (c.category / 'train/good').iterdir():
        file.unlink()
    return (c.category / 'train/good',)


@bad_input
def truncated_image(c):
    file = c.category / 'train/good/3.png'
    file.write_bytes(file.read_bytes()[:100])
    return ('nut/train/good/3.png',)


@bad_input
def no_image(c):
    (c.category / 'test/square/1.png').write_text('no image')
    return ('nut/test/square/1.png',)


@bad_input
def mask_of_other_size(c):
    file = c.category / 'ground_truth/square/2_mask.png'
    _write(file, np.zeros((64, 60), np.uint8))
    return file, '64x60', '64x64'


@bad_input
def no_mask(c):
    (c.category / 'ground_truth/square/0_mask.png').unlink()
    return c.category / 'test/square/0.png', '0_mask.png'


@bad_input
def unknown_data(c):
    c.config.data.name = 'mvtec'
    return '--config.data.name=mvtec', 'mvtec_ad'


@bad_input
def cache_below_a_file(c):
    c.config.data.cache = str(c.category / 'train/good/0.png')
    return c.config.data.cache, '--config.data.cache'


@bad_input
def workdir_below_a_file(c):
    (c.tmp / 'file').write_text('')
    (c.tmp / 'file').chmod(0o777)
    c.workdir = c.tmp / 'file' / 'run'
    return c.tmp / 'file', '--workdir'


@bad_input
def workdir_is_a_file(c):
    c.workdir.write_text('')
    return c.workdir, '--workdir'


@bad_input
def workdir_of_something_else(c):
    c.workdir.mkdir()
    (c.workdir / 'thesis.tex').write_text('')
    return c.workdir, '--workdir'


@bad_input
def workdir_of_another_config(c):
    other = c.config.copy_and_resolve_references()
    other.noise.std = 0.5
    c.workdir.mkdir()
    (c.workdir / 'config.json').write_text(config_lib.to_json(other))
    return c.workdir, 'std', '--workdir'


@bad_input
def workdir_with_a_broken_config(c):
    c.workdir.mkdir()
    (c.workdir / 'config.json').write_text('{"version": 1,')
    return (c.workdir / 'config.json',)


@bad_input
def workdir_of_a_newer_version(c):
    c.workdir.mkdir()
    (c.workdir / 'config.json').write_text('{"version": 1000}')
    return c.workdir / 'config.json', 'newer'


@bad_input
def missing_weights(c):
    c.config.backbone.weights = str(c.tmp / 'missing.safetensors')
    return c.config.backbone.weights, '--config.backbone.weights'


@bad_input
def truncated_weights(c):
    file = c.tmp / 'truncated.safetensors'
    file.write_bytes(Path(c.config.backbone.weights).read_bytes()[:-1000])
    c.config.backbone.weights = str(file)
    return (file,)


@bad_input
def weights_are_something_else(c):
    c.config.backbone.weights = str(c.category / 'train/good/0.png')
    return (c.config.backbone.weights,)


@bad_input
def weights_of_another_architecture(c):
    c.config.backbone.name = 'wide_resnet50_2'
    return c.config.backbone.weights, 'missing: layer1.0.', '--config.backbone.weights'


@bad_input
def unknown_backbone(c):
    c.config.backbone.name = 'resnet19'
    return 'resnet19', 'resnet18'


def _as_folder(c):
    c.config.data.name, c.config.data.root = 'folder', str(c.category)


@bad_input
def folder_without_train_good(c):
    _as_folder(c)
    (c.category / 'train/good').rename(c.category / 'train/fine')
    return c.category / 'train/good', 'normal images'


@bad_input
def folder_of_loose_images(c):
    c.config.data.name, c.config.data.root = 'folder', str(c.category / 'train/good')
    return c.category / 'train/good/train/good', 'normal images'


@bad_input
def folder_with_duplicate_names(c):
    _as_folder(c)
    _write(c.category / 'train/square/0.png', np.zeros((*SIZE, 3), np.uint8))
    return 'duplicate name', 'train/square/0.png', 'ground_truth/square/0_mask.png'


@bad_input
def folder_with_a_mask_of_other_size(c):
    _as_folder(c)
    _write(c.category / 'train/square/a.png', np.zeros((*SIZE, 3), np.uint8))
    file = c.category / 'ground_truth/square/a_mask.png'
    _write(file, np.ones((60, 64), np.uint8))
    return file, '60x64', '64x64'


@bad_input
def labels_without_a_defect_in_training(c):
    _as_folder(c)
    c.config.supervision.kind = 'labels'
    return 'no defective image', 'train/DEFECT', '--config.supervision.kind'


@bad_input
def masks_without_a_defect_in_training(c):
    c.config.supervision.kind = 'masks'
    return 'no defective image', '--config.supervision.kind'


@bad_input
def more_masks_than_there_are(c):
    _as_folder(c)
    c.config.supervision.update(kind='masks', mask_count=2)
    _write(c.category / 'train/square/a.png', np.zeros((*SIZE, 3), np.uint8))
    return '--config.supervision.mask_count=2', 'only 0'


@bad_input
def everything_held_out(c):
    c.config.decision.holdout = 0.99
    return '--config.decision.holdout=0.99', 'normal'


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('epochs', 0),
        ('system', 'ssn'),
        ('supervision.kind', 'mask'),
        ('supervision.mask_fraction', 1.5),
        ('supervision.mask_fraction', -0.1),
        ('supervision.mask_fraction', float('nan')),
        ('supervision.mask_count', -2),
        ('supervision.dilation', 4),
        ('optimizer.clip_norm', -1.0),
        ('decision.holdout', 1.0),
        ('decision.fpr', 2.0),
        ('resize', (32, 300)),
        ('seed', -1),
        ('image_size', ('a', 'b')),
        ('image_size', (64,)),
        ('noise.beta', float('nan')),
        ('optimizer.drops', ('x',)),
        ('noise.shell', (0.25, 'x')),
    ],
)
def test_a_value_that_no_run_can_have(field, value, case, call, capsys):
    with case.config.ignore_type():
        case.config.update_from_flattened_dict({field: value})
    assert call(case.config, case.workdir) == 1
    check_one_error(capsys.readouterr().err, f'--config.{field}=')
    assert not case.workdir.exists()


@pytest.mark.parametrize('name', BAD_INPUTS)
def test_bad_input_is_one_line_and_leaves_nothing(name, case, call, capsys):
    words = BAD_INPUTS[name](case)
    cache = case.tmp / 'cache'
    before = tree(case.tmp)
    assert call(case.config, case.workdir) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    check_one_error(captured.err, *words)
    after = {p: content for p, content in tree(case.tmp).items() if not p.is_relative_to(cache)}
    assert after == before
    assert not list(cache.glob('*incomplete*'))


def test_unwritable_workdir(case, call, capsys, monkeypatch):
    # Root may write anywhere, so the system's answer is made up.
    monkeypatch.setattr(os, 'access', lambda path, mode: Path(path) != case.tmp)
    assert call(case.config, case.workdir) == 1
    check_one_error(capsys.readouterr().err, case.tmp, 'not writable', '--workdir')
    assert not case.workdir.exists()


def test_real_data_without_weights_is_an_error(case):
    flags_ = [
        *('--config', MOD2, '--config.image_size=(64,64)', '--workdir', case.workdir),
        *(f'--config.data.{x}={case.config.data[x]}' for x in ('root', 'category', 'cache')),
    ]
    done = command(*flags_, cwd=case.tmp, HF_HUB_OFFLINE='1', HF_HOME=str(case.tmp / 'hub'))
    assert done.returncode == 1
    check_one_error(done.stderr, 'timm/resnet18.tv_in1k', '--config.backbone.weights=FILE')
    assert not case.workdir.exists()


def test_a_hub_that_does_not_answer_is_given_up_soon(tmp_path):
    program = (
        'import time; from ssn_jax import weights; start = time.time()\n'
        'try: weights.download("resnet18")\n'
        'except weights.UserError as e: print(time.time() - start)'
    )
    with socket.create_server(('127.0.0.1', 0)) as silent:  # Takes calls and never speaks.
        env = {
            'PYTHONPATH': str(REPO),
            'HF_ENDPOINT': f'http://127.0.0.1:{silent.getsockname()[1]}',
            'HF_HOME': str(tmp_path),
            'HF_HUB_OFFLINE': '0',
        }
        for name in ('http_proxy', 'https_proxy', 'all_proxy'):
            env |= {name: '', name.upper(): ''}
        done = subprocess.run(
            [sys.executable, '-c', program],
            env=os.environ | env,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 15


# --- What a run leaves ----------------------------------------------------------------------------


def check_run(workdir, config, epochs):
    """Checks everything that a finished run leaves; returns its results."""
    assert {p.name for p in workdir.iterdir()} == {
        *('config.json', 'train.csv', 'checkpoints', 'results.json', 'decision.json', 'figures')
    }
    assert config_lib.from_json(workdir / 'config.json') == config
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
        *('--config.batch_size=4', '--workdir', case.workdir, '--config.seed=3'),
        *(f'--config.data.{x}={case.config.data[x]}' for x in ('root', 'category', 'cache')),
        f'--config.backbone.weights={case.config.backbone.weights}',
    ]
    done = command(*arguments, cwd=case.tmp, timeout=300)
    assert done.returncode == 0, done.stderr
    config = case.config.copy_and_resolve_references()
    config.update({'name': 'mod2', 'epochs': 2, 'seed': 3, 'noise': {'kind': 'learned'}})
    results = check_run(case.workdir, config, epochs=2)
    assert (results['data'], results['embedded']) == ('mvtec_ad', False)
    assert results['weights'] == config.backbone.weights

    for name, value in results['metrics'].items():
        assert f'{100 * value:6.2f} %' in next(
            line for line in done.stdout.splitlines() if line.strip().startswith(name)
        )
    assert 'embedded' not in done.stdout + done.stderr
    assert 'loss=' in done.stderr and '2/2' in done.stderr
    for line in done.stderr.splitlines():  # Nothing but our own lines and the progress bar.
        ours = ('Preparing', 'Backbone', '6 images', 'epoch', '\r', 'warning: The loss grew')
        ours += ('warning: The threshold is chosen on 6 normal images',)
        assert line.startswith(ours) or not line

    kept = [case.workdir / name for name in ('train.csv', 'config.json')]
    before = [file.read_bytes() for file in kept]
    checkpoints = tree(case.workdir / 'checkpoints')
    again = command(*arguments, cwd=case.tmp, timeout=300)
    assert again.returncode == 0, again.stderr
    assert 'after epoch 2' in again.stderr and 'loss=' not in again.stderr
    assert check_run(case.workdir, config, epochs=2)['metrics'] == results['metrics']
    assert [file.read_bytes() for file in kept] == before
    assert tree(case.workdir / 'checkpoints') == checkpoints


@pytest.mark.slow
def test_the_embedded_set_without_network_says_so(case, call, capsys, caplog, monkeypatch):
    def offline(name):
        raise weights.HubError(f'no network for {name}.')

    monkeypatch.setattr(weights, 'download', offline)
    defect = list(synthetic._COUNTS['screw']['test'])[-1]
    few = {'train': {'good': 4}, 'test': {'good': 2, defect: 2}}
    monkeypatch.setitem(synthetic._COUNTS, 'screw', few)
    case.config.data.update({'root': '', 'category': 'screw'})
    case.config.backbone.weights = ''
    assert call(case.config, case.workdir) == 0
    results = check_run(case.workdir, case.config, epochs=1)
    assert (results['data'], results['embedded']) == ('synthetic', True)
    assert results['weights'] == 'random (seed 0)'
    assert 'embedded data' in capsys.readouterr().out
    warnings = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert any('embedded' in message for message in warnings)
    assert any('random weights' in message for message in warnings)
