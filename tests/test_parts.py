"""Heads that never saw a part of the images: which, what they learn from, what comes of it."""

import dataclasses
import shutil

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_supervision import config_of, make_split
import tiny

from ssn_jax import data, decision, pipeline, run as run_lib
from ssn_jax.data import augment
from ssn_jax.errors import UserError
from ssn_jax.training import loop, parts


def textured(count, rng):
    """Images (N, 96, 64, 3), each with a smooth pattern of its own."""
    small = rng.uniform(0, 255, (count, 6, 4, 3)).astype(np.float32)
    return np.stack([cv2.resize(x, (64, 96)).astype(np.uint8) for x in small])


def test_parts_share_each_class_and_split_no_group():
    config, rng = config_of('masks'), np.random.default_rng(0)
    split = make_split([0] * 14 + [1] * 7)
    groups = np.r_[0, 0, 0, 0, rng.permutation(np.arange(10, 20)), 30, 30, np.arange(31, 36)]
    found = parts.split(config, split, groups)
    assert sorted(np.concatenate(found)) == list(range(21))
    for part in found:
        assert (np.diff(part) > 0).all()
        each = np.bincount(split.labels[part])
        assert each[0] in (4, 5) and each[1] in (2, 3)
        for group in np.unique(groups):
            inside = np.isin(np.flatnonzero(groups == group), part)
            assert inside.all() or not inside.any()
    config.seed = 1
    other = parts.split(config, split, groups)
    assert [part.tolist() for part in other] != [part.tolist() for part in found]
    # What cannot be kept from a head.
    assert parts.split(config, make_split([0, 0, 1]), np.arange(3)) == []
    assert len(parts.split(config, make_split([0, 0, 1, 1]), np.arange(4))) == 2
    config.drawn.count = 5
    [first, second, third] = parts.split(config, make_split([0, 0, 0, 1]), np.arange(4))
    assert sorted(map(len, (first, second, third))) == [1, 1, 2]
    config.decision.parts = 0
    assert parts.split(config, split, groups) == []


def test_near_copies_are_of_one_group(caplog):
    """Another exposure, noise and JPEG; and what follows each other by name, if that is asked."""
    config, rng = config_of('none'), np.random.default_rng(0)
    images = textured(9, rng)
    noisy = images[2] * 1.03 + rng.normal(0, 2, images[2].shape) + 2
    _, encoded = cv2.imencode('.jpg', noisy.clip(0, 255).astype(np.uint8))
    images[7] = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    split = dataclasses.replace(make_split([0] * 9), images=images)
    with caplog.at_level('INFO'):
        groups = parts.groups(config, split)
    assert groups[2] == groups[7] and len(np.unique(groups)) == 8
    assert f'{split.files[7]} like {split.files[2]}' in caplog.text
    # What is usual may be no distance at all.
    images[1:8] = images[0]
    assert len(np.unique(parts.groups(config, dataclasses.replace(split, images=images)))) == 2
    config.decision.group = 4
    split = make_split([0, 1] * 5)
    groups = parts.groups(config, split)
    normal, defective = groups[::2], groups[1::2]
    assert (normal[:4] == normal[0]).all() and normal[4] != normal[0]
    assert not set(normal) & set(defective)


def material(config, layers):
    """Six images as they are shown, and features (N, S, S, C) of them for each (S, C)."""
    images = textured(6, np.random.default_rng(0))[:, :32, :32]
    split = dataclasses.replace(make_split([0] * 6, size=(32, 32)), images=images)
    shown, rng = augment.Shown(config, split), np.random.default_rng(0)
    features = [np.float32(rng.normal(size=(len(shown), s, s, c))) for s, c in layers]
    truth = {name: np.ones((len(shown), 8, 8, 1), np.float32) for name in ('mask', 'weight')}
    truth |= {'label': np.float32(shown.labels), 'known': np.ones(len(shown), np.float32)}
    return shown, {'layers': tuple(features)} | truth


