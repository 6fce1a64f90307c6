"""The recipe: what it accepts, what it assigns, how it is saved, and when two are the same."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crcore as cr
from crcore.testing import recipes

MANY = settings(max_examples=100)
W, A = cr.LSQ(4, per_channel=True), cr.LSQ(4)
LAYERS = ["stem", "blocks.0.conv", "blocks.1.conv", "blocks.1.attention.query", "head"]


def recipe(**options: Any) -> cr.Recipe:
    return cr.Recipe(W, A, **options)


@given(recipe=recipes())
@MANY
def test_a_recipe_survives_json(recipe: cr.Recipe) -> None:
    text = json.dumps(recipe.to_dict())
    again = cr.Recipe.from_dict(json.loads(text))
    assert again == recipe
    assert json.dumps(again.to_dict()) == text
    assert again.skip == recipe.skip


@given(recipe=recipes())
@MANY
def test_a_recipe_survives_deepcopy_and_pickle(recipe: cr.Recipe) -> None:
    assert copy.deepcopy(recipe) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@given(pair=st.tuples(recipes(), recipes()))
@settings(max_examples=40)
def test_recipes_are_equal_exactly_when_their_files_are(pair: tuple[cr.Recipe, cr.Recipe]) -> None:
    one, other = (json.dumps(recipe.to_dict(), sort_keys=True) for recipe in pair)
    assert (one == other) == (pair[0] == pair[1])


SAME = {
    "the sign of weights is known": (cr.Recipe(cr.LSQ(4, signed=True), A), cr.Recipe(cr.LSQ(4), A)),
    "LSQPlus on weights is LSQ": (cr.Recipe(cr.LSQPlus(4), A), cr.Recipe(cr.LSQ(4), A)),
    "weights of MinMax have no running average": (
        cr.Recipe(cr.MinMax(4, momentum=0.5), A),
        cr.Recipe(cr.MinMax(4, symmetric=True), A),
    ),
    "tanh is the rule for DoReFa's weights": (cr.Recipe(cr.DoReFa(4, tanh=True), A), cr.Recipe(cr.DoReFa(4), A)),
    "offsets are unsigned unless given": (
        cr.Recipe(W, cr.LSQPlus(4, signed=False)),
        cr.Recipe(W, cr.LSQPlus(4)),
    ),
    "one pattern may stand alone": (recipe(skip="head"), recipe(skip=("head",))),
    "the order of skip plays no part": (recipe(skip=("a", "b")), recipe(skip=["b", "a", "a"])),
    "the order of overrides plays no part": (
        recipe(overrides={"a": {"weights": None}, "b": {"activations": None, "weights": A}}),
        recipe(overrides={"b": {"weights": cr.LSQ(4, signed=True), "activations": None}, "a": {"weights": None}}),
    ),
    "first and last at the width of all others": (
        cr.Recipe(cr.LSQ(8), cr.LSQ(8), first_last_bits=8),
        cr.Recipe(cr.LSQ(8), cr.LSQ(8), first_last_bits=None),
    ),
    "no quantizer, no width": (cr.Recipe(None, None), cr.Recipe(None, None, first_last_bits=None)),
    "a number is a constant schedule": (
        recipe(consistency=cr.Consistency(weight=2)),
        recipe(consistency=cr.Consistency(weight=cr.linear_ramp(2.0, 9, start=2.0))),
    ),
    "no probability is below zero": (
        recipe(consistency=cr.Consistency(threshold=0.0)),
        recipe(consistency=cr.Consistency()),
    ),
    "a constant decay": (recipe(ema=cr.EMA(0.9)), recipe(ema=cr.EMA(cr.constant(0.9)))),
}
DIFFERENT = {
    "bits": (recipe(), cr.Recipe(cr.LSQ(3, per_channel=True), A)),
    "granularity": (recipe(), cr.Recipe(cr.LSQ(4), A)),
    "the sign of activations": (recipe(), cr.Recipe(W, cr.LSQ(4, signed=False))),
    "kind": (recipe(), cr.Recipe(W, cr.PACT(4))),
    "float weights": (recipe(), cr.Recipe(None, A)),
    "the running average of activations": (cr.Recipe(W, cr.MinMax(4)), cr.Recipe(W, cr.MinMax(4, momentum=0.5))),
    "first and last": (recipe(), recipe(first_last_bits=None)),
    "first and last, one of the two widths": (
        cr.Recipe(cr.LSQ(8), cr.LSQ(4)),
        cr.Recipe(cr.LSQ(8), cr.LSQ(4), first_last_bits=None),
    ),
    "skip": (recipe(), recipe(skip="head")),
    "left out is not float": (
        recipe(overrides={"a": {"weights": A}}),
        recipe(overrides={"a": {"weights": A, "activations": None}}),
    ),
    "consistency": (recipe(), recipe(consistency=cr.Consistency())),
    "divergence": (
        recipe(consistency=cr.Consistency()),
        recipe(consistency=cr.Consistency(cr.js_divergence)),
    ),
    "ema": (recipe(ema=cr.EMA(0.9)), recipe(ema=cr.EMA(0.99))),
}


@pytest.mark.parametrize("case", SAME)
def test_recipes_that_behave_the_same_are_equal(case: str) -> None:
    one, other = SAME[case]
    assert one == other
    assert one.to_dict() == other.to_dict()
    if not one.skip and not one.overrides:
        assert one.assign(LAYERS) == other.assign(LAYERS)


@pytest.mark.parametrize("case", DIFFERENT)
def test_recipes_that_behave_differently_are_not_equal(case: str) -> None:
    one, other = DIFFERENT[case]
    assert one != other
    assert one.to_dict() != other.to_dict()


# assign


def test_the_first_and_the_last_layer_get_8_bits() -> None:
    plan = recipe().assign(LAYERS)
    assert list(plan) == LAYERS
    assert [q.weights.bits for q in plan.values()] == [8, 4, 4, 4, 8]
    assert [q.activations.bits for q in plan.values()] == [8, 4, 4, 4, 8]
    assert all(q.weights.per_channel for q in plan.values())


def test_a_single_layer_is_first_and_last() -> None:
    assert recipe().assign(["only"])["only"].weights.bits == 8
    assert recipe().assign([]) == {}


def test_first_last_bits_none_treats_them_like_the_rest() -> None:
    assert {q.weights.bits for q in recipe(first_last_bits=None).assign(LAYERS).values()} == {4}


def test_a_skipped_layer_is_still_the_first() -> None:
    plan = recipe(skip="stem").assign(LAYERS)
    assert plan["stem"] is None
    assert plan["blocks.0.conv"].weights.bits == 4


def test_an_override_changes_only_the_keys_it_has() -> None:
    plan = recipe(overrides={"blocks.*": {"weights": cr.LSQ(2)}, "head": {"activations": None}}).assign(LAYERS)
    assert (plan["blocks.0.conv"].weights, plan["blocks.0.conv"].activations.bits) == (cr.LSQ(2, signed=True), 4)
    assert (plan["head"].weights.bits, plan["head"].activations) == (8, None)


def test_an_override_wins_over_the_width_of_first_and_last() -> None:
    plan = recipe(overrides={"stem": {"weights": cr.LSQ(3)}}).assign(LAYERS)
    assert (plan["stem"].weights.bits, plan["stem"].activations.bits) == (3, 8)


def test_an_exact_name_wins_over_a_pattern() -> None:
    overrides = {"blocks.*": {"weights": cr.LSQ(2)}, "blocks.1.conv": {"weights": cr.LSQ(6)}}
    for order in (overrides, dict(reversed(overrides.items()))):
        plan = recipe(overrides=order).assign(LAYERS)
        assert [plan[f"blocks.{i}.conv"].weights.bits for i in (0, 1)] == [2, 6]


def test_two_patterns_for_one_layer_are_an_error_that_names_all_three() -> None:
    ambiguous = recipe(overrides={"blocks.*": {"weights": None}, "*.conv": {"weights": None}})
    with pytest.raises(cr.CRCoreError, match=r"\['blocks.\*', '\*.conv'\] all match layer 'blocks.0.conv'; make"):
        ambiguous.assign(LAYERS)


@pytest.mark.parametrize("option", [{"skip": "haed"}, {"overrides": {"haed": {"weights": None}}}])
def test_a_pattern_without_a_layer_is_an_error_that_names_near_ones(option: dict[str, Any]) -> None:
    with pytest.raises(cr.CRCoreError, match=r"pattern 'haed' matches no layer of this model; .*'head'"):
        recipe(**option).assign(LAYERS)


def test_skipping_a_module_skips_what_is_in_it() -> None:
    plan = recipe(skip=("blocks.1",)).assign([*LAYERS, "blocks.10.conv"])
    assert [name for name, q in plan.items() if q is None] == ["blocks.1.conv", "blocks.1.attention.query"]


def test_skip_may_name_modules_that_are_no_layers() -> None:
    assert None not in recipe(skip="rnn").assign(LAYERS, modules=["rnn.cell"]).values()


def test_skip_may_cover_what_overrides_do() -> None:
    plan = recipe(skip="blocks.0.*", overrides={"blocks.*": {"weights": None}}).assign(LAYERS)
    assert plan["blocks.0.conv"] is None


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cr.Recipe(4, A), "weights must be a quantizer such as LSQ.*or None for float; got 4"),
        (lambda: cr.Recipe(cr.LSQ, A), "weights must be a quantizer such as LSQ"),
        (lambda: cr.Recipe(W, W), r"activations are quantized per tensor.*use LSQ\(bits=4\) without per_channel"),
        (lambda: cr.Recipe(cr.PACT(4), A), "PACT quantizes activations, not weights"),
        (lambda: recipe(first_last_bits=0), "bits must be a whole number from 1 to 16, got 0"),
        (lambda: recipe(skip=("a", 3)), "skip takes layer-name patterns, got .*for example skip="),
        (lambda: recipe(skip=7), "skip takes layer-name patterns, got 7"),
        (lambda: recipe(skip=(name for name in "ab")), "skip takes layer-name patterns, got <generator"),
        (lambda: recipe(overrides=["a"]), "overrides maps layer-name patterns to quantizers, got"),
        (lambda: recipe(overrides={"a": W}), r"overrides\['a'\] must be a dictionary with 'weights'"),
        (lambda: recipe(overrides={"a": {}}), r"overrides\['a'\] must be a dictionary"),
        (lambda: recipe(overrides={"a": {"weight": W}}), r"overrides\['a'\] must be a dictionary"),
        (lambda: recipe(overrides={"a": {"activations": W}}), "activations are quantized per tensor"),
        (lambda: recipe(consistency=0.5), "consistency must be a Consistency or None, got 0.5"),
        (lambda: recipe(ema=0.9), "ema must be a EMA or None, got 0.9"),
        (lambda: recipe(dampening=0.1), "dampening must be a Dampening or None, got 0.1"),
        (lambda: recipe(freezing=0.1), "freezing must be a Freezing or None, got 0.1"),
        (lambda: cr.Recipe(None, A, dampening=cr.Dampening(1.0)), "Dampening.*leaves all of them in float"),
        (
            lambda: cr.Recipe(cr.MinMax(4), A, freezing=cr.Freezing(0.1)),
            r"freezing holds weights to the grid of a learned scale, but MinMax\(.*use LSQ for weights",
        ),
        (
            lambda: recipe(dampening=cr.Dampening(1.0), overrides={"a": {"weights": cr.DoReFa(4)}}),
            r"dampening holds weights to the grid of a learned scale, but DoReFa\(",
        ),
        (
            lambda: cr.Recipe(W, cr.LSQPlus(4, signed=True), first_last_bits=1),
            "LSQPlus with 1 signed bit has no zero point",
        ),
        (lambda: cr.Recipe(cr.LSQ(4, narrow=True), A, first_last_bits=1), "narrow leaves a 1-bit grid"),
    ],
)
def test_what_a_recipe_refuses_is_named(make: Any, message: str) -> None:
    with pytest.raises(cr.CRCoreError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "a recipe of version 1 is expected, got 2"),
        ({"version": None}, "a recipe of version 1 is expected, got None"),
        ({"layers": []}, r"unknown: \['layers'\], missing: \[\]"),
        ({"skip": ...}, r"unknown: \[\], missing: \['skip'\]"),
        ({"skip": 5}, "skip takes layer-name patterns"),
        ({"overrides": []}, "overrides maps layer-name patterns"),
        ({"weights": "LSQ"}, "weights must be a quantizer"),
        ({"weights": {"type": "os.system"}}, r"a recipe file can name \[.*'LSQ'.*\], got 'os.system'"),
        ({"weights": {"type": "LSQ"}}, "the recipe's LSQ cannot be read: .*bits"),
        ({"weights": {"type": "LSQ", "bits": 40}}, "bits must be a whole number from 1 to 16, got 40"),
        ({"weights": {"type": "LSQ", "bits": 4, "axis": 0}}, r"LSQ has no \['axis'\]; the recipe comes from another"),
        ({"consistency": {"function": "eval"}}, "a recipe file can name .*got 'eval'"),
        ({"first_last_bits": "8"}, "bits must be a whole number"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(change: dict[str, Any], message: str) -> None:
    data = recipe().to_dict() | change
    data = {name: value for name, value in data.items() if value is not ...}
    with pytest.raises(cr.CRCoreError, match=message):
        cr.Recipe.from_dict(data)


def test_a_recipe_without_remedies_is_saved_as_before_there_were_any() -> None:
    assert not {"dampening", "freezing"} & set(recipe().to_dict())
    given = recipe(freezing=cr.Freezing(0.02))
    assert "dampening" not in given.to_dict()
    assert cr.Recipe.from_dict(given.to_dict()) == given
    assert cr.Recipe.from_dict(recipe().to_dict() | {"dampening": None, "freezing": None}) == recipe()


@pytest.mark.parametrize("data", [None, [], "recipe", 3])
def test_what_is_no_dictionary_is_refused(data: Any) -> None:
    with pytest.raises(cr.CRCoreError, match="a recipe of version 1 is expected"):
        cr.Recipe.from_dict(data)


def test_what_a_file_cannot_name_is_refused() -> None:
    own = recipe(consistency=cr.Consistency(lambda student, teacher, **_: student))
    with pytest.raises(cr.CRCoreError, match="cannot be saved: a recipe file can name"):
        own.to_dict()


def test_a_recipe_of_a_version_without_a_choice_for_batchnorm_is_read() -> None:
    data = recipe(ema=cr.EMA(0.9)).to_dict()
    assert data["ema"].pop("batchnorm") == "average"
    assert cr.Recipe.from_dict(data) == recipe(ema=cr.EMA(0.9))


def test_from_dict_leaves_its_argument_alone() -> None:
    data = recipe(overrides={"a": {"weights": None}}).to_dict()
    before = copy.deepcopy(data)
    cr.Recipe.from_dict(data)
    assert data == before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (cr.EMA(0.99, warmup=1_000), cr.EMA(0.99, warmup=2_000)),  # the cap passes 0.99 at step 890
        (cr.EMA(0.05, warmup=10), cr.EMA(0.05)),  # the cap is never below 0.1
        (cr.Consistency(cr.kl_divergence, weight=0.0), cr.Consistency(cr.js_divergence, weight=0, temperature=2.0)),
        (cr.DoReFa(4, per_channel=True).for_role("activation"), cr.DoReFa(4).for_role("activation")),
        (recipe(dampening=cr.Dampening(0.0)), recipe()),
    ],
)
def test_what_cannot_act_plays_no_part_in_equality(one, other) -> None:
    assert one == other


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_dropping_the_idle_part_of_a_warm_up_changes_no_decay(decay) -> None:
    shortened = cr.EMA(decay, warmup=100_000)
    for step in [*range(1_000), shortened.warmup - 1, shortened.warmup, shortened.warmup + 1, 99_999]:
        if step >= 0:
            assert shortened.decay_at(step) == min(decay, (1 + step) / (10 + step))
    assert cr.EMA(decay, warmup=20) != cr.EMA(decay, warmup=10) or decay <= 11 / 20


@pytest.mark.parametrize(
    "make",
    [
        lambda: cr.EMA(quantized="no"),
        lambda: cr.EMA(batchnorm="freeze"),
        lambda: cr.Consistency(temperature="hot"),
        lambda: cr.Consistency(threshold="high"),
        lambda: cr.MinMax(4, momentum="slow"),
        lambda: cr.Recipe(cr.LSQ(4), None, overrides={3: {"weights": None}}),
    ],
)
def test_a_value_of_the_wrong_kind_is_a_clear_error(make) -> None:
    with pytest.raises(cr.CRCoreError):
        make()
