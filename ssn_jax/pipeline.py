"""The main job: `train_and_evaluate(config, workdir)`, from records to results."""

import contextlib
import dataclasses
import functools
import json
import operator
import pathlib
from typing import NamedTuple

from absl import logging
import jax
import ml_collections
import numpy as np

from ssn_jax import (
    config as config_lib,
    data,
    decision,
    devices,
    evaluate,
    extend,
    metrics,
    precision,
    predictor,
    run as run_lib,
    seeds,
    supervision,
)
from ssn_jax.data import augment, doubts, splits
from ssn_jax.fused import engine, fold
from ssn_jax.models import systems, weights
from ssn_jax.training import loop, parts, product


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    events: bool = False,
    quiet: bool = False,
) -> dict:
    """Trains a config to its last epoch, or resumes it, and measures it there.

    Args:
      config: as `config.default_config` describes it.
      workdir: receives config.json, train.csv, checkpoints/, results.json and figures/; with
        several seeds (`config.seeds`) a folder seed-N for each that does, and summary.json.
      events: whether to write TensorBoard event files to tensorboard/ too.
      quiet: shows no progress bar.

    Returns:
      What results.json holds; of several seeds, what summary.json does.

    Raises:
      UserError: the config, the data, the weights or the workdir are of no use, or something
        became NaN or infinite.
    """
    config_lib.validate(config)
    workdir = pathlib.Path(workdir).expanduser()
    asked = seeds.runs_of(config, workdir)
    for run in asked:
        run_lib.check_workdir(*run)
    if events:
        run_lib.require_tensorboard()
    engine.choose(config.engine)  # What cannot be had is told now.
    precision.check(config)
    folders = [folder for _, folder in asked]
    with run_lib.remembered() as said:
        found = find_backbone(config, folders)
        config = config_lib.with_found(config, found)
        begun = any(run_lib.read_found(folder) is not None for folder in folders)
        material = gather(run_lib.with_white(config) if begun else config, folders)
        if material.dataset.white and not begun:
            found['data.range'] = material.dataset.white
        normal = np.flatnonzero(material.split.labels == 0)
        normal = splits.own_images(material.split, normal)
        found |= product.find(config, normal, material.backbone)
        config = config_lib.with_found(config, found)
        found |= loop.find_lessons(config, material.split)
        config = config_lib.with_found(config, found)

    devices.wait_for_all('workdir checked')  # Before the first one writes there.
    network = systems.build_network(config)
    with contextlib.ExitStack() as running:
        jobs, known = [], []
        for one, folder in asked:
            begun = run_lib.begin(one, found, folder, material.origin, material.backbone, said)
            running.enter_context(begun)
            if masked := supervision.masked_files(material.split):
                run_lib.write(folder / 'masked_images.json', json.dumps(masked, indent=2) + '\n')
            open_log = functools.partial(run_lib.open_log, folder, events=events)

            def keep(epoch, variables, folder=folder):
                run_lib.write_model(folder, run_lib.Model(material.backbone, variables, epoch))

            one = config_lib.with_found(one, found)
            known.append(known_scores(one, folder))
            # What was trained elsewhere cannot be trained again without a part.
            done = known[-1] is not None or (folder / 'imported.json').exists()
            parted = one.decision.parts and not done
            wanted = parts.split(one, material.split, material.groups) if parted else []
            jobs.append(loop.Job(one, folder, open_log, keep, wanted))
        logging.info('Backbone %s, weights: %s', config.backbone.name, material.origin.weights)
        trained = loop.train(jobs, material.split, network, material.backbone, quiet)
        results = [
            measure(job, *end, scores, material)
            for job, end, scores in zip(jobs, trained, known, strict=True)
        ]
        if config.seeds == 1:
            return results[0]
        summary = seeds.summarise(results + seeds.other_results(asked, workdir, results[0]))
        run_lib.write(workdir / 'summary.json', json.dumps(summary, indent=2) + '\n')
        return summary


@dataclasses.dataclass(frozen=True)
class Material:
    """What runs that differ in their seed alone are made from.

    Attributes:
      dataset: as `data.load` returns it.
      split: the training images with what the runs may know of them.
      groups: of these, int (N,): which show the same; None if nobody asks.
      backbone: the frozen variables.
      origin: what data and backbone are told by.
    """

    dataset: data.Dataset
    split: data.Split
    groups: np.ndarray | None
    backbone: dict
    origin: run_lib.Origin


