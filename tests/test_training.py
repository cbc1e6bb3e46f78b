import math

import pytest
import torch
from torch import nn

from ltnorm import losses, models, registry
from ltnorm.console import Output
from ltnorm.data import class_groups
from ltnorm.errors import LtnormError
from ltnorm.norms import norm_layer
from ltnorm.reporting import schema
from ltnorm.training import checkpoint
from ltnorm.training.build import build_model, build_objective, concrete
from ltnorm.training.device import resolve_precision
from ltnorm.training.dual import DualPath
from ltnorm.training.objective import RoutedPath, SinglePath
from ltnorm.training.run import run

NORMS = list(registry.NORMS)
GROUPS = torch.tensor([0, 0, 1, 1])


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    return images, torch.tensor([0, 1, 2, 3, 0, 0, 1, 2])


def objective(kind, norm="compound", norm_options=None, **options):
    torch.manual_seed(0)
    model = models.build("resnet8", 4, norm_layer(norm, **(norm_options or {})))
    return kind(model, losses.build("ce", [10, 6, 4, 2]), GROUPS, **options)


def test_the_statistics_path_shapes_the_components_without_gradient():
    images, labels = batch()
    single, dual = objective(DualPath, dual_path=False), objective(DualPath)
    single(images, labels).backward()
    loss = dual(images, labels)
    loss.backward()
    ours, theirs = dual.model.norm, single.model.norm
    assert (ours.num_batches_tracked, theirs.num_batches_tracked) == (2, 1)
    assert not torch.equal(ours.running_mean, theirs.running_mean)
    assert all(p.grad is not None for p in dual.model.parameters())
    assert (dual.cost, single.cost) == ((2, 1), (1, 1))


def test_the_full_dual_path_is_one_forward_over_both_halves():
    images, labels = batch()
    dual = objective(DualPath, aux_gradient="full", aux_weight=3.0)
    seen = []
    dual.model.norm.register_forward_hook(lambda m, i, o: seen.append((len(o), m.routed.tolist())))
    logits = []
    dual.model.fc.register_forward_hook(lambda m, i, o: logits.append(o))
    loss = dual(images, labels)
    assert seen == [(16, [-1] * 8 + GROUPS[labels].tolist())]
    main, aux = (nn.functional.cross_entropy(half, labels) for half in logits[0].chunk(2))
    torch.testing.assert_close(loss, (main + 3 * aux) / 4)
    assert dual.cost == (2, 2)
    assert dual.model.norm.routed is None


@pytest.mark.parametrize("aux_gradient", ["full", "statistics"])
def test_consistency_ties_the_main_path_to_the_stopped_auxiliary_one(aux_gradient):
    images, labels = batch()
    with_term = objective(DualPath, aux_gradient=aux_gradient, consistency=0.7)
    without = objective(DualPath, aux_gradient=aux_gradient)
    features = []
    with_term.model.fc.register_forward_pre_hook(lambda m, i: features.append(i[0].detach()))
    difference = with_term(images, labels) - without(images, labels)
    if aux_gradient == "full":
        main, aux = features[0].chunk(2)
    else:
        aux, main = features
    cosine = nn.functional.cosine_similarity(with_term.projector(main), aux).mean()
    torch.testing.assert_close(difference, 0.7 * (1 - cosine), rtol=1e-3, atol=1e-5)
    difference.backward()
    assert all(p.grad is not None for p in with_term.projector.parameters())
    own = sum(p.numel() for p in with_term.parameters())
    model = sum(p.numel() for p in with_term.model.parameters())
    assert own - model == 2 * (64 * 64 + 64)


def test_compound_with_one_component_trains_as_bn_at_the_cost_of_bn():
    images, labels = batch()
    one = objective(DualPath, norm_options={"components": 1})
    one = DualPath(one.model, one.loss, torch.zeros(4, dtype=torch.long))
    bn = objective(SinglePath, norm="bn")
    for _ in range(3):
        torch.testing.assert_close(one(images, labels), bn(images, labels))
    assert one.cost == (1, 1)
    torch.testing.assert_close(one.model.norm.running_mean[0], bn.model.norm.running_mean)


