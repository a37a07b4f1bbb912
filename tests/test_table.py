"""scripts/table.py: the rows are runs of commands, and what is there is not run again."""

import argparse
import json
import os
import runpy
import subprocess
import sys

import commands
import pytest
import tiny

from ssn_jax import config as config_lib, metrics
from ssn_jax.data import layouts

SCRIPT = runpy.run_path(str(commands.ROOT / 'scripts' / 'table.py'))


@pytest.mark.slow
def test_table(tmp_path):
    tiny.write_data(tmp_path / 'data', train=10)
    tiny.write_weights(tmp_path / 'resnet18.safetensors')
    rows = ['auto', 'neighbours, ResNet18']
    command = [sys.executable, commands.ROOT / 'scripts' / 'table.py', '--workdir', tmp_path / 't']
    command += ['--sets', f'mvtec_ad:{tmp_path}/data/nut', '--weights']
    command += [tmp_path / 'resnet18.safetensors', '--seeds', '1', '--rows', *rows, '--fields']
    command += ['image_size=(64,64)', 'drawn.count=8', 'epochs=1', 'decision.parts=0']
    environment = os.environ | {'XDG_CACHE_HOME': str(tmp_path / 'cache')}

    def run():
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stdout.splitlines() if ' on mvtec_ad:' in line]
        return said, (tmp_path / 't' / 'table.md').read_text().splitlines()

    said, table = run()
    assert len(said) == 2
    cells = {tuple(c.strip() for c in line.split('|')[1:3]): line for line in table[2:]}
    assert list(cells) == [(row, name) for row in rows for name in ('nut', 'mean')]
    done = tmp_path / 't' / 'auto' / 'nut' / 'seed-0' / 'row.json'
    assert json.loads(done.read_text())['ms'] > 0
    # The nearest neighbour sees the bright square.
    assert cells[rows[1], 'nut'].split('|')[3].strip() == '100.0'
    (tmp_path / 't' / 'neighbours-ResNet18' / 'nut' / 'seed-0' / 'row.json').unlink()
    assert run()[0] == [f'{rows[1]} on mvtec_ad:{tmp_path}/data/nut, seed 0']


def test_a_row_is_the_mean_of_its_seeds(tmp_path):
    for seed, value in enumerate((0.5, 0.7)):
        file = SCRIPT['row_file'](tmp_path, 'edge', 'folder:x/nut', seed)
        file.parent.mkdir(parents=True)
        values = {'metrics': dict.fromkeys(metrics.METRICS, value), 'minutes': 2 + seed, 'ms': 8.0}
        file.write_text(json.dumps(values))
    asked = argparse.Namespace(workdir=tmp_path, sets=['folder:x/nut'], seeds=2)
    lines = SCRIPT['table'](asked).splitlines()
    assert lines[2] == '| edge | nut |' + ' 60.0 ± 14.1 |' * 7 + ' 2.5 | 8.0 |'
    assert lines[3] == '| edge | mean |' + ' 60.0 |' * 7 + ' | |'
    # A set without masks has no AUPRO.
    for seed in range(2):
        file = SCRIPT['row_file'](tmp_path, 'edge', 'folder:x/nut', seed)
        file.write_text(json.dumps(values | {'metrics': values['metrics'] | {'AUPRO': None}}))
    lines = SCRIPT['table'](asked).splitlines()
    assert lines[2].count('–') == lines[3].count('–') == 1


def test_a_few_defects_are_moved_to_training(tmp_path):
    tiny.write_data(tmp_path / 'data', train=5)
    root = tmp_path / 'data' / 'nut'
    before = layouts.folder(root).records
    found = layouts.folder(SCRIPT['few'](root, tmp_path / 'new', 1)).records
    assert {r.image.resolve() for r in found} == {r.image for r in before}
    assert {r.mask.resolve() for r in found if r.mask} == {r.mask for r in before if r.mask}
    [moved] = [r for r in found if r.split == 'train' and r.defect != layouts.GOOD]
    assert moved.image.resolve() == min(r.image for r in before if r.defect == 'spot')
    assert moved.mask is not None


@pytest.mark.parametrize('name', ['false_alarms', 'soak', 'table'])
def test_scripts_have_help(name, monkeypatch, capsys):
    path = commands.ROOT / 'scripts' / f'{name}.py'
    monkeypatch.setattr(sys, 'argv', [str(path), '--help'])
    with pytest.raises(SystemExit, match='0'):
        runpy.run_path(str(path))['main']()
    assert 'usage: ' in capsys.readouterr().out


def test_every_row_is_a_config():
    for base, changes in (SCRIPT['ROWS'] | SCRIPT['KNOWLEDGE']).values():
        config = config_lib.load(base)
        for field, value in (changes or {}).items():
            if not isinstance(value, str) or value[0] != '(':  # What a flag reads as a tuple.
                config.update_from_flattened_dict({field: value})
        config_lib.validate(config)


def test_sets_of_one_name_are_refused():
    command = [sys.executable, commands.ROOT / 'scripts' / 'table.py', '--workdir', 't']
    command += ['--weights', 'w', '--sets', 'folder:a/02', 'folder:b/02']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert '--sets has 02 02' in done.stderr
