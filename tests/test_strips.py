"""Strips of 200x5000 pixels and shorter ones, padded and squashed, through the whole main job."""

import csv
import json
import pathlib

import cv2
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from test_metrics import brute_aupro
import tiny

from ssn_jax import cli, config as config_lib, decide, pipeline, predictor
from ssn_jax.data import images, masks as mask_lib

pytestmark = [pytest.mark.usefixtures('small_programs'), pytest.mark.slow]

SIZE = (64, 256)


def write_strips(root: pathlib.Path) -> None:
    """Noise, and in a defect's strip a bright block; every other one is 200x3200."""
    rng = np.random.default_rng(0)
    for folder, count in {'train/good': 5, 'train/spot': 2, 'test/good': 3, 'test/spot': 3}.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(60, 140, (20, 500 - 180 * (i % 2)), np.uint8)
            image = cv2.resize(image, None, fx=10, fy=10)
            if 'spot' in folder:
                mask = np.zeros(image.shape, np.uint8)
                mask[40:160, 900 + 400 * i : 1100 + 400 * i] = 255
                image[mask > 0] = 230
                split, name = folder.split('/')
                masks = root / 'ground_truth' / split / name
                masks.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(masks / f'{i}.png'), mask)
            assert cv2.imwrite(str(root / folder / f'{i}.png'), image)


def train(folder: pathlib.Path, fit: str, labelled: bool) -> dict:
    """The results of the recommended recipe, made tiny; `labelled`: with the defects of train."""
    write_strips(folder / 'data')
    tiny.write_weights(folder / 'w.safetensors')
    config = config_lib.load('auto')
    config.update(epochs=2, batch_size=4, image_size=SIZE, fit=fit)
    config.backbone.weights = str(folder / 'w.safetensors')
    config.data.update(name='folder', root=str(folder / 'data'), cache=str(folder / 'cache'))
    config.drawn.count, config.decision.parts = 12, 2
    if not labelled:
        config.supervision.kind = 'none'
    return pipeline.train_and_evaluate(config, folder / 'run', quiet=True)


@pytest.mark.parametrize('fit, labelled', [('pad', True), ('pad', False), ('squash', True)])
def test_strips(fit, labelled, tmp_path, capsys):
    results = train(tmp_path, fit, labelled)
    model = predictor.open_run(tmp_path / 'run')
    assert results['train_masks'] == 2 * labelled
    assert (tmp_path / 'run/masked_images.json').exists() == labelled
    assert results['doubts'].get('shape', 0) == (0 if fit == 'pad' else 13)

    # By hand: each image by itself, its map without the margin.
    maps, masks, scores, labels, shapes = [], [], [], [], {}
    for file in sorted((tmp_path / 'data/test').glob('*/*.png')):
        frame = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)
        found, region = model(frame), np.zeros(frame.shape[:2], np.uint8)
        if file.parent.name == 'spot':
            truth = tmp_path / 'data/ground_truth/test/spot' / file.name
            region = cv2.imread(str(truth), cv2.IMREAD_GRAYSCALE) // 255
        fitted = images.fit_mask(region, SIZE, how=fit, resize=mask_lib.resize)
        masks.append(fitted[found.view.inside])
        maps.append(found.map)
        scores.append(found.score)
        labels.append(int(region.any()))
        shapes[f'{file.parent.name}/{file.stem}'] = frame.shape[:2]
    assert {x.shape for x in maps} == ({(10, 256), (16, 256)} if fit == 'pad' else {SIZE})
    assert scores == pytest.approx([x.max() for x in maps])
    pixels, positive = (np.concatenate([x.ravel() for x in many]) for many in (maps, masks))
    expected = {
        'I-AUROC': sklearn_metrics.roc_auc_score(labels, scores),
        'seg-I-AUROC': sklearn_metrics.roc_auc_score(labels, scores),
        'P-AUROC': sklearn_metrics.roc_auc_score(positive, pixels),
        'AP-loc': sklearn_metrics.average_precision_score(positive, pixels),
        'AUPRO': brute_aupro(maps, masks, 0.3),
    }
    measured = {name: results['metrics'][name] for name in expected}
    assert measured == pytest.approx(expected, abs=1e-4)

    table = tmp_path / 'scores.csv'
    cli.evaluate(['--workdir', str(tmp_path / 'run'), '--quiet', '--output', str(table)])
    assert f'{results["metrics"]["AUPRO"]:.17g}'[:12] in capsys.readouterr().out
    with table.open(newline='') as file:
        rows = list(csv.DictReader(file))
    highest = [float(row['map_maximum']) for row in rows]
    assert highest == pytest.approx([float(row['score']) for row in rows])
    again = decide.score_folder(model, tmp_path / 'data/test', 'spot')
    assert again.map_maximum == pytest.approx(again.score)
    output = tmp_path / 'out'
    arguments = '--workdir', tmp_path / 'run', '--input', tmp_path / 'data/test'
    arguments += '--output', output, '--maps', 'npy', '--quiet'
    assert cli.predict([str(x) for x in arguments]) in (0, None)
    found = {p.relative_to(output): np.load(p) for p in output.rglob('*.npy')}
    assert sorted(x.shape for x in found.values()) == sorted(shapes.values())
    assert all(np.isfinite(x).all() for x in found.values())
    assert json.loads((tmp_path / 'run/results.json').read_text()) == results