def gather(config: ml_collections.ConfigDict, folders: list[pathlib.Path]) -> Material:
    """Loads data and backbone, and checks that runs that have begun did so with the same."""
    dataset = data.load(config.data, config.image_size, config.resize, config.fit)
    if config.extend:
        extend.check(config, dataset.train)
    split = supervision.training_split(config, dataset.train)
    if not dataset.test.files:
        logging.warning(
            'There are no test images: the threshold is chosen, and nothing can be measured. With '
            'some (in test/good and test/DEFECT, or in --config.data.defect_dir) the same command '
            'measures the run.'
        )
    if split.labels.any():
        logging.info(
            'Supervision: %d defective training images, %d of them with their mask',
            split.labels.sum(),
            len(supervision.masked_files(split)),
        )
    if dataset.embedded:
        logging.warning(
            'No --config.data.root: this run uses the embedded, procedurally drawn %s images. '
            'Its figures say nothing about a real data set.',
            dataset.category,
        )
    extended = [pathlib.Path(config.extend)] if config.extend else []
    backbone, weights_from = load_backbone(config, folders + extended, dataset.embedded)
    went_on_from = ''.join(map(run_lib.model_digest, extended))
    made_from = dataset.fingerprints, weights.digest(backbone), weights_from, went_on_from
    origin = run_lib.Origin(*made_from)
    for folder in folders:
        run_lib.check_origin(folder, origin)
    groups = parts.groups(config, split) if config.decision.parts else None
    return Material(dataset, split, groups, backbone, origin)


def find_backbone(config: ml_collections.ConfigDict, folders: list[pathlib.Path]) -> dict:
    """All fields that a run found for itself when it began; of one that begins, its backbone.

    That is for embedded data, with which a run must begin without network.
    """
    for folder in folders:
        found = run_lib.read_found(folder)
        if found is not None:
            return found
    if config.backbone.weights or not data.is_embedded(config.data):
        return {}
    name = weights.trained_backbone(config.backbone.name)
    return {} if name == config.backbone.name else {'backbone.name': name}


def load_backbone(
    config: ml_collections.ConfigDict, folders: list[pathlib.Path], embedded: bool
) -> tuple[dict, str]:
    """The backbone's variables, and one line on where they come from.

    A run that has begun holds its own, which are taken where none are named, or where those that
    are named are not there any more.
    """
    named = config.backbone.weights
    if not (named and pathlib.Path(named).expanduser().exists()):
        for folder in filter(run_lib.has_model, folders):
            # Its own digest is that of origin.json.
            model = run_lib.read_model(folder, verified=False)
            return model.backbone, run_lib.weights_origin(folder)
    return weights.load_backbone(config.backbone.name, named, allow_random=embedded)


def known_scores(config: ml_collections.ConfigDict, folder: pathlib.Path) -> decision.Scores | None:
    """The scores of a finished run; None if it has none yet."""
    scores = run_lib.read_scores(folder)
    # They are deleted with the network that gave them.
    finished = scores is not None and run_lib.read_model(folder, verified=False)
    return scores if finished and finished.epoch == config.epochs else None


