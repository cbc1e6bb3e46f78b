import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ltnorm import registry
from ltnorm import resolve as recipes
from ltnorm.errors import UsageError
from ltnorm.resolve import Overrides, resolve
from ltnorm.validation import validate


def test_the_defaults_are_the_standard_recipe():
    recipe = validate({})
    assert recipe.model.name == "resnet32"
    assert recipe.train.model_dump() == validate(recipes.read("cifar10-lt")).train.model_dump()


@pytest.mark.parametrize("name", list(recipes.shipped_recipes()))
def test_every_shipped_recipe_is_valid_and_described(name):
    recipe = validate(recipes.read(name))
    assert recipe.dataset.name in registry.DATASETS
    assert len(recipes.summary(recipes.shipped_recipes()[name])) > 20


def test_every_dataset_names_a_shipped_recipe():
    for entry in registry.DATASETS.values():
        assert entry.recipe in recipes.shipped_recipes()


def test_every_entry_can_be_loaded_and_its_options_have_defaults():
    for kind, table in registry.TABLES.items():
        for name in table:
            assert registry.targets(kind, name)
            registry.options_model(kind, name)()


def test_precedence_recipe_flag_set():
    base = {"train": {"epochs": 1, "lr": 1.0, "batch_size": 1}}
    [recipe] = resolve(
        base, Overrides({"train.lr": 2.0, "train.batch_size": 2}, ["train.batch_size=3"])
    )
    assert (recipe.train.epochs, recipe.train.lr, recipe.train.batch_size) == (1, 2.0, 3)
    assert recipe.train.momentum == 0.9


def test_norms_times_seeds_and_norm_options_where_they_fit():
    made = resolve(
        {},
        Overrides(
            sets=["norm.components=3", "train.lr=2e-1"], norms=["bn", "compound"], seeds=[0, 1]
        ),
    )
    assert [(r.norm.name, r.seed) for r in made] == [
        ("bn", 0),
        ("bn", 1),
        ("compound", 0),
        ("compound", 1),
    ]
    assert "components" not in made[0].norm.options
    assert made[2].norm.options["components"] == 3
    assert {r.train.lr for r in made} == {0.2}


def test_a_new_name_drops_the_options_of_the_old_one():
    base = {
        "norm": {"name": "compound", "components": 3},
        "dataset": {"name": "synthetic", "classes": 5, "ratio": 7},
    }
    [recipe] = resolve(base, Overrides({"dataset.name": "cifar10"}, norms=["bn"]))
    assert recipe.norm.name == "bn"
    assert (recipe.dataset.name, recipe.dataset.ratio) == ("cifar10", 7)
    [kept] = resolve(base, Overrides(norms=["compound"]))
    assert kept.norm.options["components"] == 3
    [by_set] = resolve(base, Overrides(sets=["norm.name=gn"]))
    assert by_set.norm.name == "gn"


def test_options_of_a_section_without_a_name_are_not_lost():
    base = {"norm": {"components": 3}, "dataset": {"classes": 6}}
    [recipe] = resolve(base, Overrides({"dataset.name": "synthetic"}, norms=["compound"]))
    assert recipe.norm.options["components"] == 3
    assert recipe.dataset.options["classes"] == 6
    with pytest.raises(UsageError, match="clases"):
        resolve({"dataset": {"clases": 6}}, Overrides({"dataset.name": "synthetic"}))
    with pytest.raises(UsageError, match=r"norm\.components"):
        resolve(base, Overrides())


def test_yaml_numbers_in_scientific_notation_are_numbers():
    data = yaml.safe_load("train: {weight_decay: 2e-4, lr: 1e-1}")
    assert data["train"]["weight_decay"] == "2e-4"
    assert validate(data).train.weight_decay == 2e-4