@pytest.mark.parametrize(
    ('fields', 'layers'),
    [
        ({'image_score': 'map', 'positions': 8}, [(4, 128), (2, 256)]),
        # Of those that learn from whole images the one that compiles soonest.
        ({'system': 'simplenet', 'simplenet.embedding': 96, 'simplenet.hidden': 16}, [(4, 96)]),
    ],
)
def test_a_head_sees_nothing_of_its_part(fields, layers, tmp_path):
    """Whatever is made of a part's images is no number, and its head is finite."""
    config = tiny.config(tmp_path, **fields, **{'drawn.count': 13, 'product.angle': 'any'})
    config.turned_copies, config.epochs = 1, 2
    shown, contents = material(config, layers)
    part = np.array([1, 4])
    heads = {}
    for poisoned in (False, True):
        if poisoned:
            for x in contents['layers']:
                x[np.isin(shown.sources, part)] = np.nan
        job = loop.Job(config, tmp_path / f'{poisoned}', None, None, [part, np.array([0, 2])])
        heads[poisoned] = parts.train(job, 8, shown, jax.device_put(contents), None, False)
    for a, b in zip(*(jax.tree.leaves(heads[p][0]) for p in (False, True)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(heads[True][1]))


@pytest.mark.parametrize('angle', ['same', 'any'])
def test_what_a_head_is_shown_has_nothing_of_its_part(angle, tmp_path):
    """Neither copies of its images, nor pieces that were pasted from them, defects or not."""
    config = tiny.config(tmp_path, **{'drawn.count': 60, 'product.angle': angle})
    config.product.place, config.turned_copies = 'same', 1
    images = textured(8, np.random.default_rng(0))
    split = make_split([0] * 5 + [1] * 3, size=images.shape[1:3])
    split = dataclasses.replace(split, images=images, has_mask=np.ones(8, bool))
    split.masks[5:, 20:40, 20:30] = 1
    part = np.array([1, 6])
    others = images.copy()
    others[part] = 255 - textured(2, np.random.default_rng(1))
    before, after = (
        augment.Shown(config, dataclasses.replace(split, images=x)) for x in (images, others)
    )
    kept = parts.without(before, part)
    same = [all(map(np.array_equal, before[i], after[i])) for i in range(len(before))]
    assert all(same[i] for i in kept)
    # What was excluded shows something of the part, if only of a few levels.
    excluded = np.setdiff1d(np.arange(len(before)), kept)
    assert np.mean([same[i] for i in excluded]) < 0.1
    pasted = [i for i in excluded if before.sources[i] not in part]
    assert {*before.donors[pasted]} == {1, 6}


@pytest.mark.parametrize('every', [2, 3, 99])
def test_a_stopped_training_of_heads_goes_on(every, tmp_path, monkeypatch):
    """From the last checkpoint, or from what was saved when it was stopped, to the same heads."""
    config = tiny.config(tmp_path, **{'image_score': 'map', 'positions': 8, 'drawn.count': 13})
    config.epochs, config.checkpoint.every = 2, every
    shown, contents = material(config, [(4, 128), (2, 256)])
    contents = jax.device_put(contents)
    trained, make_epoch = [], parts.steps.make_epoch

    def counted(*arguments):
        run = make_epoch(*arguments)

        def epoch(*arguments):
            trained.append(1)
            if len(trained) == stop:
                raise KeyboardInterrupt
            return run(*arguments)

        return epoch

    def train(name):
        trained.clear()
        job = loop.Job(config, tmp_path / name, None, None, [np.array([1, 4]), np.array([0, 2])])
        return parts.train(job, 16, shown, contents, None, False)

    monkeypatch.setattr(parts.steps, 'make_epoch', counted)
    stop = 0
    whole, epochs = train('whole'), len(trained)
    stop = epochs  # In the last epoch of the second head.
    with pytest.raises(KeyboardInterrupt, match='the same command goes on with the threshold'):
        train('stopped')
    stop = 0
    again = train('stopped')
    assert len(trained) == 1 < epochs / 2
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    [damaged] = (tmp_path / 'stopped' / 'heads' / '1' / 'checkpoints').iterdir()
    for file in damaged.rglob('*'):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=f'{damaged} cannot be restored .*delete it to begin anew'):
        train('stopped')
    shutil.rmtree(damaged)
    jax.tree.map(np.testing.assert_array_equal, train('stopped'), whole)
    assert len(trained) == epochs / 2  # The other head is kept.
    parts.forget(tmp_path / 'stopped')
    assert not list((tmp_path / 'stopped').iterdir())


def test_what_shown_images_are_made_from(tmp_path):
    config = tiny.config(tmp_path, **{'drawn.count': 9, 'product.angle': 'any'})
    config.turned_copies = 2
    split = make_split([0, 1, 0], size=(32, 32))
    shown = augment.Shown(config, split)
    plain = [0, 2, 0, 0, 2, 2]
    assert shown.sources.tolist() == plain + [1] * 4 + plain + plain[:3]
    assert len(shown.sources) == len(shown)


@pytest.mark.slow
def test_a_run_chooses_on_scores_of_heads_that_never_saw_the_image(tmp_path):
    tiny.write_data(tmp_path / 'data')
    tiny.write_weights(tmp_path / 'resnet18.safetensors')
    config = tiny.config(tmp_path, sparse=False)
    config.decision.parts, config.decision.fpr = 3, 0.4
    results = pipeline.train_and_evaluate(config, tmp_path / 'run', quiet=True)
    chosen, scores = results['decision'], run_lib.read_scores(tmp_path / 'run')
    train, test = scores.of('train'), scores.of('test')
    dataset = data.load(config.data, config.image_size, config.resize)
    assert sorted(train.file) == sorted(dataset.train.files) and set(train.part) == {'1', '2', '3'}
    assert list(test.file) == list(dataset.test.files)
    assert chosen['split'].startswith('out of part')
    expected = decision.decide(config, scores)
    assert {name: chosen[name] for name in expected} == expected
    assert set(results['recall']) == {'spot'} and results['recall']['spot']['images'] == 3

    # Another rate needs no training, and a deleted table is made again, to the last bit.
    written = (tmp_path / 'run/scores.csv').read_text()
    config.decision.fpr = 0.9
    again = pipeline.train_and_evaluate(config, tmp_path / 'run', quiet=True)
    assert (tmp_path / 'run/scores.csv').read_text() == written
    assert again['decision']['threshold'] < chosen['threshold']
    (tmp_path / 'run/scores.csv').unlink()
    pipeline.train_and_evaluate(config, tmp_path / 'run', quiet=True)
    assert (tmp_path / 'run/scores.csv').read_text() == written
