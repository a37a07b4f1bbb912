"""Mutated files: whatever is in them, it is used or is one line, never a crash."""

import json
import os

import cv2
from hypothesis import HealthCheck, given, settings, strategies as st
import numpy as np
import safetensors.numpy

from ssn_jax import config as config_lib, predict_folder, predictor
from ssn_jax.data import images
from ssn_jax.errors import UserError
from ssn_jax.models import weights

BOUNDED = settings(
    max_examples=int(os.environ.get('SSN_JAX_FUZZ', '300')),  # scripts/soak.py: more of them.
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def bases():
    """A small image in each format, and in those of more than 8 bits."""
    image = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    found = {}
    for suffix in ('.png', '.jpg', '.bmp', '.tif', '.webp', '.ppm', '.gif', '.hdr'):
        ok, content = cv2.imencode(suffix, image if suffix != '.hdr' else np.float32(image))
        assert ok, suffix
        found[suffix] = content.tobytes()
    for suffix, kind in (('.16.png', np.uint16), ('.16.tif', np.uint16), ('.32.tif', np.float32)):
        found[suffix] = cv2.imencode(suffix[3:], kind(image))[1].tobytes()
    return found


BASES = bases()


@st.composite
def mutated(draw, content):
    """Bytes with a few of them changed, cut out or doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        # Most of what can go wrong is in the header.
        last = draw(st.sampled_from([min(64, len(content)), len(content)]))
        place = draw(st.integers(0, max(last - 1, 0)))
        match draw(st.sampled_from(['flip', 'set', 'cut', 'take', 'double'])):
            case 'flip' if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case 'set' if content:
                content[place] = draw(st.sampled_from([0, 1, 127, 128, 255]))
            case 'cut':
                del content[place:]
            case 'take':
                del content[place : place + draw(st.integers(1, 8))]
            case 'double':
                content[place:place] = content[place : place + draw(st.integers(1, 8))]
    return bytes(content)


def one_line(call):
    """What a call returns, or its UserError, which must be one line."""
    try:
        return call()
    except UserError as e:
        assert '\n' not in str(e)
        return e


@BOUNDED
@given(data=st.data(), suffix=st.sampled_from(sorted(BASES)))
def test_images(data, suffix, tmp_path):
    file = tmp_path / f'image{suffix}'
    file.write_bytes(data.draw(mutated(BASES[suffix])))
    config = config_lib.default_config()
    config.data.range = 255.0
    model = predictor.Predictor(config, None)
    found = predict_folder._load(file, images.size(file), model, 2**20)
    if not isinstance(found, UserError):
        image, size, fitted = found
        assert image.shape == (*size, 3)
        assert image.dtype == fitted.dtype == np.uint8 and image.ndim == 3
        assert fitted.shape == (*config.image_size, 3)
    else:
        assert '\n' not in str(found) and str(file) in str(found)
    mask = one_line(lambda: images.decode_mask(file.read_bytes(), file))
    assert isinstance(mask, UserError) or (mask.ndim == 2 and set(np.unique(mask)) <= {0, 1})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
NAMES = [name for name, _ in config_lib.fields(config_lib.default_config())]


@BOUNDED
@given(name=st.sampled_from(NAMES), value=ANYTHING)
def test_configs_of_a_run(name, value, tmp_path):
    content = config_lib.default_config().to_dict()
    *groups, field = name.split('.')
    group = content
    for part in groups:
        group = group[part]
    group[field] = value
    (tmp_path / 'config.json').write_text(json.dumps(content))

    def read():
        config = config_lib.from_json(tmp_path / 'config.json')
        config_lib.validate(config)
        return config

    found = one_line(read)
    assert isinstance(found, UserError) or config_lib.to_json(found)


@BOUNDED
@given(content=mutated(config_lib.to_json(config_lib.default_config()).encode()))
def test_damaged_configs_of_a_run(tmp_path, content):
    (tmp_path / 'config.json').write_bytes(content)
    one_line(lambda: config_lib.validate(config_lib.from_json(tmp_path / 'config.json')))


TENSORS = {name: np.arange(6, dtype=np.float32).reshape(2, 3) for name in ('a', 'b.c')}
TEMPLATE = {'a': np.zeros((3, 2)), 'b.c': np.zeros((3, 2))}


@BOUNDED
@given(data=st.data())
def test_weights(data, tmp_path):
    content = safetensors.numpy.save(TENSORS)
    (tmp_path / 'w.safetensors').write_bytes(data.draw(mutated(content)))

    def read():
        tensors = weights.read(tmp_path / 'w.safetensors')
        return weights.port(tensors, TEMPLATE, lambda path: path[0], 'w')

    found = one_line(read)
    assert isinstance(found, UserError) or all(np.isfinite(x).all() for x in found.values())


def test_what_is_mutated_is_good_before(tmp_path):
    """Otherwise nothing but the first check would be reached."""
    for suffix, content in BASES.items():
        assert images.decode(content, suffix, white=255).shape == (9, 7, 3)
    (tmp_path / 'w.safetensors').write_bytes(safetensors.numpy.save(TENSORS))
    found = weights.read(tmp_path / 'w.safetensors')
    assert weights.port(found, TEMPLATE, lambda path: path[0], 'w').keys() == TEMPLATE.keys()
