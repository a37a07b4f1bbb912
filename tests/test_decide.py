"""Another threshold for a finished run: by rate, by new images, by known defects."""

import csv
import dataclasses
import json
import pathlib
import re
import shutil

import cv2
import numpy as np
import pytest
import tiny

import ssn_jax
from ssn_jax import cli, config as config_lib, decision, pipeline, predictor, run as run_lib
from ssn_jax.data import layouts


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run whose training images have made-up scores, 0.01 to 1 above its own."""
    folder = tmp_path_factory.mktemp('decide')
    workdir = tiny.fake_run(folder)
    tiny.finish(workdir)
    scores = run_lib.read_scores(workdir)
    made_up = np.float32(np.arange(1, 101) / 100)
    named = ['1'] * 100, [f'{i}.png' for i in range(100)], [layouts.GOOD] * 100
    train = decision.Scores(*named, np.zeros(100, int), made_up, made_up)
    (workdir / 'scores.csv').write_text((train + scores.of('test')).to_csv())
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / 'run')


def data_of(workdir, shown):
    """The test images of the run's data that show this."""
    return pathlib.Path(run_lib.read_config(workdir).data.root, 'nut/test', shown)


def decide(workdir, *arguments):
    cli.decide(['--workdir', str(workdir), *map(str, arguments)])
    return json.loads((workdir / 'decision.json').read_text())


def test_another_rate(workdir, capsys):
    chosen = decide(workdir, '--fpr', 0.02)
    # Of 101 the highest two: just above 0.99.
    assert 0.99 < chosen['threshold'] < 0.9901 and chosen['promised'] == pytest.approx(2 / 101)
    results = json.loads((workdir / 'results.json').read_text())
    test = run_lib.read_scores(workdir).of('test')
    expected = decision.rates(test.score, test.label, chosen['threshold'])
    assert (chosen['test_tpr'], chosen['test_fpr']) == (expected['tpr'], expected['fpr'])
    assert results['decision'] == chosen and results['recall']['spot']['images'] == 3
    low, high = chosen['interval']
    assert f'{100 * low:.1f} to {100 * high:.1f} %' in capsys.readouterr().out
    # For one call alone, nothing is written.
    before = (workdir / 'decision.json').read_bytes()
    assert 0.9 < ssn_jax.load(workdir, fpr=0.1).threshold < 0.92
    assert (workdir / 'decision.json').read_bytes() == before
    # The run's own command goes back to its own choice, 5 of 101.
    tiny_config = config_lib.from_json(workdir / 'config.json')
    again = pipeline.train_and_evaluate(tiny_config, workdir, quiet=True)
    assert 0.96 < again['decision']['threshold'] < 0.9601


def test_new_images_take_the_place_of_those_of_the_training(workdir, tmp_path, caplog):
    images = shutil.copytree(data_of(workdir, 'good'), tmp_path / 'new')
    (images / 'broken.png').write_bytes(b'no image')
    chosen = decide(workdir, '--images', images)
    assert 'broken.png' in caplog.text
    new = run_lib.read_scores(workdir).of('new')
    assert chosen['split'] == 'new (normal)' and chosen['images'] == len(new.score) == 3
    model = predictor.open_run(workdir)
    np.testing.assert_array_equal(np.sort(model.normal), np.sort(new.score))
    image = cv2.imread(str(images / '000.png'))[..., ::-1]
    result = model(image)
    assert result.score == pytest.approx(new.score[list(new.file).index('new/000.png')], rel=1e-5)
    assert 0.25 <= result.p_value <= 1 and not result.defective


def test_known_defects_weigh_as_much_as_is_said(workdir, tmp_path):
    defects = data_of(workdir, 'spot')
    once, often = (decide(workdir, '--defects', defects, *x) for x in ((), ('--misses', 1e6)))
    assert once['method'] == 'Youden' and once['images'] == 103
    assert often['tpr'] == 1 and often['threshold'] <= once['threshold']
    model = predictor.open_run(workdir)
    spots = [cv2.imread(str(p))[..., ::-1] for p in sorted(defects.iterdir())]
    assert often['threshold'] == pytest.approx(min(r.score for r in model(spots)), rel=1e-4)


