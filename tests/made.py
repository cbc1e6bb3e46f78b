"""Made-up results: a row of a real recipe, and a run's directory that agrees with it."""

import dataclasses
from pathlib import Path

import numpy as np

from ltnorm import resolve as recipes
from ltnorm.reporting import schema
from ltnorm.reporting.schema import Run
from ltnorm.resolve import Overrides

GROUPS = ("head", "head", "head", "head", "medium", "medium", "medium", "tail", "tail", "tail")


def result(norm="bn", seed=0, tail=10.0, all_=50.0, sets=(), flags=None, **changes):
    """A made-up result row of a real recipe."""
    [recipe] = recipes.resolve({}, Overrides(flags or {}, sets, [norm], [seed]))
    row = schema.Result(
        schema=schema.SCHEMA,
        fingerprint=recipe.fingerprint(),
        dataset=recipe.dataset.name,
        profile="exp",
        ratio=recipe.dataset.ratio,
        data_seed=0,
        set_id=f"synthetic-exp{recipe.dataset.ratio:g}",
        index_sha256="ab",
        model="resnet32",
        norm=norm,
        norm_options=", ".join(s.removeprefix("norm.") for s in sets if s.startswith("norm.")),
        loss=recipe.loss.name,
        loss_options=recipe.loss.changes(),
        sampler=recipe.sampler.name,
        retrain=recipe.retrain.method if recipe.retrain else None,
        tau=None,
        first_stage=None,
        tag=None,
        seed=seed,
        epochs=200.0,
        steps=19400,
        batch_size=128,
        lr=recipe.train.lr,
        precision="fp32",
        eval_split="test",
        group_scheme="shots",
        head_classes=4,
        medium_classes=3,
        tail_classes=3,
        all=all_,
        head=80.0,
        medium=40.0,
        tail=tail,
        macro_f1=45.0,
        gmean=30.0,
        worst_class=1.0,
        nll=1.5,
        ece=20.0,
        train_loss=0.1,
        parameters=464154,
        images_processed=2_400_000,
        images_backpropagated=2_400_000,
        train_seconds=100.0,
        images_per_second=1000.0,
        device="cpu",
        torch="2.11.0",
        ltnorm="0.1.0",
        finished="2026-01-01T00:00:00+00:00",
        settings=schema.settings_json(recipe),
    )
    return dataclasses.replace(row, **changes)


def write_run(out: Path, row: schema.Result, images: int = 20, **flags) -> Run:
    """A directory with everything but a checkpoint; the classes of a group are alike in accuracy.

    Predictions are those of ten classes of `images` each, right as often as the row says, and
    which of them are right follows the seed.
    """
    [recipe] = recipes.resolve({}, Overrides(flags, (), [row.norm], [row.seed]))
    directory = out / f"{row.model}-{row.norm}-{row.loss}-{row.fingerprint[:6]}" / f"seed{row.seed}"
    directory.mkdir(parents=True)
    schema.write_text(directory / schema.RECIPE, recipe.to_yaml())
    rng = np.random.default_rng(row.seed)
    accuracy = [getattr(row, group) for group in GROUPS]
    counts = [round(500 * 100 ** (-i / 9)) for i in range(10)]
    rows = zip(range(10), counts, GROUPS, accuracy, strict=True)
    classes = [schema.ClassRow(i, f"class {i}", n, g, images, a) for i, n, g, a in rows]
    schema.write_per_class(directory, classes)
    labels = np.repeat(np.arange(10), images)
    right = [rng.permutation(images) < round(images * (a or 0) / 100) for a in accuracy]
    predicted = np.where(np.concatenate(right), labels, (labels + 1) % 10)
    np.savez_compressed(
        directory / "predictions.npz",
        label=labels.astype(np.int16),
        prediction=predicted.astype(np.int16),
        true_class_probability=np.full(10 * images, 0.5, np.float16),
    )
    header = ("epoch", "lr", "loss", "steps", "images", "seconds", "images_per_second", "accuracy")
    epochs = [(e, row.lr, 2.0 / e, 10, 1280, 1.0, 1280.0, None) for e in range(1, 4)]
    schema.write_rows(directory / "epochs.csv", header, epochs)
    schema.write_result(directory, row)
    return Run(row, directory)
