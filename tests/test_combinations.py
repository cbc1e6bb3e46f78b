"""Norms crossed with what they are compared under."""

import itertools
import json

import pytest
import torch

from ltnorm import registry
from ltnorm.data.augment import Batch
from ltnorm.errors import UsageError
from ltnorm.models import CosineLinear, classifier
from ltnorm.norms import norm_layers
from ltnorm.resolve import Overrides, resolve
from ltnorm.training import build, optim
from ltnorm.training.loop import step
from ltnorm.training.run import norm_parameters
from ltnorm.validation import validate

COUNTS = [40, 20, 8, 3]


def recipe_of(norm, **flags):
    base = {"model": {"name": "resnet8"}, "train": {"lr": 0.02, "precision": "fp32"}}
    [recipe] = resolve(base, Overrides(flags, norms=[norm]))
    return recipe


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    return Batch(torch.randn(8, 3, 8, 8, generator=generator), labels)


@pytest.mark.parametrize("norm", registry.NORMS)
@pytest.mark.parametrize("loss", registry.LOSSES)
def test_every_pair_of_norm_and_loss_trains(norm, loss):
    recipe = recipe_of(norm, **{"loss.name": loss, "loss.schedule": "drw", "loss.drw_start": 0.5})
    model = build.build_model(recipe, COUNTS, 8)
    objective = build.build_objective(recipe, model, COUNTS)
    optimizer = optim.build(recipe.train, objective.parameters())
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for i, done in enumerate((0.0, 0.5)):  # before and after the weights set in
        objective.set_progress(done)
        assert step(objective, optimizer, batch(i), recipe.train).isfinite()
    assert all(b.isfinite().all() for b in model.buffers())
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    assert not torch.equal(classifier(model).weight, before["fc.weight"])
    logits = model.eval()(batch(2).images)
    assert logits.isfinite().all()


@pytest.mark.parametrize("norm", ["bn", "split", "compound"])
@pytest.mark.parametrize(
    ("sampler", "optimizer", "more"),
    [
        ("sqrt", "sam", {"train.mixup": 1.0}),
        ("balanced", "adamw", {"train.cutmix": 1.0, "train.decay_norm": False}),
        ("progressive", "sgd", {"train.ema": 0.9, "train.clip_grad": 0.1}),
        ("effective", "sgd", {"train.auto_augment": "randaugment", "train.cutout": 2}),
    ],
)
def test_the_rest_crosses_as_well(ltnorm, norm, sampler, optimizer, more):
    sets = [f"{key}={value}" for key, value in more.items()]
    flags = itertools.chain.from_iterable(("--set", item) for item in sets)
    answer = ltnorm(
        f"train --recipe tiny.yaml --norm {norm} --epochs 5 --loss balanced-softmax --schedule drw "
        f"--sampler {sampler} --optimizer {optimizer} --lr 0.003 --batch-size 26 --quiet",
        *flags,
    )
    assert answer.code == 0, answer.err
    assert f"resnet8-{norm}-balanced-softmax-drw-{sampler}/seed0" in answer.out


@pytest.mark.parametrize("name", registry.LOSSES)
def test_the_registry_says_what_a_loss_is_defined_with(name):
    loss = build.build_loss(validate({"loss": {"name": name}}).loss, COUNTS)
    entry = registry.LOSSES[name]
    assert (loss.cosine_scale is not None) == entry.cosine
    assert (loss.active_weight.std() > 0) == (entry.weights != "none")


def test_a_loss_on_cosines_gets_a_cosine_classifier():
    recipe = recipe_of("bn", **{"loss.name": "ldam", "loss.scale": 16.0})
    model = build.build_model(recipe, COUNTS, 8)
    layer = classifier(model)
    assert isinstance(layer, CosineLinear)
    assert (layer.scale, layer.bias) == (16.0, None)
    assert model.eval()(batch(0).images).abs().max() <= 16
    # All else starts as with any other loss.
    plain = build.build_model(recipe_of("bn"), COUNTS, 8)
    assert torch.equal(model.blocks[0].conv1.weight, plain.blocks[0].conv1.weight)


