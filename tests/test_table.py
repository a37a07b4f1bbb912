"""scripts/table.py: the rows are runs of commands, and what is there is not run again."""

import json
import os
import subprocess
import sys

import commands
import pytest
import tiny


@pytest.mark.slow
def test_table(tmp_path):
    tiny.write_data(tmp_path / 'data', train=10)
    tiny.write_weights(tmp_path / 'resnet18.safetensors')
    rows = ['auto', 'neighbours, ResNet18']
    command = [sys.executable, commands.ROOT / 'scripts' / 'table.py', '--workdir', tmp_path / 't']
    command += ['--sets', f'mvtec_ad:{tmp_path}/data/nut', '--weights']
    command += [tmp_path / 'resnet18.safetensors', '--seeds', '2', '--rows', *rows, '--fields']
    command += ['image_size=(64,64)', 'drawn.count=8', 'epochs=1']
    environment = os.environ | {'XDG_CACHE_HOME': str(tmp_path / 'cache')}

    def run():
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stdout.splitlines() if ' on mvtec_ad:' in line]
        return said, (tmp_path / 't' / 'table.md').read_text().splitlines()

    said, table = run()
    assert len(said) == 3
    cells = {tuple(c.strip() for c in line.split('|')[1:3]): line for line in table[2:]}
    assert list(cells) == [(row, name) for row in rows for name in ('nut', 'mean')]
    assert '±' in cells['auto', 'nut']
    done = tmp_path / 't' / 'auto' / 'nut' / 'seed-1' / 'row.json'
    assert json.loads(done.read_text())['ms'] > 0
    # The nearest neighbour sees the bright square.
    assert cells[rows[1], 'nut'].split('|')[3].strip() == '100.0'
    done.unlink()
    assert run()[0] == [f'auto on mvtec_ad:{tmp_path}/data/nut, seed 1']


def test_sets_of_one_name_are_refused():
    command = [sys.executable, commands.ROOT / 'scripts' / 'table.py', '--workdir', 't']
    command += ['--weights', 'w', '--sets', 'folder:a/02', 'folder:b/02']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert '--sets has 02 02' in done.stderr