def test_all_mistakes_are_told_at_once_with_their_paths():
    with pytest.raises(UsageError) as error:
        validate(
            {
                "train": {"epochs": 0, "epoch": 3},
                "norm": {"name": "compound", "components": 0},
                "dataset": {"rato": 10},
            }
        )
    message = error.value.message
    for part in ("4 mistakes", "train.epochs", "train.epoch:", "norm.components", "dataset.rato"):
        assert part in message
    assert "did you mean 'epochs'" in error.value.hint
    assert "did you mean 'ratio'" in error.value.hint


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"norm": {"name": "compond"}}, "norm.name"),
        ({"norm": "bn"}, "norm"),
        ({"train": None}, "train"),
        ({"eval": {"split": "val"}}, "eval.split"),
        ({"dataset": {"ratio": 0.5}}, "dataset.ratio"),
        ({"dataset": {"ratio": float("nan")}}, "dataset.ratio"),
        ({"train": {"lr": float("inf")}}, "train.lr"),
        ({"device": "gpu"}, "device"),
        ({"tag": "../up"}, "tag"),
        ({"norm": {"name": "split", "affine": "component"}}, "norm.affine"),
        ({"norm": {"name": "compound", "aux_weight": 2}}, "norm.aux_weight"),
        ({"norm": {"name": "compound", "dual_path": False, "consistency": 1}}, "norm.consistency"),
        ({"norm": {"name": "compound", "temperature": float("inf")}}, "norm.temperature"),
        ({"train": {"batch_size": 1}}, "train.batch_size"),
        ({"train": {"nesterov": True, "momentum": 0}}, "train.nesterov"),
        ({"device": "cuda:01"}, "device"),
        ({"seed": [1, 2]}, "seed"),
        ({"optimizer": {}}, "optimizer"),
    ],
)
def test_a_mistake_is_told_by_its_path(data, path):
    with pytest.raises(UsageError) as error:
        validate(data)
    assert error.value.message.startswith(f"{path}:")


@pytest.mark.parametrize("item", ["norm.components", "=3", "norm.components=[1", "norm=gn"])
def test_set_must_be_key_value(item):
    with pytest.raises(UsageError, match="--set"):
        resolve({}, Overrides(sets=[item]))


def test_set_wins_over_flags():
    made = resolve({}, Overrides(norms=["bn"], seeds=[1], sets=["norm.name=gn", "seed=3"]))
    assert [(r.norm.name, r.seed) for r in made] == [("gn", 3)]
    for order in (1, -1):
        sets = ["dataset.classes=6", "dataset.name=synthetic"][::order]
        [recipe] = resolve({"dataset": {"name": "cifar10"}}, Overrides(sets=sets))
        assert recipe.dataset.options["classes"] == 6


def test_mistakes_in_norms_and_elsewhere_are_told_together():
    with pytest.raises(UsageError) as error:
        resolve(
            {},
            Overrides({"train.lr": -1}, ["norm.momentumm=1", "model.name=bar"], ["bn", "foo"]),
        )
    for part in ("4 mistakes", "'foo'", "train.lr", "norm.momentumm", "model.name"):
        assert part in error.value.message


def test_only_the_sections_asked_for_are_looked_up():
    base = {"norm": {"name": "bn", "strange": 1}, "dataset": {"ratio": 7}}
    [recipe] = resolve(base, Overrides(), kinds=["dataset"])
    assert recipe.dataset.options["classes"] == 10


def test_a_norm_option_that_no_norm_has_is_a_mistake():
    with pytest.raises(UsageError, match="none of the norms") as error:
        resolve({}, Overrides(sets=["norm.component=3"], norms=["bn", "compound"]))
    assert "did you mean 'components'" in error.value.hint