def test_one_component_always_on_two_paths_is_bn_under_the_same_objective():
    images, labels = batch()
    options = {"dual_path": "always", "aux_gradient": "full", "consistency": 0.5}
    two = objective(DualPath, norm_options={"components": 1}, **options)
    two.class_group.zero_()
    bn = objective(SinglePath, norm="bn")
    features = []
    bn.model.fc.register_forward_pre_hook(lambda m, i: features.append(i[0].detach()))
    expected = bn(images, labels)
    cosine = nn.functional.cosine_similarity(two.projector(features[0]), features[0]).mean()
    torch.testing.assert_close(two(images, labels), expected + 0.5 * (1 - cosine))
    assert two.cost == (2, 2)
    statistics = objective(DualPath, norm_options={"components": 1}, dual_path="always")
    statistics.class_group.zero_()
    torch.testing.assert_close(statistics(images, labels), expected)
    assert statistics.cost == (2, 1)
    assert statistics.model.norm.num_batches_tracked == 2


def test_two_views_are_counted(tiny_recipe, tiny_set, tmp_path):
    rows = {}
    for views in (1, 2):
        recipe, _ = concrete(tiny_recipe(**{"train.views": views}))
        rows[views] = run(recipe, tiny_set, tmp_path, Output(quiet=True))
    assert rows[2].images_processed == 2 * rows[1].images_processed
    assert rows[2].images_backpropagated == 2 * rows[1].images_backpropagated
    assert (rows[2].epochs, rows[2].steps) == (rows[1].epochs, rows[1].steps)


def test_split_is_routed_by_class_group():
    images, labels = batch()
    routed = objective(RoutedPath, norm="split")
    seen = []
    routed.model.norm.register_forward_hook(lambda m, i, o: seen.append(m.routed.tolist()))
    routed(images, labels).backward()
    assert seen == [GROUPS[labels].tolist()]


def test_split_with_one_group_trains_as_bn():
    images, labels = batch()
    one = objective(RoutedPath, norm="split", norm_options={"components": 1})
    one.class_group.zero_()
    bn = objective(SinglePath, norm="bn")
    torch.testing.assert_close(one(images, labels), bn(images, labels))


@pytest.mark.parametrize("norm", NORMS)
def test_initial_weights_of_a_run_pair_across_norms(tiny_recipe, tiny_set, norm):
    recipes = [tiny_recipe(norm=name, seed=3) for name in ("bn", norm)]
    bn, other = (build_model(recipe, [9, 5, 3, 2], 8) for recipe in recipes)
    assert torch.equal(bn.fc.weight, other.fc.weight)
    assert torch.equal(bn.blocks[1].conv2.weight, other.blocks[1].conv2.weight)


def test_objectives_follow_the_registry(tiny_recipe, tiny_set):
    kinds = {"bn": SinglePath, "gn": SinglePath, "split": RoutedPath, "compound": DualPath}
    for name, kind in kinds.items():
        recipe = tiny_recipe(norm=name)
        made = build_objective(recipe, build_model(recipe, [9, 5, 3, 2], 8), tiny_set.counts)
        assert type(made) is kind
    assert made.class_group.tolist() == class_groups(tiny_set.counts, 2)


@pytest.mark.parametrize("norm", NORMS)
def test_two_runs_of_one_seed_are_identical(tiny_recipe, tiny_set, tmp_path, norm):
    results, weights = [], []
    for attempt in range(2):
        recipe, _ = concrete(tiny_recipe(norm=norm))
        results.append(run(recipe, tiny_set, tmp_path / str(attempt), Output(quiet=True)))
        directory = schema.run_directory(recipe, tmp_path / str(attempt))
        weights.append(checkpoint.load(directory).model)
    for metric in (*schema.METRICS, "train_loss"):
        assert getattr(results[0], metric) == getattr(results[1], metric)
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_another_seed_gives_other_weights(tiny_recipe):
    first, second = (build_model(tiny_recipe(seed=s), [9, 5, 3, 2], 8) for s in (0, 1))
    assert not torch.equal(first.fc.weight, second.fc.weight)


def test_training_lowers_the_loss(tiny_recipe, tiny_set, tmp_path):
    for norm in NORMS:
        recipe, _ = concrete(tiny_recipe(norm=norm, **{"train.epochs": 7}))
        run(recipe, tiny_set, tmp_path, Output(quiet=True))
        rows = (schema.run_directory(recipe, tmp_path) / "epochs.csv").read_text().splitlines()
        assert rows[0] == ("epoch,lr,loss,steps,images,seconds,images_per_second,accuracy")
        first, *others = (float(row.split(",")[2]) for row in rows[1:])
        # The lowest: epochs of five steps go up and down, on other CPUs otherwise.
        assert min(others) < 0.85 * first, norm


