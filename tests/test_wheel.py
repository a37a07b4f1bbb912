"""The package as others install it: a wheel in an environment of its own."""

import csv
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import commands
import pytest
import tiny

PARTS = ('ssn_jax', 'configs', 'setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE')
API = """
import pathlib, sys
import cv2, ssn_jax
here, image = map(pathlib.Path, sys.argv[1:])
assert here in pathlib.Path(ssn_jax.__file__).parents
frame = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
print(f'{ssn_jax.load("run")(frame).score:.6g}')
"""


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    """A virtual environment with the wheel alone; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp('wheel')
    for name in PARTS:
        source = commands.ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns('__pycache__')
            shutil.copytree(source, folder / 'source' / name, ignore=ignored)
        else:
            (folder / 'source').mkdir(exist_ok=True)
            shutil.copy(source, folder / 'source' / name)
    pip, venv = [sys.executable, '-m', 'pip', '-q'], folder / 'venv'
    options = '--no-deps', '--no-build-isolation', '--disable-pip-version-check'
    for command in (
        [*pip, 'wheel', *options, '-w', folder, folder / 'source'],
        [sys.executable, '-m', 'venv', '--without-pip', venv],
    ):
        subprocess.run(command, check=True, capture_output=True)
    [wheel] = folder.glob('*.whl')
    subprocess.run([*pip, '--python', venv, 'install', '--no-deps', wheel], check=True)
    [packages] = venv.glob('lib/*/site-packages')
    # Added as a path and not as a site: an editable installation in it is not followed.
    (packages / 'dependencies.pth').write_text(sysconfig.get_path('purelib'))
    return venv


def call(environment, cwd, *arguments):
    """Runs a program of the environment; its stdout."""
    without = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run(
        [environment / 'bin' / arguments[0], *map(str, arguments[1:])],
        cwd=cwd,
        env=without | {'XDG_CACHE_HOME': str(cwd / 'home')},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_and_predicts_from_another_folder(environment, tmp_path):
    tiny.write_data(tmp_path / 'data')
    tiny.write_weights(tmp_path / 'resnet18.safetensors')
    assert 'import-torch' in call(environment, tmp_path, 'ssn-jax')
    call(
        *(environment, tmp_path, 'ssn-jax', 'train', '--config', 'mod1_a', '--workdir', 'run'),
        *('--config.epochs=1', '--config.batch_size=4', '--config.image_size=(64,64)'),
        *('--config.sparse=False', '--config.data.root=data', '--config.data.category=nut'),
        '--config.backbone.weights=resnet18.safetensors',
    )
    photos = tmp_path / 'data/nut/test'
    call(
        environment, tmp_path, *'ssn-jax predict --workdir run --output out --input'.split(), photos
    )
    with (tmp_path / 'out/predictions.csv').open(newline='') as f:
        found = {row['file']: row['score'] for row in csv.DictReader(f)}
    image = 'spot/000.png'
    said = call(environment, tmp_path, 'python', '-c', API, environment, photos / image)
    assert said.strip() == found[image]


def test_windows_is_one_line():
    code = "import absl.flags, absl.logging, ml_collections, argparse, sys; sys.platform = 'win32'"
    code += "; sys.argv = ['ssn-jax', 'train']; from ssn_jax import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=commands.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('error: ssn_jax does not run on Windows')
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('name', ['', *sorted(__import__('ssn_jax.cli').cli.COMMANDS)])
def test_help_shows_a_commands_own_flags_and_an_example(name, capsys, monkeypatch):
    from ssn_jax import cli

    monkeypatch.setattr(sys, 'argv', ['ssn-jax', *filter(None, [name]), '--help'])
    try:
        cli.main()
    except SystemExit as e:
        assert not e.code
    said = capsys.readouterr().out
    assert f'ssn-jax {name or "COMMAND"}' in said
    assert name in ('', 'demo') or '--workdir' in said or '--output' in said or '--json' in said
    assert ('--max_pixels' in said) == (name == 'predict')


def test_a_home_folder_may_be_written_as_people_do(tmp_path, monkeypatch):
    from ssn_jax import terminal

    monkeypatch.setenv('HOME', str(tmp_path))
    assert terminal.path('~/runs') == pathlib.Path(tmp_path) / 'runs'
