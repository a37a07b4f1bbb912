"""A tiny data set in MVTec AD's layout and random weights, for tests that run the main job."""

import pathlib

import cv2
import numpy as np
import rule
import safetensors.numpy


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
    safetensors.numpy.save_file(rule.backbone_tensors('resnet18'), path)