def test_images_processed_tell_the_cost_of_the_dual_path(tiny_recipe, tiny_set, tmp_path):
    images = sum(tiny_set.counts) * 2
    for flags, expected in (
        ({}, (2 * images, images)),
        ({"norm.aux_gradient": "full"}, (2 * images, 2 * images)),
        ({"norm.dual_path": False}, (images, images)),
    ):
        recipe, _ = concrete(tiny_recipe(norm="compound", **flags))
        result = run(recipe, tiny_set, tmp_path, Output(quiet=True))
        assert (result.images_processed, result.images_backpropagated) == expected


def test_accuracy_can_be_measured_on_the_way(tiny_recipe, tiny_set, tmp_path):
    recipe, _ = concrete(tiny_recipe(**{"train.epochs": 4, "eval.every": 2}))
    result = run(recipe, tiny_set, tmp_path, Output(quiet=True))
    rows = (schema.run_directory(recipe, tmp_path) / "epochs.csv").read_text().splitlines()[1:]
    measured = [row.split(",")[-1] for row in rows]
    assert measured[0] == measured[2] == ""
    assert float(measured[3]) == result.all
    # Looking on the way changes nothing.
    plain, _ = concrete(tiny_recipe(**{"train.epochs": 4}))
    assert run(plain, tiny_set, tmp_path, Output(quiet=True)).nll == result.nll


def test_divergence_names_epoch_step_and_a_way_out(tiny_recipe, tiny_set, tmp_path):
    recipe, _ = concrete(tiny_recipe(**{"train.lr": 1e30}))
    with pytest.raises(LtnormError, match=r"in epoch \d, step \d") as error:
        run(recipe, tiny_set, tmp_path, Output(quiet=True))
    assert "--lr" in error.value.hint
    assert not schema.finished(schema.run_directory(recipe, tmp_path))


def test_weights_that_diverge_in_the_last_step_are_no_success(tiny_recipe, tiny_set, tmp_path):
    settings = {"train.lr": 1e30, "train.epochs": 1, "train.warmup_epochs": 0}
    recipe, _ = concrete(tiny_recipe(**settings, **{"train.batch_size": sum(tiny_set.counts)}))
    with pytest.raises(LtnormError, match="not finite"):
        run(recipe, tiny_set, tmp_path, Output(quiet=True))
    assert not schema.finished(schema.run_directory(recipe, tmp_path))


def test_bf16_trains(tiny_recipe, tiny_set, tmp_path):
    recipe, reason = concrete(tiny_recipe(norm="compound", **{"train.precision": "bf16"}))
    assert reason == "as asked"
    result = run(recipe, tiny_set, tmp_path, Output(quiet=True))
    assert math.isfinite(result.train_loss)


def test_auto_precision_gives_a_reason():
    precision, reason = resolve_precision("auto", torch.device("cpu"))
    assert precision in ("fp32", "bf16")
    assert reason


@pytest.mark.parametrize("damage", ["truncate", "text", "empty"])
def test_damaged_checkpoints_are_refused(tiny_recipe, tiny_set, tmp_path, damage):
    recipe, _ = concrete(tiny_recipe())
    run(recipe, tiny_set, tmp_path, Output(quiet=True))
    path = schema.run_directory(recipe, tmp_path) / checkpoint.NAME
    content = path.read_bytes()
    path.write_bytes(
        {"truncate": content[: len(content) // 2], "text": b"not a checkpoint", "empty": b""}[
            damage
        ]
    )
    with pytest.raises(LtnormError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("part", [{"recipe": None}, {"model": None}, {"counts": 3}])
def test_checkpoints_with_wrong_parts_are_refused(tmp_path, part):
    whole = {"recipe": "", "counts": [], "index_sha256": "", "epoch": 1, "model": {}}
    torch.save({"format": 1} | whole | part, tmp_path / "odd.pt")
    with pytest.raises(LtnormError, match="lacks parts"):
        checkpoint.load(tmp_path / "odd.pt")


@pytest.mark.parametrize("text", ["a: [1", "- 1", "nonsense"])
def test_checkpoints_with_a_strange_recipe_are_refused(text):
    with pytest.raises(LtnormError, match="recipe"):
        checkpoint.Checkpoint(text, [], "", 1, {}).parsed_recipe()


def test_checkpoints_of_another_format_are_refused(tmp_path):
    torch.save({"format": 99}, tmp_path / "new.pt")
    with pytest.raises(LtnormError, match="format 1"):
        checkpoint.load(tmp_path / "new.pt")
