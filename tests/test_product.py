"""What is found of a product in its normal images."""

import cv2
import numpy as np
import pytest
import rule
from test_supervision import make_split

from ssn_jax.config import default_config, load
from ssn_jax.data import augment
from ssn_jax.training import loop, product


def thing(rng):
    """A bright key on a dark ground: nothing of it is alike from two sides."""
    image = np.full((128, 128, 3), 40.0)
    cv2.circle(image, (44, 64), 20, (190, 170, 160), -1)
    cv2.line(image, (60, 64), (100, 64), (180, 180, 150), 9)
    cv2.rectangle(image, (84, 64), (92, 82), (200, 160, 160), -1)
    return image + rng.normal(0, 6, image.shape)


def woven(rng):
    """Threads across the whole image, which begin anywhere."""
    rows, columns = np.mgrid[:128, :128] + rng.uniform(0, 64, (2, 1, 1))
    image = 120 + 40 * np.sin(rows / 1.5) + 15 * np.sin(columns / 4)
    return image[..., None].repeat(3, -1) + rng.normal(0, 6, (128, 128, 3))


def images_of(kind, count, seed=0):
    rng = np.random.default_rng(seed)
    images = [woven(rng) if kind == 'woven' else thing(rng) for _ in range(count)]
    images = [image.clip(0, 255).astype(np.uint8) for image in images]
    if kind == 'turned':
        images = [augment.turn(image, rng.uniform(0, 360)) for image in images]
    if kind == 'shifted':
        images = [np.roll(image, rng.integers(-24, 24, 2), (0, 1)) for image in images]
    return np.stack(images)


def config_of(**fields):
    config = default_config()
    config.image_score, config.engine = 'map', 'xla'
    config.product.update(angle='auto', place='auto', surface='auto')
    config.product.update(fields)
    return config


FOUND = {
    'same': ('same', 'same', 'object'),
    'turned': ('any', 'any', 'object'),
    'shifted': ('same', 'any', 'object'),
    'woven': ('same', 'any', 'texture'),
}


@pytest.mark.parametrize('kind', FOUND)
def test_what_is_found(kind):
    found = product.find(config_of(), images_of(kind, 24), rule.backbone('resnet18'))
    assert found == dict(
        zip(('product.angle', 'product.place', 'product.surface'), FOUND[kind], strict=True)
    )


def test_padding_moves_the_place_of_images_of_several_shapes():
    images, backbone = images_of('same', 24), rule.backbone('resnet18')
    config = config_of(angle='same', surface='object')
    # They are found to be alike in their middle squares.
    assert product.find(config, [x[:, :120] for x in images], backbone) == {'product.place': 'same'}
    several = [x[: 128 - 16 * (i % 2)] for i, x in enumerate(images)]
    assert product.find(config, several, backbone) == {'product.place': 'any'}


def test_only_what_is_asked_is_looked_for():
    images = images_of('same', 12)
    config = config_of(angle='same', place='any', surface='object')
    assert product.find(config, images, None) == {}
    config = config_of(place='any', angle='any')
    assert product.find(config, images[:2], rule.backbone('resnet18')) == {
        'product.surface': 'object'
    }


@pytest.mark.parametrize(('angle', 'drawn', 'steps'), [('same', 2500, 1500), ('any', 7500, 6000)])
def test_how_much_is_drawn_and_for_how_long(angle, drawn, steps):
    """By the product's angle; what is given stays."""
    config = load('auto')
    config.product.update(angle=angle, place='any', surface='object')
    split = make_split([0] * 5)
    found = loop.find_lessons(config, split)
    per_epoch = 2 * drawn // config.batch_size
    assert found == {'drawn.count': drawn, 'epochs': round(steps / per_epoch)}
    assert config.drawn.count == -1 and config.epochs == 0
    config.drawn.count, config.epochs = 640, 0
    assert loop.find_lessons(config, split) == {'epochs': round(steps / (2 * 640 // 64))}
    config.epochs = 7
    assert loop.find_lessons(config, split) == {}
    # Three defective images.
    split = make_split([0] * 5 + [1] * 3)
    assert loop.find_lessons(config, split) == {'supervision.known': 3 / 13}
    config.supervision.known = 0.2
    assert loop.find_lessons(config, split) == {}