def test_sigmoid_losses_start_at_equal_probabilities():
    recipe = recipe_of("bn", **{"loss.name": "cb"})
    bias = classifier(build.build_model(recipe, COUNTS, 8)).bias
    torch.testing.assert_close(bias.sigmoid(), torch.full((4,), 0.25))


def test_norm_parameters_are_those_of_the_norm_layers():
    model = build.build_model(recipe_of("compound"), COUNTS, 8)
    names = {
        f"{path}.{name}"
        for path, layer in norm_layers(model, "compound").items()
        for name, _ in layer.named_parameters()
    }
    parameters = dict(model.named_parameters())
    assert {id(parameters[n]) for n in names} == {id(p) for p in norm_parameters(model, "compound")}
    assert not any("conv" in n or "fc" in n for n in names)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"loss": {"name": "ce", "schedule": "drw", "weights": "none"}}, "loss.schedule"),
        ({"loss": {"name": "cb", "weights": "inverse"}}, "loss.weights"),
        ({"loss": {"name": "weighted-ce", "weights": "none"}}, "loss.weights"),
        ({"loss": {"name": "ce", "beta": 0.9}}, "loss.beta"),
        ({"loss": {"name": "ce", "drw_start": 0.5}}, "loss.drw_start"),
        ({"loss": {"schedule": "drw"}, "train": {"epochs": 4}}, "loss.drw_start"),
        ({"loss": {"schedule": "drw"}, "train": {"steps": 4}}, "loss.drw_start"),
        ({"train": {"epochs": 4, "warmup": 0.1}}, "train.warmup"),
        ({"retrain": {"method": "tau-norm", "tau": 1e6}}, "retrain.tau"),
        ({"train": {"schedule": "cosine", "decay": 0.1}}, "train.decay"),
        ({"loss": {"name": "cb", "base": "softmax", "gamma": 2.0}}, "loss.gamma"),
        ({"loss": {"name": "ldam", "tau": 1.0}}, "loss.tau"),
        ({"loss": {"name": "focal", "label_smoothing": 0.1}}, "loss.label_smoothing"),
        ({"sampler": {"name": "sqrt", "beta": 0.9}}, "sampler.beta"),
        ({"sampler": {"name": "square"}}, "sampler.name"),
        ({"train": {"optimizer": "adamw", "nesterov": True}}, "train.nesterov"),
        ({"train": {"optimizer": "adamw", "momentum": 0.5}}, "train.momentum"),
        ({"train": {"betas": [0.8, 0.9]}}, "train.betas"),
        ({"train": {"sam_rho": 0.1}}, "train.sam_rho"),
        ({"train": {"epochs": 3, "steps": 4}}, "train.steps"),
        ({"train": {"seconds": 0}}, "train.seconds"),
        ({"train": {"mixup": -1}}, "train.mixup"),
        ({"train": {"auto_augment": "cifar"}}, "train.auto_augment"),
        ({"train": {"ema": 1.0}}, "train.ema"),
        ({"model": {"pretrained": "weights.pth"}}, "model.pretrained"),
        ({"retrain": {"method": "crt", "lr": 0}}, "retrain.lr"),
        ({"retrain": {"method": "knn"}}, "retrain.method"),
        ({"retrain": {"epochs": 3}}, "retrain.method"),
        ({"retrain": {"method": "crt", "loss": {"name": "foo"}}}, "retrain.loss.name"),
        ({"retrain": {"method": "crt", "sampler": {"beta": 1}}}, "retrain.sampler.beta"),
        ({"retrain": {"method": "crt", "loss": {"name": "ldam"}}}, "retrain.loss.name"),
        ({"retrain": {"method": "lws"}, "loss": {"name": "ldam"}}, "retrain.method"),
        ({"retrain": {"method": "ncm", "epochs": 3}}, "retrain.epochs"),
        ({"retrain": {"method": "ncm", "sampler": {"name": "sqrt"}}}, "retrain.sampler"),
        ({"retrain": {"method": "tau-norm"}}, "retrain.tau"),
        ({"retrain": {"method": "crt", "tau": 1}}, "retrain.tau"),
        ({"retrain": "crt"}, "retrain"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_path(data, said):
    with pytest.raises(UsageError) as error:
        validate(data)
    assert error.value.message.startswith(f"{said}:"), error.value.message


def test_weights_follow_from_loss_and_schedule():
    def weights(**loss):
        return validate({"loss": loss}).loss.class_weights

    assert weights(name="ce") == "none"
    assert weights(name="ce", weights="inverse") == "inverse"
    assert weights(name="ce", schedule="drw") == "effective"
    assert weights(name="ldam", schedule="drw", weights="inverse") == "inverse"
    assert weights(name="weighted-ce", schedule="drw") == "inverse"
    assert weights(name="cb") == "effective"


def test_one_schedule_flag_for_weights_and_rates(ltnorm, failing):
    answer = ltnorm(
        "train --recipe tiny.yaml --epochs 5 --schedule drw --schedule multistep --dry-run"
    )
    assert answer.code == 0, answer.err
    assert "schedule: drw" in answer.out
    assert "schedule: step" in answer.out
    assert "did you mean 'cosine'" in failing("train --schedule cosin", code=2)
    assert "contradict" in failing("train --schedule cosine --schedule step", code=2)
    assert ltnorm("train --recipe smoke --schedule step --schedule multistep --dry-run").code == 0


def test_a_budget_takes_the_place_of_the_recipes(ltnorm, failing):
    for flag, shown in (("--steps 7", "steps: 7"), ("--seconds 0.5", "seconds: 0.5")):
        answer = ltnorm(f"train --recipe tiny.yaml {flag} --dry-run")
        assert shown in answer.out
        assert "epochs: null" in answer.out
    trained = ltnorm("train --recipe tiny.yaml --steps 3 --norm bn --norm gn --quiet")
    assert "· 3 steps\n" in trained.out
    assert "train.steps: input should be greater" in failing("train --steps 0", code=2)
    assert "one budget" in failing("train --steps 5 --seconds 3", code=2)
    assert "one budget" in failing("train --set train.steps=5 --set train.epochs=3", code=2)


def test_class_weights_set_in_within_an_epoch_of_a_budget_of_steps(ltnorm):
    def loss(*flags):
        command = "train --recipe tiny.yaml --norm bn --steps 3 --json --quiet"
        return json.loads(ltnorm(command, *flags).out)["runs"][0]["train_loss"]

    plain = loss()
    assert loss("--schedule", "drw", "--set", "loss.drw_start=0.5") != plain
    answer = ltnorm("train --recipe tiny.yaml --steps 3 --schedule drw --quiet")
    assert answer.code == 2  # of three steps none starts after four fifths


def test_doubtful_settings_are_told_and_run(ltnorm):
    command = "train --recipe tiny.yaml --epochs 1 --quiet --optimizer adamw --lr 0.1"
    assert "warm-up" not in ltnorm(command).err
    answer = ltnorm(f"{command} --set train.warmup_epochs=2")
    assert answer.code == 0
    assert "ends at 0.05 of 0.1" in answer.err
    assert "AdamW mostly takes" in answer.err


def test_two_names_of_one_experiment_have_one_identity():
    def fingerprint(**sections):
        return validate(sections).fingerprint()

    cb = fingerprint(loss={"name": "cb"})
    assert fingerprint(loss={"name": "cb", "weights": "effective"}) == cb
    assert fingerprint(loss={"name": "ldam", "weights": "none"}) == fingerprint(
        loss={"name": "ldam"}
    )
    steps = fingerprint(train={"steps": 7})
    assert fingerprint(train={"steps": 7, "warmup_epochs": 3}) == steps
    assert fingerprint(train={"steps": 7, "warmup": 0.3}) != steps
    ordered = {"milestones": [0.5, 0.9]}
    assert fingerprint(train={"milestones": [0.9, 0.5]}) == fingerprint(train=ordered)