def test_the_fingerprint_knows_what_matters():
    base = validate({})
    same = {"seed": 7, "device": "cpu", "eval": {"every": 5}}
    assert validate(same).fingerprint() == base.fingerprint()
    others = [
        {"train": {"lr": 0.2}},
        {"norm": {"name": "gn"}},
        {"norm": {"name": "bn", "momentum": 0.2}},
        {"dataset": {"ratio": 10}},
        {"tag": "x"},
        {"eval": {"groups": "shots"}},
    ]
    prints = {validate(data).fingerprint() for data in others} | {base.fingerprint()}
    assert len(prints) == len(others) + 1
    # Typed values, so that 100 and 100.0 are one ratio.
    assert validate({"dataset": {"ratio": 100}}).fingerprint() == base.fingerprint()


@given(
    lr=st.floats(1e-6, 10),
    epochs=st.integers(1, 1000),
    norm=st.sampled_from(list(registry.NORMS)),
    ratio=st.floats(1, 1000),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_resolved_recipe_repeats_itself(lr, epochs, norm, ratio, seed):
    recipe = validate(
        {
            "train": {"lr": lr, "epochs": epochs},
            "norm": {"name": norm},
            "dataset": {"ratio": ratio},
            "seed": seed,
        }
    )
    again = validate(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


def test_a_recipe_names_no_paths():
    assert "/" not in validate({}).to_yaml()


def test_every_flag_sets_a_key_that_exists():
    from ltnorm.cli.options import RECIPE_FLAGS

    data = validate({}).model_dump()
    options = registry.options_model("dataset", "folder").model_fields
    for path in RECIPE_FLAGS.values():
        if path.partition(".")[0] == "dataset" and path.partition(".")[2] in options:
            continue
        node = data
        for part in path.split("."):
            assert part in node, path
            node = node[part]


def test_one_strength_of_color_jitter_is_that_of_all_but_hue():
    for strengths, expected in (
        (0, (0, 0, 0, 0)),
        (0.4, (0.4, 0.4, 0.4, 0)),
        ([0.4], (0.4, 0, 0, 0)),
        ([0.1, 0.2], (0.1, 0.2, 0, 0)),
        ([0.1, 0.2, 0.3, 0.5], (0.1, 0.2, 0.3, 0.5)),
    ):
        assert validate({"train": {"color_jitter": strengths}}).train.color_jitter == expected
    [recipe] = resolve({}, Overrides(sets=["train.color_jitter=0.4"]))
    assert recipe.train.color_jitter == (0.4, 0.4, 0.4, 0)
    assert validate({"train": {"color_jitter": 0}}).fingerprint() == validate({}).fingerprint()


@pytest.mark.parametrize(
    "train",
    [
        {"color_jitter": -0.1},
        {"color_jitter": [0, 0, 0, 0.6]},
        {"color_jitter": [0.1] * 5},
        {"color_jitter": "much"},
        {"crop_scale": [0.5, 0.2]},
        {"crop_scale": [0, 1]},
        {"crop_scale": 0.5},
        {"crop": "square"},
        {"crop": "resized", "crop_padding": 2},
        {"crop": "padded", "crop_scale": [0.5, 1]},
    ],
)
def test_crops_and_jitter_that_cannot_be_are_named(train):
    key = list(train)[-1]
    with pytest.raises(UsageError, match=f"train.{key}"):
        validate({"train": train})


def test_a_crop_and_its_own_options_go_together():
    assert (
        validate({"train": {"crop": "padded", "crop_padding": 2}}).train.cropped(False) == "padded"
    )
    resized = validate({"train": {"crop": "resized", "crop_scale": [0.5, 1]}}).train
    assert resized.cropped(False) == resized.cropped(True) == "resized"
    auto = validate({}).train
    assert (auto.cropped(files=False), auto.cropped(files=True)) == ("padded", "resized")


def test_workers_are_no_part_of_the_identity_and_not_a_section():
    [recipe] = resolve({}, Overrides(sets=["workers=3"]))
    assert recipe.workers == 3
    assert recipe.fingerprint() == validate({}).fingerprint()
    assert "workers: 3" in recipe.to_yaml()
    for wrong in (-1, 5000, "many"):
        with pytest.raises(UsageError, match="workers"):
            validate({"workers": wrong})
