"""The published results that this project stands beside; metrics in 0..1.

Schedules: 300 epochs of batch 32 (SimpleNet: 160 of batch 8). Efficiency: one P100.
"""

from collections.abc import Mapping
import dataclasses

import ml_collections

from ssn_jax import config as config_lib

DEVICE = 'P100'


@dataclasses.dataclass(frozen=True)
class Result:
    """One published result.

    Attributes:
      config: the config's name.
      data: the data set, mvtec_ad or ksdd2.
      category: of MVTec AD; '' elsewhere.
      backbone: that it was obtained with.
      metrics: by name, 0..1.
      fields: values of config fields that it holds for.
      masks: of how many defective training images, or None where that plays no role.
      decision: probability, tpr and fpr of the Youden point on the test split, if published.
      note: what else was published.
    """

    config: str
    data: str
    category: str
    backbone: str
    metrics: Mapping[str, float]
    fields: Mapping[str, float] = dataclasses.field(default_factory=dict)
    masks: int | None = None
    decision: Mapping[str, float] = dataclasses.field(default_factory=dict)
    note: str = ''


def _mvtec(config: str, backbone: str, **results: tuple[float, float]) -> list[Result]:
    return [
        Result(config, 'mvtec_ad', category, backbone, {'I-AUROC': auroc, 'AUPRO': aupro})
        for category, (auroc, aupro) in results.items()
    ]


def _screw(config: str, auroc: float, **more) -> Result:
    return Result(config, 'mvtec_ad', 'screw', 'resnet18', {'I-AUROC': auroc}, **more)


def _ksdd2(config: str, metrics: Mapping[str, float], **more) -> Result:
    return Result(config, 'ksdd2', '', 'wide_resnet50_2', metrics, **more)


_AP_LOC = {0: 0.476, 16: 0.591, 53: 0.680, 126: 0.765, 246: 0.813}  # By number of masks.

RESULTS = (
    *_mvtec(
        *('baseline', 'wide_resnet50_2'),
        bottle=(1.0, 0.904),
        carpet=(0.984, 0.923),
        screw=(0.929, 0.953),
    ),
    *_mvtec('mod1_a', 'resnet18', bottle=(1.0, 0.868), carpet=(0.896, 0.863), screw=(0.511, 0.710)),
    *_mvtec(
        'mod1_b', 'resnet18', bottle=(0.713, 0.297), carpet=(0.759, 0.214), screw=(0.466, 0.202)
    ),
    _screw('mod2_v1', 0.398, note='the loss diverges to about 82'),
    *(
        _screw('mod2', auroc, fields={'noise.beta': beta})
        for beta, auroc in {0.1: 0.678, 0.05: 0.723, 0.5: 0.468, 0.0015: 0.484}.items()
    ),
    _ksdd2(*('simplenet', {'AP-det': 0.884}), fields={'image_size': (640, 232), 'resize': (0, 0)}),
    _ksdd2(
        'mod3',
        {'I-AUROC': 0.986, 'AP-det': 0.945, 'P-AUROC': 0.872, 'AUPRO': 0.874, 'AP-loc': 0.074},
        decision={'probability': 0.2489, 'tpr': 0.918, 'fpr': 0.022},
    ),
    *(_ksdd2('mixed', {'AP-loc': value}, masks=masks) for masks, value in _AP_LOC.items()),
    _ksdd2('supervised', {'AP-det': 0.978, 'AP-loc': _AP_LOC[246]}),
)

# Parameters; ms at batch 1, images per second and MB on DEVICE.
EFFICIENCY = {
    'baseline': {'params': 33.7e6, 'ms': 25.58, 'images_per_s': 96.72},
    'mod1_a': {'params': 4.5e6, 'ms': 7.78, 'images_per_s': 398.47, 'mb': 52.43},
    'mod1_b': {'params': 5.7e6, 'ms': 8.36},
}


# What is published of others' models on MVTec AD, means of its categories; docs/inference.md has
# the sources.
PEERS = {
    'PatchCore': {'I-AUROC': 0.990, 'AUPRO': 0.935},
    'PaDiM': {'I-AUROC': 0.953, 'AUPRO': 0.921},
    'STFPM': {'I-AUROC': 0.955, 'AUPRO': 0.921},
    'FastFlow': {'I-AUROC': 0.994, 'AUPRO': None},
    'EfficientAD-S': {'I-AUROC': 0.988, 'AUPRO': 0.931},
    'SuperSimpleNet': {'I-AUROC': 0.984, 'AUPRO': 0.911},
}


# What does not make another system of a run: names, seeds, how often it saw the images (tables say
# how often), what it is measured on (each result says that), the threshold, and how it is computed.
_BESIDE = ('version', 'name', 'seed', 'seeds', 'epochs', 'precision', 'sparse')


def find(config: ml_collections.ConfigDict, results: Mapping) -> Result | None:
    """The published result of what a run was, whatever it is called; None if there is none.

    Args:
      config: the run's, with what it has found for itself.
      results: its results.json.
    """
    found = [
        r
        for r in RESULTS
        if (r.data, r.backbone) == (results['data'], results['backbone'])
        and r.category in ('', results['category'])
        and r.masks in (None, results['train_masks'])
        and _is(config, r)
    ]
    # All masks are published under two names.
    return max(found, key=lambda r: r.config == config.name, default=None)


def _is(config, result):
    """Whether a config is the published one in all that makes its result."""
    ours, theirs = (config_lib.identity(c) for c in (config, config_lib.load(result.config)))
    theirs |= result.fields
    beside = set(_BESIDE) | {f for f in ours if f.startswith(('data.', 'decision.'))}
    if result.masks is not None:
        beside |= {'supervision.mask_fraction', 'supervision.mask_count'}
    return all(ours[f] == theirs[f] for f in ours.keys() - beside)


def epochs(result: Result) -> int:
    """How many epochs a published result was trained."""
    return config_lib.load(result.config).epochs


def efficiency(config: ml_collections.ConfigDict) -> Mapping | None:
    """The published efficiency of a config's network, or None."""
    network = ('system', 'adaptor', 'adapt_cls_features', 'image_score', 'features.layers')
    network += ('backbone.name', 'image_size')
    ours = config_lib.identity(config)
    for name, values in EFFICIENCY.items():
        theirs = config_lib.identity(config_lib.load(name))
        if all(ours[field] == theirs[field] for field in network):
            return values
    return None
