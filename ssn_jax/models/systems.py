"""The trained networks on top of the frozen features: SuperSimpleNet, GAP+CAM and SimpleNet.

Every network says what of an image is kept during training (`frozen`, from the backbone's layers),
what it reads (`features`, from the frozen part), and how its map becomes one for people
(`full_size_map`).
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssn_jax.models import grid as grid_lib
from ssn_jax.models.heads import (
    ADAPTORS,
    CamHead,
    ClassificationHead,
    HingeDiscriminator,
    SegmentationHead,
)
from ssn_jax.models.layers import Dense


class _OnFeatureGrid(nn.Module):
    """What both share: they read the upscaled layers through an adaptor.

    Attributes:
      adaptor: 'linear' (published, Scenario A) or 'conv' (Scenario B).
    """

    adaptor: str = 'linear'

    features = staticmethod(grid_lib.upscale_pool)
    full_size_map = staticmethod(grid_lib.full_size_map)
    map_matrices = staticmethod(grid_lib.map_matrices)

    @nn.nowrap
    def frozen(self, stages: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The layers that it reads, at their own grids."""
        return grid_lib.select_layers(stages, self.layers)

    def setup(self):
        self.adapt_features = ADAPTORS[self.adaptor](name='adaptor')

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Evaluates a feature grid (N, H, W, C): anomaly logits (N, H, W, 1), score logits (N,)."""
        return self.discriminate(self.adapt(features), features)

    def adapt(self, features: jax.Array, train: bool = False) -> jax.Array:
        """Features (N, H, W, C) -> adapted features (N, H, W, C)."""
        return self.adapt_features(features, train)


class SuperSimpleNet(_OnFeatureGrid):
    """Adaptor, segmentation head and classification head.

    Attributes:
      adapt_cls_features: whether the classification head sees adapted features (first paper,
        ICPR 2024) or the frozen ones (journal version).
      classify: whether there is a classification head; without, the score is the maximum of the
        map for people, which is known with the image's size alone, and None here.
      waves: of the position code that the segmentation head reads beside the features; 0 for none.
      layers: of the backbone, as `grid.select_layers` takes them.
    """

    adapt_cls_features: bool = False
    classify: bool = True
    layers: tuple[int, ...] = (2, 3)
    waves: int = 0

    def setup(self):
        super().setup()
        self.seg_head = SegmentationHead()
        if self.classify:
            self.cls_head = ClassificationHead()

    def segment(
        self, adapted: jax.Array, code: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Adapted features (..., C) to anomaly logits (..., 1), each position by itself.

        With `waves` it reads the positions' `code` (..., 4 * waves) too, as `places` has it.
        """
        seen = jnp.concatenate([adapted, code], -1) if self.waves else adapted
        return self.seg_head(seen, train)

    @nn.nowrap
    def places(self, grid: tuple[int, int]) -> jax.Array | None:
        """The code of each position of a feature grid (H, W, 4 * waves); None without."""
        if not self.waves:
            return None
        code = grid_lib.position_code(tuple(n // 2 for n in grid), self.waves)
        return grid_lib.upscale_pool((code[None],))[0]

    def discriminate(
        self,
        adapted: jax.Array,
        features: jax.Array,
        train: bool = False,
        stop_map_gradient: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Adapted and frozen features, both (N, H, W, C), to anomaly logits and score logits.

        With `stop_map_gradient` the classification loss does not reach the segmentation head
        through the map (unsupervised training).
        """
        code = self.places(adapted.shape[1:3])
        if code is not None:
            code = jnp.broadcast_to(code, (*adapted.shape[:3], code.shape[-1]))
        logits = self.segment(adapted, code, train)
        if not self.classify:
            return logits, None
        seen = jax.lax.stop_gradient(logits) if stop_map_gradient else logits
        cls_features = adapted if self.adapt_cls_features else features
        return logits, self.cls_head(cls_features, seen, train)


class GapCam(_OnFeatureGrid):
    """Adaptor and one head, taught by image labels alone; its map explains its score.

    Attributes:
      layers: of the backbone, as `grid.select_layers` takes them.
    """

    layers: tuple[int, ...] = (2, 3)

    def setup(self):
        super().setup()
        self.cls_head = CamHead()

    def discriminate(
        self,
        adapted: jax.Array,
        features: jax.Array,
        train: bool = False,
        stop_map_gradient: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """As of SuperSimpleNet; the frozen features are not read, and the map feeds nothing."""
        return self.cls_head(adapted, train)


def unfold(x: jax.Array, size: int = 3) -> jax.Array:
    """The size x size patch around every position, zero padding, in PyTorch's order.

    Args:
      x: (N, H, W, C).
      size: odd.

    Returns:
      (N, H, W, C * size^2), channels slowest, then the patch's rows, then its columns.
    """
    half, (height, width) = size // 2, x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    shifts = [(i, j) for i in range(size) for j in range(size)]
    patches = [padded[:, i : i + height, j : j + width] for i, j in shifts]
    return jnp.stack(patches, -1).reshape(*x.shape[:3], -1)


@functools.cache
def _windows(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Which entries each window holds, and their weights: (longest, size_out) twice."""
    i = np.arange(size_out)
    start, end = i * size_in // size_out, -(-(i + 1) * size_in // size_out)
    places = start + np.arange((end - start).max())[:, None]
    weights = (places < end) / (end - start)
    return np.minimum(places, size_in - 1), weights.astype(np.float32)


def adaptive_average(x: jax.Array, size: int) -> jax.Array:
    """Averages the last axis of x (..., D) over `size` windows of nearly equal length.

    Window i spans floor(i D / size) to ceil((i + 1) D / size), as PyTorch's adaptive pooling.
    """
    places, weights = _windows(x.shape[-1], size)
    return sum(x[..., p] * w for p, w in zip(places, weights, strict=True))


def average_patches(x: jax.Array, size: int) -> jax.Array:
    """`adaptive_average(unfold(x), size)`: layers (N, H, W, C) to (N, H, W, size).

    Where every window holds whole rows of patches, as with WideResNet50-2, no patch is built.
    """
    height, width, channels = x.shape[1:]
    if 3 * channels % size:
        return adaptive_average(unfold(x), size)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = sum(x[:, :, j : j + width] for j in range(3)) / 3
    rows = jnp.stack([x[:, i : i + height] for i in range(3)], -1)
    return rows.reshape(*rows.shape[:3], size, -1).mean(-1)


def embed(layers: tuple[jax.Array, ...], size: int) -> jax.Array:
    """SimpleNet's embedding of every position of the finest layer (section 3.1).

    Args:
      layers: outputs of the backbone (N, H_i, W_i, C_i), finest first.
      size: channels E of the embedding.

    Returns:
      (N, H_0, W_0, E): each layer's 3x3 patches averaged to E values, brought to the first
      layer's grid (averaging and resizing commute), and all layers' values averaged to E.
    """
    grid = layers[0].shape[1:3]
    parts = [grid_lib.resize(average_patches(x, size), grid) for x in layers]
    return adaptive_average(jnp.concatenate(parts, -1), size)


# Blurred as SciPy's gaussian_filter does it.
_BLUR = {'taps': 33, 'repeat_edge': True}


class SimpleNet(nn.Module):
    """Projection and discriminator, on the embedding.

    Attributes:
      embedding: channels of the embedding and of its projection.
      hidden: width of the discriminator.
    """

    embedding: int = 1536
    hidden: int = 1024

    layers = (2, 3)
    full_size_map = staticmethod(functools.partial(grid_lib.full_size_map, **_BLUR))
    map_matrices = staticmethod(functools.partial(grid_lib.map_matrices, **_BLUR))

    def setup(self):
        self.adaptor = Dense(self.embedding)
        self.discriminator = HingeDiscriminator(self.hidden)

    @nn.nowrap
    def frozen(self, stages: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The embedding: linear in layer2 and layer3, and smaller than their patches."""
        return (embed(grid_lib.select_layers(stages), self.embedding),)

    @staticmethod
    def features(frozen: tuple[jax.Array, ...]) -> jax.Array:
        """(N, H, W, E)."""
        return frozen[0]

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Evaluates embeddings (N, H, W, E): anomaly logits (N, H, W, 1), their maximum (N,)."""
        logits = self.discriminate(self.adapt(features))
        return logits, logits.max((1, 2, 3))

    def adapt(self, features: jax.Array) -> jax.Array:
        """Embeddings (N, H, W, E) -> projected ones (N, H, W, E)."""
        return self.adaptor(features)

    def discriminate(self, projected: jax.Array, train: bool = False) -> jax.Array:
        """Projected embeddings (N, H, W, E) -> anomaly logits (N, H, W, 1)."""
        return self.discriminator(projected, train)


def build_network(config: ml_collections.ConfigDict) -> SuperSimpleNet | GapCam | SimpleNet:
    """The trained network a config describes."""
    match config.system:
        case 'gap_cam':
            return GapCam(config.adaptor, tuple(config.features.layers))
        case 'simplenet':
            return SimpleNet(config.simplenet.embedding, config.simplenet.hidden)
    return SuperSimpleNet(
        config.adaptor,
        config.adapt_cls_features,
        classify=config.image_score == 'head',
        layers=tuple(config.features.layers),
        waves=6 * (config.product.place == 'same'),
    )
