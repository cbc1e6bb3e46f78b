"""The figure of `compare --plot`, from made results whose numbers are known."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ltnorm import resolve as recipes
from ltnorm.data.longtail import long_tail_counts, report_groups
from ltnorm.reporting import panels, schema
from ltnorm.reporting.schema import Run
from ltnorm.resolve import Overrides

EPOCHS = 6
NORMS = ("bn", "gn", "split", "compound")


@dataclasses.dataclass
class Tree:
    """Made runs in a folder, with numbers that follow from norm, seed and class."""

    root: Path

    def run(
        self,
        norm="bn",
        seed=0,
        sets=(),
        classes=10,
        ratio=100,
        names=None,
        epochs=EPOCHS,
        **changes,
    ) -> Run:
        """Write one run, with all its files."""
        flags = {"dataset.ratio": ratio, "train.epochs": 200}
        [recipe] = recipes.resolve({}, Overrides(flags, list(sets), [norm], [seed]))
        counts = long_tail_counts(5000, classes, ratio)
        scheme, groups = report_groups(counts)
        rng = np.random.default_rng([seed, *f"{norm}{sets}{ratio}".encode()])
        falling = np.linspace(90, 20, classes)
        accuracy = np.clip(falling + rng.normal(0, 4, classes), 0, 100).round(2)
        of = {
            g: [a for a, h in zip(accuracy, groups, strict=True) if h == g] for g in panels.GROUPS
        }
        means = {g: float(np.mean(values)) if values else None for g, values in of.items()}
        fields = {
            "schema": schema.SCHEMA,
            "fingerprint": recipe.fingerprint(),
            "dataset": recipe.dataset.name,
            "profile": "exp",
            "ratio": float(ratio),
            "set_id": f"made-exp{ratio:g}",
            "index_sha256": f"{ratio}-{classes}",
            "model": "resnet32",
            "norm": norm,
            "norm_options": ", ".join(s.removeprefix("norm.") for s in sets),
            "loss": recipe.loss.name,
            "sampler": recipe.sampler.name,
            "retrain": None,
            "tag": None,
            "seed": seed,
            "eval_split": "test",
            "group_scheme": scheme,
            **{f"{g}_classes": len(values) for g, values in of.items()},
            **means,
            "all": float(accuracy.mean()),
            "device": "cpu",
            "settings": schema.settings_json(recipe),
        } | changes
        filler = {"str": "", "int": 1, "float": 1.0}
        kinds = {
            f.name: str(getattr(f.type, "__name__", f.type))
            for f in dataclasses.fields(schema.Result)
        }
        full = {name: filler.get(kind.split(" ")[0]) for name, kind in kinds.items()} | fields
        run = Run(schema.Result(**full), self._directory(recipe, seed))
        self._write(run, names or [f"class-{i}" for i in range(classes)], counts, groups, accuracy)
        self._write_epochs(run, epochs, seed)
        return run

    def _directory(self, recipe, seed) -> Path:
        directory = self.root / recipe.fingerprint()[:12] / f"seed{seed}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _write(self, run, names, counts, groups, accuracy) -> None:
        schema.write_result(run.directory, run.result)
        cells = zip(names, counts, groups, accuracy, strict=True)
        rows = [(i, name, n, group, 50, a) for i, (name, n, group, a) in enumerate(cells)]
        header = ("class", "name", "train_images", "group", "eval_images", "accuracy")
        schema.write_rows(run.directory / "per_class.csv", header, rows)

    def _write_epochs(self, run, epochs, seed) -> None:
        header = (
            "epoch",
            "lr",
            "loss",
            "steps",
            "images",
            "seconds",
            "images_per_second",
            "accuracy",
        )
        rows = [
            (e, 0.1, 2.0 / e + 0.1 * seed, 1, 1, 1.0, 1.0, 10.0 * e + seed if e % 2 == 0 else None)
            for e in range(1, epochs + 1)
        ]
        schema.write_rows(run.directory / "epochs.csv", header, rows)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "results")
