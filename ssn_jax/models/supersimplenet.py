"""SuperSimpleNet and GAP+CAM: the trained networks on top of the frozen feature grid.

Every network says what of an image is kept during training (`frozen`, from the backbone's layers),
what it reads (`features`, from the frozen part), and how its map becomes one for people
(`full_size_map`).
"""

from flax import linen as nn
import jax

from ssn_jax.models import features as features_lib
from ssn_jax.models.heads import ADAPTORS, CamHead, ClassificationHead, SegmentationHead


def _as_they_are(layers: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return layers


class SuperSimpleNet(nn.Module):
    """Adaptor, segmentation head and classification head.

    Attributes:
      adaptor: 'linear' (published, Scenario A) or 'conv' (Scenario B).
      adapt_cls_features: whether the classification head sees adapted features (first paper,
        ICPR 2024) or the frozen ones (journal version).
    """

    adaptor: str = 'linear'
    adapt_cls_features: bool = False

    frozen = staticmethod(_as_they_are)
    features = staticmethod(features_lib.upscale_pool)
    full_size_map = staticmethod(features_lib.full_size_map)

    def setup(self):
        self.adapt_features = ADAPTORS[self.adaptor](name='adaptor')
        self.seg_head = SegmentationHead()
        self.cls_head = ClassificationHead()

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Evaluates a feature grid (N, H, W, C): anomaly logits (N, H, W, 1), score logits (N,)."""
        return self.discriminate(self.adapt(features), features)

    def adapt(self, features: jax.Array, train: bool = False) -> jax.Array:
        """Features (N, H, W, C) -> adapted features (N, H, W, C)."""
        return self.adapt_features(features, train)

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
        seen = jax.lax.stop_gradient(logits) if stop_map_gradient else logits
        cls_features = adapted if self.adapt_cls_features else features
        return logits, self.cls_head(cls_features, seen, train)


class GapCam(nn.Module):
    """Adaptor and one head, taught by image labels alone; its map explains its score.

    Attributes:
      adaptor: 'linear' (published) or 'conv' (Scenario B).
    """

    adaptor: str = 'linear'

    frozen = staticmethod(_as_they_are)
    features = staticmethod(features_lib.upscale_pool)
    full_size_map = staticmethod(features_lib.full_size_map)

    def setup(self):
        self.adapt_features = ADAPTORS[self.adaptor](name='adaptor')
        self.cls_head = CamHead()

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Evaluates a feature grid (N, H, W, C): map (N, H, W, 1), score logits (N,)."""
        return self.discriminate(self.adapt(features), features)

    def adapt(self, features: jax.Array, train: bool = False) -> jax.Array:
        """Features (N, H, W, C) -> adapted features (N, H, W, C)."""
        return self.adapt_features(features, train)

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
