"""SuperSimpleNet and GAP+CAM: the trained networks on top of the frozen feature grid.

Every network says what of an image is kept during training (`frozen`, from the backbone's layers),
what it reads (`features`, from the frozen part), and how its map becomes one for people
(`full_size_map`).
"""

from flax import linen as nn
import jax

from ssn_jax.models import features as features_lib
from ssn_jax.models.heads import ADAPTORS, CamHead, ClassificationHead, SegmentationHead


class _OnFeatureGrid(nn.Module):
    """What both share: they read the upscaled layers through an adaptor.

    Attributes:
      adaptor: 'linear' (published, Scenario A) or 'conv' (Scenario B).
    """

    adaptor: str = 'linear'

    features = staticmethod(features_lib.upscale_pool)
    full_size_map = staticmethod(features_lib.full_size_map)

    @nn.nowrap
    def frozen(self, stages: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The layers that it reads, at their own grids."""
        return features_lib.select_layers(stages, self.layers)

    def setup(self):
        self.adapt_features = ADAPTORS[self.adaptor](name='adaptor')

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
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
      classify: whether there is a classification head; without, the score is the map's maximum.
      layers: of the backbone, as `features.select_layers` takes them.
    """

    adapt_cls_features: bool = False
    classify: bool = True
    layers: tuple[int, ...] = (2, 3)

    def setup(self):
        super().setup()
        self.seg_head = SegmentationHead()
        if self.classify:
            self.cls_head = ClassificationHead()

    def segment(self, adapted: jax.Array, train: bool = False) -> jax.Array:
        """Adapted features (..., C) to anomaly logits (..., 1), each position by itself."""
        return self.seg_head(adapted, train)

    def discriminate(
        self,
        adapted: jax.Array,
        features: jax.Array,
        train: bool = False,
        stop_map_gradient: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Adapted and frozen features, both (N, H, W, C), to anomaly logits and score logits.

        With `stop_map_gradient` the classification loss does not reach the segmentation head
        through the map (unsupervised training).
        """
        logits = self.seg_head(adapted, train)
        if not self.classify:
            return logits, logits.max((1, 2, 3))
        seen = jax.lax.stop_gradient(logits) if stop_map_gradient else logits
        cls_features = adapted if self.adapt_cls_features else features
        return logits, self.cls_head(cls_features, seen, train)


class GapCam(_OnFeatureGrid):
    """Adaptor and one head, taught by image labels alone; its map explains its score.

    Attributes:
      layers: of the backbone, as `features.select_layers` takes them.
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
        del features, stop_map_gradient
        return self.cls_head(adapted, train)
