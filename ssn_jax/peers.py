"""anomalib's models for images of 256x256, to measure against: optional, for benchmark.py alone."""

from collections.abc import Callable
import functools
from unittest import mock

from anomalib import models
import numpy as np
import timm
import torch

from ssn_jax.fused import engine
from ssn_jax.models import resnet
from ssn_jax.report import published

# OpenVINO's names of the precisions.
_HINTS = {'float32': 'f32', 'bfloat16': 'bf16'}


def _patchcore():
    model = models.Patchcore(backbone='resnet18', pre_trained=False).model
    model.memory_bank = torch.randn(200 * 32 * 32 // 10, 384)  # A tenth of 200 images' patches.
    return model


def _padim():
    model = models.Padim(backbone='resnet18', pre_trained=False).model
    model.gaussian.mean = torch.randn(100, 64 * 64)
    model.gaussian.inv_covariance = torch.randn(64 * 64, 100, 100)
    return model


def _efficientad():
    model = models.EfficientAd(model_size='small').model
    for value in (model.mean_std['std'], model.quantiles['qb_st'], model.quantiles['qb_ae']):
        value.data.fill_(1)  # As if fitted: with zeros the maps are not normalised.
    return model


MODELS = {
    'PatchCore': _patchcore,
    'PaDiM': _padim,
    'STFPM': lambda: models.Stfpm(backbone='resnet18').model,
    'FastFlow': lambda: models.Fastflow(backbone='resnet18', pre_trained=False).model,
    'EfficientAD-S': _efficientad,
    'SuperSimpleNet': lambda: models.Supersimplenet(backbone='resnet18').model,
}


class _Outputs(torch.nn.Module):
    """A model's score and map alone: the rest of what it returns cannot be traced."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        found = self.model(images)
        return found.pred_score, found.anomaly_map


@functools.cache
def build(name: str) -> torch.nn.Module:
    """A model with random weights and statistics, from normalised images to score and map."""
    create = timm.create_model

    def untrained(*args, **options):
        return create(*args, **options | {'pretrained': False})

    # Some ask for trained weights in any case, which would be downloaded.
    with mock.patch.object(timm, 'create_model', untrained):
        return _Outputs(MODELS[name]()).eval()


# TensorFloat-32 is not float32.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@functools.cache
def _convert(name):
    example = torch.zeros(1, 3, 256, 256)
    with torch.inference_mode():
        graph = engine.import_quietly('openvino').convert_model(build(name), example_input=example)
    graph.reshape(list(example.shape))
    return graph


def _normalise(images):
    return np.ascontiguousarray(np.asarray(resnet.normalise(images)).transpose(0, 3, 1, 2))


def _compile_torch(name, precision, images):
    model, x = build(name).to(DEVICE), torch.from_numpy(_normalise(images))
    rounded = torch.autocast(DEVICE, torch.bfloat16, enabled=precision == 'bfloat16')

    def call():
        with torch.inference_mode(), rounded:
            return [y.float().cpu().numpy() for y in model(x.to(DEVICE))]

    return call


def _compile_openvino(name, precision, images):
    options = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': _HINTS[precision]}
    compiled = engine.import_quietly('openvino').compile_model(_convert(name), 'CPU', options)
    request, single = compiled.create_infer_request(), np.split(_normalise(images), len(images))

    def call():  # Image by image, as ours.
        found = [[t.data.copy() for t in _infer(request, x)] for x in single]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    return call


def _infer(request, image):
    request.infer([image])
    return request.output_tensors


def forms(precisions: list[str]) -> list[tuple[dict, Callable]]:
    """The rows of all models, as of `benchmark.our_forms`: PyTorch and, on a CPU, OpenVINO."""
    compilers = {'openvino': _compile_openvino} if DEVICE == 'cpu' else {}
    compilers['torch'] = _compile_torch
    return [
        (
            {
                'name': name,
                'engine': engine_name,
                'precision': precision,
                'image_size': [256, 256],
                'params': sum(p.numel() for p in build(name).parameters()),
                'published': published.PEERS[name],
            },
            functools.partial(compile_form, name, precision),
        )
        for name in MODELS
        for engine_name, compile_form in compilers.items()
        for precision in precisions
        if precision in _HINTS
    ]
