"""A tiny data set in MVTec AD's layout and random weights, for tests that run the main job."""

import json
import pathlib
import struct

import cv2
import jax
import ml_collections
import numpy as np
import rule
import safetensors.numpy

from ssn_jax import config as config_lib, files, pipeline, run as run_lib
from ssn_jax.models import backbones, weights
from ssn_jax.training import checkpoint, steps


def write_data(root: pathlib.Path, size: int = 64, train: int = 6, test: int = 3) -> None:
    """Category 'nut': grey discs on a noisy ground; a defect is a bright square on the disc."""
    base, rng = root / 'nut', np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    disc = (rows - size / 2) ** 2 + (columns - size / 2) ** 2 < (size / 3) ** 2
    for folder, count in {'train/good': train, 'test/good': test, 'test/spot': test}.items():
        (base / folder).mkdir(parents=True)
        for i in range(count):
            image = (60 + 60 * disc + rng.normal(0, 8, disc.shape)).clip(0, 255)
            if folder.endswith('spot'):
                mask = np.zeros(disc.shape, np.uint8)
                mask[size // 3 : size // 2, size // 3 + i : size // 2 + i] = 255
                image[mask > 0] = 230
                truth = base / 'ground_truth/spot'
                truth.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(truth / f'{i:03d}_mask.png'), mask)
            assert cv2.imwrite(str(base / folder / f'{i:03d}.png'), image.astype(np.uint8))


def write_weights(path: pathlib.Path) -> None:
    """The rule's ResNet18 under torchvision's names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(rule.backbone_tensors('resnet18'), path)


def config(folder: pathlib.Path, **fields) -> ml_collections.ConfigDict:
    """A config of one epoch on the files that this module writes below `folder`."""
    config = config_lib.default_config()
    config.image_size, config.epochs, config.batch_size = (64, 64), 1, 4
    config.decision.parts = 0  # They cost as much as the training; test_parts has them.
    config.data.update(root=str(folder / 'data'), category='nut', cache=str(folder / 'cache'))
    config.backbone.weights = str(folder / 'resnet18.safetensors')
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    return config


def fake_run(
    folder: pathlib.Path, threshold: float | None = 0.5, epoch: int = 1, **fields
) -> pathlib.Path:
    """A run's folder with random weights, written without any training."""
    write_weights(folder / 'resnet18.safetensors')
    run, workdir = config(folder, **fields), folder / 'run'
    state = steps.init_state(
        run, jax.random.key(1), backbones.feature_channels(run.backbone.name, run.features.layers)
    )
    files.write(workdir / 'config.json', config_lib.to_json(run))
    checkpoint.save(checkpoint.open_manager(workdir, 2), epoch, state)
    backbone, _ = weights.load_backbone(run.backbone.name, run.backbone.weights, False)
    run_lib.write_model(workdir, run_lib.Model(backbone, state.variables(), epoch))
    decision = {'threshold': threshold, 'undefined': 'made up', 'split': 'train (normal)'}
    files.write(workdir / 'decision.json', json.dumps(decision))
    files.write(workdir / 'train.csv', f'epoch,loss,seconds\n{epoch},1,1\n')
    return workdir


def finish(workdir: pathlib.Path, **options) -> dict:
    """Evaluates a `fake_run` on the data of this module as the main job does: its results."""
    write_data(workdir.parent / 'data')
    run = config_lib.from_json(workdir / 'config.json')
    return pipeline.train_and_evaluate(run, workdir, **options)


def scalars(folder: pathlib.Path) -> dict[tuple[str, int], float]:
    """The values of a folder's only TensorBoard event file by tag and step."""
    from tensorboardX.proto import event_pb2

    [file] = folder.iterdir()
    content, found = file.read_bytes(), {}
    while content:  # Length (8 bytes), its checksum (4), the event, its checksum (4).
        length = struct.unpack('<Q', content[:8])[0]
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            assert (value.tag, event.step) not in found
            found[value.tag, event.step] = value.simple_value
    return found