def measure(job, state, log, heads, earlier: decision.Scores | None, material) -> dict:
    """Evaluates a trained run, chooses its threshold and writes both with figures.

    Args:
      job: the run's.
      state: the last one.
      log: the run's train.csv.
      heads: variables of the heads of its parts.
      earlier: the scores that it has, if it was finished before.
      material: what the run is made from.

    Returns:
      Its results, as results.json holds them.
    """
    config, workdir, network = job.config, job.folder, state.variables(job.config.supervision.known)
    dataset, split, backbone = material.dataset, material.split, material.backbone
    job.keep_model(config.epochs, network)
    model = make_model(config, backbone, network, workdir)
    tried, exact = {}, config.precision not in ('auto', 'int8')
    base = model if exact else model.at('float32')
    if earlier:  # They are in the precision that was decided for.
        decided = run_lib.read_json(workdir / 'decision.json') or {}
        known, base = earlier.of('train'), model.at(decided.get('precision', base.precision))
    else:
        known = score_parts(job, heads, base, material)
    normal = split.images[np.flatnonzero(split.labels == 0)[: precision.IMAGES]]
    if not exact:
        model, tried = precision.settle(model, normal)
    judged = judge(config, model, base, known, normal, dataset.test)
    for name in tried:
        of = judged
        if name != model.precision:
            of = judge(config, model.at(name), base, known, normal, dataset.test)
        tried[name] |= {'threshold': of.decision['threshold'], 'metrics': of.metrics}
    scores, maps, values, reasons, chosen, all_scores = judged
    log.close(config.epochs, values)

    history = log.history()
    seconds = history.get('seconds')  # An imported checkpoint was not trained here.
    results = {
        'config': config.name,
        'data': dataset.name,
        'category': dataset.category,
        'embedded': dataset.embedded,
        'seed': config.seed,
        'epochs': config.epochs,
        'backbone': config.backbone.name,
        'weights': material.origin.weights,
        'metrics': values,
        'undefined': reasons,
        'decision': chosen,
        'supervision': config.supervision.kind,
        'train_images': len(split.labels),
        'train_defects': int(split.labels.sum()),
        'train_masks': len(supervision.masked_files(split)),
        'test_images': len(dataset.test.labels),
        'doubts': doubts.count(dataset.doubts),
        'parameters': sum(x.size for x in jax.tree.leaves((backbone['params'], network['params']))),
        'train_seconds': round(sum(seconds), 1) if seconds else None,
        'loss_grew': loss_grew(history),
        # The first epoch after a start compiles: the median leaves it out.
        'seconds_per_epoch': round(float(np.median(seconds)), 2) if seconds else None,
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'data_sha256': material.origin.data,
        'backbone_sha256': material.origin.backbone,
        'versions': run_lib.versions(),
        'engine': model.engine_name,
    }
    if tried:
        results['precisions'] = tried
    if values['I-AUROC'] is not None:
        # As the publication chose it: on the images that it is then measured on.
        results['youden_on_test'] = metrics.youden(scores, dataset.test.labels)
    if chosen['threshold'] is not None:
        results['recall'] = decision.recall_by_defect(all_scores.of('test'), chosen['threshold'])
    if config.extend:
        results['extended'] = extend.compare(config, split, results, all_scores)
    if devices.is_first():
        results['model_sha256'] = run_lib.model_digest(workdir)
        draw_figures(job, results, material, maps, scores, log, all_scores.unseen().map_maximum)
    run_lib.write(workdir / 'scores.csv', all_scores.to_csv())
    run_lib.write(workdir / 'decision.json', json.dumps(chosen, indent=2) + '\n')
    run_lib.write(workdir / 'results.json', json.dumps(results, indent=2) + '\n')
    parts.forget(workdir)
    return results


def make_model(
    config: ml_collections.ConfigDict, backbone: dict, network: dict, workdir: pathlib.Path
) -> predictor.Predictor:
    """A predictor of a run's last epoch."""
    fused = fold.fuse(backbone, network, systems.build_network(config))
    return predictor.Predictor(config, fused, config.epochs, workdir=workdir)


def score_parts(job, heads: list[dict], model, material: Material) -> decision.Scores:
    """The training images' scores by the heads that never saw them.

    Args:
      job: of the run; its parts are those of the heads.
      heads: variables; without any, the run's own head judges.
      model: the run's predictor.
      material: what the run is made from.
    """
    split = material.split
    if not heads:
        if job.config.decision.parts:
            logging.warning(
                'The threshold is chosen on images that were trained on, since no others were kept '
                'from a head: expect more false alarms than are asked for.'
            )
        return evaluate.scores_of(model, split, 'train')
    found = []
    for number, (part, head) in enumerate(zip(job.parts, heads, strict=True), 1):
        judge_of_part = make_model(model.config, material.backbone, head, job.folder)
        found.append(evaluate.scores_of(judge_of_part, splits.take(split, part), str(number)))
    return functools.reduce(operator.add, found)


