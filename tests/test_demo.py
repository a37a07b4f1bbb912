"""The demo: its two commands, in small, and what it says of their result."""

import pathlib
import shlex

import commands
import pytest

from ssn_jax import demo
from ssn_jax.data import synthetic


def test_what_is_counted(tmp_path):
    table = tmp_path / 'predictions.csv'
    called = {'good': 'nndn', 'chip': 'dd', 'scratch': 'dnd'}
    words = {'n': 'normal', 'd': 'defective'}
    rows = [
        f'{kind}/{i}.png,0.5,{words[c]}' for kind, cs in called.items() for i, c in enumerate(cs)
    ]
    table.write_text('\n'.join(['file,score,decision', *rows]) + '\n')
    found = [' '.join(line.split()) for line in demo.count(table).splitlines()]
    assert found == [
        'chip found 2 of 2',
        'scratch found 2 of 3',
        'all defects found 4 of 5 (80 %)',
        'false alarms 1 of 4 good images (25.0 %)',
    ]


@pytest.mark.slow
def test_the_demo_in_small(tmp_path, monkeypatch, capsys):
    """As it is, but for the number of images, their size, and the epochs."""
    few = {'train': {'good': 6}, 'test': {'good': 3, 'chip': 2, 'missing_ball': 1}}
    monkeypatch.setitem(synthetic._COUNTS, 'bearing', few)
    for record in synthetic.records('bearing', 0):
        path = tmp_path / 'data' / record.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record.image)
    short = '--config.image_size=(64,64) --config.epochs=1 --config.data.name=folder'
    short += ' --config.drawn.count=24'
    short += f' --config.data.root={tmp_path / "data/bearing"} --config.batch_size=8'
    said = []

    def run(command):
        said.append(command)
        _, name, *words = shlex.split(command)
        words += short.split() * (name == 'train')
        started = commands.start(name, *words, cwd=tmp_path)
        assert started.end() == 0, started.err[-2000:]

    monkeypatch.setattr(demo, 'run', run)
    monkeypatch.chdir(tmp_path)
    demo.demo(pathlib.Path('runs/demo'))
    out = capsys.readouterr().out
    assert [command.split()[1] for command in said] == ['train', 'predict']
    assert 'of 2' in out and 'of 1' in out and 'of 3 good images' in out
    for line in out.splitlines():
        if line.startswith('  runs/'):
            assert (tmp_path / line.split(',')[0].strip()).is_file()
    assert (tmp_path / 'runs/demo/results.json').exists()
