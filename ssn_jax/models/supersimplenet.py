"""SuperSimpleNet: the trained network on top of the frozen feature grid."""

from flax import linen as nn
import jax

from ssn_jax.models.heads import ADAPTORS, ClassificationHead, SegmentationHead


class SuperSimpleNet(nn.Module):
    """Adaptor, segmentation head and classification head.

    Attributes:
      adaptor: 'linear' (published, Scenario A) or 'conv' (Scenario B).
      adapt_cls_features: whether the classification head sees adapted features (first paper,
        ICPR 2024) or the frozen ones (journal version).
    """

    adaptor: str = 'linear'
    adapt_cls_features: bool = False

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
