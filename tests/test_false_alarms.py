"""scripts/false_alarms.py: new splits, and the table of the rates that were seen."""

import json
import runpy
import shutil
import subprocess

import commands
import numpy as np
import pytest
import tiny

from ssn_jax import decision, run as run_lib

SCRIPT = runpy.run_path(str(commands.ROOT / 'scripts' / 'false_alarms.py'))


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_set_is_split_anew(tmp_path):
    tiny.write_data(tmp_path / 'data', train=20)
    root = tmp_path / 'data' / 'nut'
    SCRIPT['link'](f'folder:{root}', tmp_path / 'new', 3, None)
    good = {
        f'{split}-good-{p.name}'
        for split in ('train', 'test')
        for p in (root / split / 'good').iterdir()
    }
    of = {place: tmp_path / 'new' / place for place in ('all', 'held')}
    tested = names(of['all'] / 'test' / 'good')
    trained, fewer = (names(folder / 'train' / 'good') for folder in of.values())
    kept = names(tmp_path / 'new' / 'kept')
    assert tested == names(of['held'] / 'test' / 'good')
    assert trained | tested == good and not trained & tested
    assert fewer | kept == trained and not fewer & kept
    assert 0.3 <= len(tested) / len(good) < 0.35 and fewer and kept
    assert len(names(of['all'] / 'test' / 'defect')) == len(list((root / 'test/spot').iterdir()))
    linked = next((of['all'] / 'test' / 'defect').iterdir())
    assert linked.resolve().parent == root / 'test' / 'spot'


def test_the_official_split_stays(tmp_path):
    tiny.write_data(tmp_path / 'data', train=20)
    root = tmp_path / 'data' / 'nut'
    SCRIPT['link'](f'folder:{root}', tmp_path / 'new', 0, None, True)
    good = {split: names(root / split / 'good') for split in ('train', 'test')}
    of = {place: tmp_path / 'new' / place for place in ('all', 'held')}
    for folder in of.values():
        assert names(folder / 'test' / 'good') == {f'test-good-{n}' for n in good['test']}
    trained, fewer = (names(folder / 'train' / 'good') for folder in of.values())
    assert trained == {f'train-good-{n}' for n in good['train']}
    kept = names(tmp_path / 'new' / 'kept')
    assert fewer | kept == trained and not fewer & kept and len(kept) == 4


def test_what_belongs_together_stays_together(tmp_path):
    tiny.write_data(tmp_path / 'data', train=20)
    root = tmp_path / 'data' / 'nut'
    for i, path in enumerate(sorted((root / 'train' / 'good').iterdir())):
        path.rename(path.with_name(f'roll{i % 5}_{path.name}'))
    SCRIPT['link'](f'folder:{root}', tmp_path / 'new', 0, 'roll[^_]+')
    folders = [tmp_path / 'new' / x for x in ('all/test/good', 'held/train/good', 'kept')]
    rolls = [{n.split('_')[0] for n in names(folder) if 'roll' in n} for folder in folders]
    assert set.union(*rolls) == {f'train-good-roll{i}' for i in range(5)}
    assert sum(map(len, rolls)) == 5


def test_what_is_measured_of_a_split(tmp_path, monkeypatch):
    """Commands are replaced by a finished run with made-up out-of-part scores."""
    run = tiny.fake_run(tmp_path)
    tiny.finish(run)
    made_up = np.float32(np.arange(5))
    named = ['1'] * 5, [f'{i}.png' for i in range(5)], ['good'] * 5
    train = decision.Scores(*named, np.zeros(5, int), made_up, made_up)
    test = run_lib.read_scores(run).of('test')
    (run / 'scores.csv').write_text((train + test).to_csv())
    SCRIPT['link'](f'folder:{tmp_path}/data/nut', tmp_path / 'new', 0, None)

    def trained(command):
        shutil.copytree(run, command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, 'run', trained)
    found = json.loads(json.dumps(SCRIPT['measure'](tmp_path / 'new', [])))
    assert tuple(found) == ('out of part', 'trained on', 'holdout')
    for scores in found.values():
        assert scores['normal'] == test.normal().tolist()
        assert scores['defects'] == test.score[test.label > 0].tolist()
    assert found['out of part']['chosen on'] == made_up.tolist()
    for way, place in (('trained on', 'all/train/good'), ('holdout', 'kept')):
        assert len(found[way]['chosen on']) == len(names(tmp_path / 'new' / place))


def test_table(tmp_path):
    """Of normal scores 0..98 and a rate of 5 % the five highest are called, and those above."""
    folder = tmp_path / 'nut' / 'split-0'
    folder.mkdir(parents=True)
    chosen_on = np.arange(99.0).tolist()
    scores = {'chosen on': chosen_on, 'normal': [*np.zeros(18), 94.5, 97.0], 'defects': [1.0, 99.0]}
    (folder / 'found.json').write_text(json.dumps(dict.fromkeys(SCRIPT['WAYS'], scores)))
    lines = SCRIPT['table'](tmp_path).splitlines()
    row = lines[2 + len(SCRIPT['WAYS'])]
    assert lines[-1].startswith('nut: the scores of 16 images show a change. They have fallen')
    cells = [cell.strip() for cell in row.split('|')[1:-1]]
    assert cells[:2] == ['5 %', 'out of part'] and cells[3] == '10.0 / 50.0'
    assert cells[2] == '10.0 [1.8, 28.3] of 20'


def test_distance_by_hand():
    """Of one score, and one more: two outcomes alike, of mean and standard deviation a half."""
    distance = SCRIPT['distance']
    assert distance([0.0], [1.0], 0.5) == pytest.approx(1)
    assert distance([0.0], [-1.0], 0.5) == pytest.approx(-1)


def test_distance_of_exchangeable_scores():
    rng = np.random.default_rng(0)
    found = [SCRIPT['distance'](*np.split(rng.normal(size=60), [40]), 0.1) for _ in range(300)]
    assert abs(np.mean(found)) < 4 / np.sqrt(300)
    # The mean of 300 squares, whose standard deviation is at most 2 (the number is skewed).
    assert abs(np.mean(np.square(found)) - 1) < 4 * 2 / np.sqrt(300)