def test_predictions_say_how_rare_they_are_and_by_what_they_were_judged(
    workdir, tmp_path, monkeypatch
):
    images = str(data_of(workdir, 'good'))
    command = f'--workdir {workdir} --input {images} --output {tmp_path}/out --fpr 0.5 --quiet'
    cli.predict(command.split())
    with (tmp_path / 'out/predictions.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    normal = np.float32(np.arange(1, 101) / 100)
    for row in rows:
        expected = decision.p_values(np.float32(row['score']), normal)
        assert float(row['p_value']) == pytest.approx(float(expected), abs=0.011)
        assert row['run'] == 'run' and 0.5 < float(row['threshold']) < 0.52
    monkeypatch.chdir(workdir)
    cli.predict(f'--workdir . --input {images} --output {tmp_path}/again --quiet'.split())
    with (tmp_path / 'again/predictions.csv').open(newline='') as file:
        assert {row['run'] for row in csv.DictReader(file)} == {'run'}


def test_a_change_of_the_scores_is_told_once_by_the_image_that_shows_it(
    workdir, tmp_path, caplog, capsys
):
    image, images = data_of(workdir, 'good') / '000.png', tmp_path / 'images'
    images.mkdir()
    for i in range(40):
        shutil.copyfile(image, images / f'{i:02d}.png')
    score = predictor.open_run(workdir)(cv2.imread(str(image))[..., ::-1]).score
    command = f'--workdir {workdir} --input {images} --no_overlays --watch-drift'
    scores, said = run_lib.read_scores(workdir), []
    for offset in (-2, -0.5, 1):  # Known scores of 0.01 to 1 lie below, around and above.
        moved = scores.score + np.float32(score + offset) * (np.array(scores.part) != 'test')
        moved = dataclasses.replace(scores, score=moved)
        (workdir / 'scores.csv').write_text(moved.to_csv())
        caplog.clear()
        cli.predict(f'{command} --output {tmp_path}/{offset}'.split())
        said.append((caplog.text, capsys.readouterr().out))
    for (warning, printed), word in ((said[0], 'risen'), (said[2], 'fallen')):
        number = int(re.search(r'([0-9]+)\.png: the scores of ([0-9]+) images', warning)[1])
        assert 14 <= number < 25 and warning.count('show a change') == 1 and word in warning
        assert 'decide --images' in warning and 'Drift' not in printed
    assert 'change' not in said[1][0]
    assert 'Drift: no change of the scores is noticed in 40 images.' in said[1][1]


def test_colours_are_told_from_the_maps_of_normal_images(workdir, tmp_path):
    """Known maxima far above any map, just around one, or none."""
    image = data_of(workdir, 'good') / '000.png'
    frame, scores, pictures = cv2.imread(str(image))[..., ::-1], run_lib.read_scores(workdir), []
    result = predictor.open_run(workdir)(frame)
    for middle, width in ((result.map.max() + 50, 1), (np.median(result.map), 1e-3)):
        maxima = np.float32(middle + width * np.linspace(-1, 1, len(scores.label)))
        moved = dataclasses.replace(scores, map_maximum=maxima)
        (workdir / 'scores.csv').write_text(moved.to_csv())
        output = tmp_path / str(width)
        cli.predict(f'--workdir {workdir} --input {image} --output {output} --quiet'.split())
        pictures.append(cv2.imread(str(output / 'overlays/000.png.jpg')).astype(int))
        heat = predictor.open_run(workdir).evidence(result.map)
        expected = decision.evidence(result.map, moved.unseen().map_maximum)
        np.testing.assert_array_equal(heat, expected)
    blue_alone, both = pictures
    # Dark blue has little green, yellow much.
    assert blue_alone[..., 1].max() < 70 and both[..., 1].max() > 150 > 70 > both[..., 1].min()
    (workdir / 'scores.csv').unlink()
    heat = predictor.open_run(workdir).evidence(result.map)
    np.testing.assert_array_equal(heat, decision.sigmoid(result.map))


def test_drift_in_python_is_that_of_the_command(workdir):
    model = ssn_jax.load(workdir)
    watch = model.watch_drift(rate=0.1)
    assert not watch.update(model(np.zeros((64, 64, 3), np.uint8)).score) and watch.seen == 1
    model.normal = model.normal[:0]
    with pytest.raises(ssn_jax.UserError, match='not trained on: its own command, given again'):
        model.watch_drift()


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['--fpr', '1.5'], 'no rate'),
        (['--fpr', '0.1', '--defects', '.'], 'one of both'),
        (['--misses', '0'], '--misses=0'),
        (['--images', 'nowhere'], '--images=nowhere does not exist'),
        (['--images', '{empty}'], 'no image that can be read'),
    ],
)
def test_wrong_arguments(arguments, said, workdir, tmp_path):
    (tmp_path / 'empty').mkdir()
    before = {p: p.read_bytes() for p in workdir.glob('*.json')}
    arguments = [x.format(empty=tmp_path / 'empty') for x in arguments]
    with pytest.raises(ssn_jax.UserError, match=said):
        decide(workdir, *arguments)
    assert before == {p: p.read_bytes() for p in workdir.glob('*.json')}


def test_a_run_without_scores_says_so(workdir):
    (workdir / 'scores.csv').unlink()
    with pytest.raises(ssn_jax.UserError, match='no scores to choose on'):
        decide(workdir, '--fpr', 0.1)
    with pytest.raises(ssn_jax.UserError, match='not trained on'):
        predictor.open_run(workdir, fpr=0.1)


def test_scores_that_are_no_numbers_are_told(workdir):
    file = workdir / 'scores.csv'
    file.write_text(file.read_text().replace(',0.5,', ',nan,'))
    with pytest.raises(ssn_jax.UserError, match=r'finite scores of normal images; scores\.csv'):
        decide(workdir, '--fpr', 0.1)


@pytest.mark.parametrize('fpr', [0, 1, 1.5, float('nan')])
def test_a_rate_outside_of_its_bounds(fpr, workdir):
    with pytest.raises(ssn_jax.UserError, match='above 0 and below 1'):
        predictor.open_run(workdir, fpr=fpr)