class Judgement(NamedTuple):
    """What a trained network says of the test split.

    Attributes:
      scores: logits (N,).
      maps: logits (N, H, W).
      metrics: by name, None where undefined.
      undefined: the reasons for that.
      decision: what decision.json holds.
      all_scores: what scores.csv holds.
    """

    scores: np.ndarray
    maps: np.ndarray
    metrics: dict[str, float | None]
    undefined: dict[str, str]
    decision: dict
    all_scores: decision.Scores


def judge(config, model, base, known: decision.Scores, normal, test: data.Split) -> Judgement:
    """Evaluates a trained network, and chooses its threshold.

    Args:
      config: the run's.
      model: the network in some precision.
      base: the network in the precision that the training images were scored in.
      known: the training images' scores.
      normal: normal images, which tell how scores move from one precision to the other.
      test: the split to measure on.
    """
    scores, maps = evaluate.predict(model, test.images)
    values, reasons = evaluate.evaluate(scores, maps, test)
    if model.precision != base.precision and len(normal):
        moved = (model.logits(normal)[0] - base.logits(normal)[0]).mean(dtype=np.float32)
        maxima = known.map_maximum + moved * (config.image_score == 'map')
        known = dataclasses.replace(known, score=known.score + moved, map_maximum=maxima)
    chosen = decision.decide(config, known) | {'precision': model.precision}
    maxima = metrics.maximum(maps, splits.valid(test))
    all_scores = known + evaluate.as_scores(test, scores, maxima, 'test')
    return Judgement(scores, maps, values, reasons, decision.tested(chosen, all_scores), all_scores)


def loss_grew(history: dict[str, list[float]]) -> bool | None:
    """Tells whether the loss ended at more than twice what it began at; None without a history."""
    if not history.get('loss'):
        return None
    first, last = history['loss'][0], history['loss'][-1]
    if last > 2 * first:
        logging.warning(
            'The loss grew from %.4g to %.4g: the training may have diverged.', first, last
        )
    return last > 2 * first


def draw_figures(job, results, material, maps, scores, log, maxima) -> None:
    """Overlays of the best and worst test images, curves, histogram, and what was drawn.

    Args:
      job: the run's.
      results: what results.json holds.
      material: what the run was made from.
      maps: of the test images, logits (N, H, W).
      scores: logits (N,).
      log: the run's train.csv.
      maxima: as of `decision.evidence`.
    """
    # Matplotlib takes a second to import; only here is it needed.
    from ssn_jax.report import figures

    config, folder, split = job.config, job.folder / 'figures', material.dataset.test
    data_name = 'embedded data' if results['embedded'] else results['data']
    title = f'{results["config"]} · {results["category"]} ({data_name})'
    threshold, valid = results['decision']['threshold'], splits.valid(split)
    if split.files:
        masks = np.where(split.has_mask[:, None, None], split.masks, 0)
        evidence = decision.evidence(maps, maxima)
        if valid is not None:
            evidence[~valid] = np.nan  # Such pixels stay bare.
        figures.overlays(
            folder / 'overlays.png',
            split.images,
            masks,
            evidence,
            decision.sigmoid(scores),
            split.labels,
            split.files,
            title,
            evidence=len(maxima) > 0,
        )
        figures.score_histogram(folder / 'scores.png', scores, split.labels, title, threshold)
    curves = {name: column for name, column in log.history().items() if name != 'seconds'}
    if curves:
        figures.loss_curves(folder / 'losses.png', curves, title)
    if results['metrics']['I-AUROC'] is not None:
        figures.roc_curve(folder / 'roc.png', scores, split.labels, f'{title} · test split')
    if results['metrics']['AP-loc'] is not None:
        known = split.has_mask
        if valid is not None:
            known = known[:, None, None] & valid
        figures.pr_curve(folder / 'pixel_pr.png', maps[known], split.masks[known], title)
    if config.drawn.count:
        normal = np.flatnonzero(material.split.labels == 0)
        normal = splits.own_images(material.split, normal)
        # Two of a kind stand one on the other.
        normal = [image for image in normal if image.shape == normal[0].shape]
        what = f'{title} · defects that were drawn into normal images'
        _, real = augment.real_defects(material.split)
        figures.drawn_defects(
            folder / 'drawn.png', normal, config.product, what, config.drawn.seed, real
        )
