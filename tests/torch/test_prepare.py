"""`prepare`: which layers are quantized, how, and what is said where they cannot be."""

from __future__ import annotations

import copy
import re

import crcore_torch as crt
import pytest
import torch
import torch.nn.functional as F
from small_nets import assert_same_bits, convnet, images, mlp, recipe, snapshot, vectors
from torch import nn

import crcore as cr


class UsersConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 2.0 * self._conv_forward(x, self.weight, self.bias)


class Scaled(nn.Module):
    """Holds a matrix that functional code multiplies with."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return F.linear(self.linear(x), self.table)


KINDS = {
    "Linear": (lambda: nn.Linear(6, 4), (2, 6), (4, 1)),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3), (2, 6, 7), (4, 1, 1)),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3), (2, 6, 7, 7), (4, 1, 1, 1)),
    "Conv3d": (lambda: nn.Conv3d(6, 4, 3), (2, 6, 5, 5, 5), (4, 1, 1, 1, 1)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 4, 3), (2, 6, 7), (1, 4, 1)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 4, 3), (2, 6, 7, 7), (1, 4, 1, 1)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(6, 4, 3), (2, 6, 5, 5, 5), (1, 4, 1, 1, 1)),
    "grouped Conv2d": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 7, 7), (4, 1, 1, 1)),
    "depthwise Conv2d": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 7), (6, 1, 1, 1)),
    "circular Conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 7, 7), (4, 1, 1, 1)),
    "grouped ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 7, 7), (1, 2, 1, 1)),
    "a user's Conv2d": (lambda: UsersConv(6, 4, 3), (2, 6, 7, 7), (4, 1, 1, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_layer_multiplies_quantized_input_with_quantized_weight(kind):
    make, shape, scales = KINDS[kind]
    layer = make()
    student = crt.prepare(nn.Sequential(layer), recipe(3, first_last_bits=None))
    x = torch.randn(shape)
    out = student(x)
    quantized = student[0]
    assert quantized.weight_quantizer.scale.shape == scales
    assert isinstance(quantized, type(layer))
    oracle = copy.deepcopy(layer)
    with torch.no_grad():
        oracle.weight.copy_(quantized.weight_quantizer(layer.weight))
    torch.testing.assert_close(out, oracle(quantized.input_quantizer(x)), rtol=0, atol=0)
    assert not torch.equal(out, layer(x))
    out.square().sum().backward()
    stored = dict(quantized.named_parameters())
    for name in ("weight", "weight_quantizer.scale", "input_quantizer.scale"):
        assert stored[name].grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "Linear"])
def test_the_channel_axis_holds_the_output_channels(kind):
    """One output channel made a thousand times larger leaves the other channels' scales as they were."""
    make, _, scales = KINDS[kind]
    layer = make()
    axis = next(i for i, size in enumerate(scales) if size > 1)
    before = crt.prepare(nn.Sequential(layer), recipe()).get_submodule("0").weight_quantizer.scale.flatten()
    with torch.no_grad():
        layer.weight.select(axis, 1).mul_(1000.0)
    after = crt.prepare(nn.Sequential(layer), recipe()).get_submodule("0").weight_quantizer.scale.flatten()
    changed = (after / before - 1.0).abs() > 1e-3
    assert changed.tolist() == [i == 1 for i in range(len(changed))]


def test_an_embedding_has_a_quantized_table_and_no_input_quantizer():
    student = crt.prepare(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), recipe(2, first_last_bits=None))
    assert isinstance(student[0].input_quantizer, nn.Identity)
    assert student[0].weight_quantizer.scale.shape == (9, 1)
    rows = student[0](torch.arange(9))
    assert all(len(set(row.tolist())) <= 4 for row in rows)  # two bits


def test_a_module_used_twice_is_quantized_once():
    shared = nn.Linear(4, 4)
    student = crt.prepare(nn.Sequential(shared, nn.ReLU(), shared), recipe())
    assert student[0] is student[2]
    assert len({id(m) for m in student.modules() if isinstance(m, crt.FakeQuantize)}) == 2
    student(torch.randn(3, 4)).sum().backward()


def tied() -> nn.ModuleDict:
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "middle": nn.Linear(4, 4), "head": nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["embed"].weight
    return net


def test_tied_weights_stay_tied_and_share_their_quantizer():
    student = crt.prepare(tied(), recipe(3))
    embed, head = student["embed"], student["head"]
    assert embed._parameters["weight"] is head._parameters["weight"]
    assert embed.weight_quantizer is head.weight_quantizer
    assert torch.equal(embed(torch.arange(9)), head.weight)
    assert len(list(student.parameters())) == len({id(p) for p in student.parameters()})


def test_tied_weights_with_two_quantizers_are_an_error_that_changes_nothing():
    net = tied()
    before = snapshot(net)
    with pytest.raises(cr.CRCoreError, match=r"'embed' and 'head' share one weight.*overrides"):
        crt.prepare(net, recipe(overrides={"head": {"weights": cr.LSQ(2)}}), inplace=True)
    assert type(net["embed"]) is nn.Embedding
    assert type(net["head"]) is nn.Linear
    assert_same_bits(before, snapshot(net))


# --- what prepare cannot quantize ------------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4)
        self.cell = nn.GRUCell(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.scaled = Scaled()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):  # [N, T, 4]
        x = self.encoder(self.attention(*[self.linear(x)] * 3)[0])
        x = self.normed(self.scaled(self.lstm(x)[0]))
        return self.head(self.cell(x[:, -1]))


def skip_of(message: str) -> tuple[str, ...]:
    """What a reader would paste from the message."""
    pasted = re.search(r"Recipe\(\.\.\., skip=(\(.*?\))\)", message)
    assert pasted, message
    return eval(pasted[1], {})


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_it_does_not_know_are_named_in_one_message_whose_skip_works(inplace):
    net = Everything()
    before, kinds = snapshot(net), [type(module) for module in net.modules()]
    with pytest.raises(cr.CRCoreError) as raised:
        crt.prepare(net, recipe(), inplace=inplace)
    message = str(raised.value)
    for named in ("'lstm' (LSTM)", "'cell' (GRUCell)", "'attention' (Multi", "'encoder.self_attn'", "'scaled.table'"):
        assert named in message
    assert "'normed' (ParametrizedLinear): its weight is computed" in message
    assert_same_bits(before, snapshot(net))
    assert [type(module) for module in net.modules()] == kinds

    student = crt.prepare(net, recipe(skip=skip_of(message)), inplace=inplace)
    quantized = [name for name, m in student.named_modules() if hasattr(m, "weight_quantizer")]
    assert quantized == ["linear", "encoder.linear1", "encoder.linear2", "scaled.linear", "head"]
    student(torch.randn(2, 3, 4)).sum().backward()


def test_a_skip_that_is_there_already_is_kept_in_the_message():
    net = nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.GRU(4, 4), "c": nn.Linear(4, 4)})
    with pytest.raises(cr.CRCoreError) as raised:
        crt.prepare(net, recipe(skip="a"))
    assert skip_of(str(raised.value)) == ("a", "b")
    assert "'a' (LSTM)" not in str(raised.value)


def test_a_lazy_layer_asks_for_its_first_batch():
    with pytest.raises(cr.CRCoreError, match="no shape yet; run a batch"):
        crt.prepare(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), recipe())


def test_an_embedding_that_renormalises_its_table_is_refused():
    with pytest.raises(cr.CRCoreError, match="max_norm"):
        crt.prepare(nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 4)), recipe())


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        net = mlp()
    with pytest.raises(cr.CRCoreError, match="no values"):
        crt.prepare(net, recipe())


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Sequential(nn.ReLU()), "no layer that prepare can quantize"),
        (nn.ReLU(), "no layer that prepare can quantize"),
        ("resnet18", "takes a torch.nn.Module, got str"),
    ],
)
def test_a_model_without_layers_is_refused(model, match):
    with pytest.raises(cr.CRCoreError, match=match):
        crt.prepare(model, recipe())


def test_a_recipe_that_is_a_quantizer_is_refused():
    with pytest.raises(cr.CRCoreError, match=r"takes a crcore.Recipe, got LSQ"):
        crt.prepare(mlp(), cr.LSQ(4))


def test_preparing_twice_is_refused():
    with pytest.raises(cr.CRCoreError, match="'0' is prepared already"):
        crt.prepare(crt.prepare(mlp(), recipe()), recipe())


@pytest.mark.parametrize("option", [{"skip": ("hed",)}, {"overrides": {"hed": {"weights": None}}}])
def test_a_pattern_without_a_layer_is_refused_and_similar_names_are_shown(option):
    net = nn.ModuleDict({"stem": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    with pytest.raises(cr.CRCoreError, match=r"'hed' matches no layer.*'head'"):
        crt.prepare(net, recipe(**option), inplace=True)
    assert type(net["stem"]) is nn.Linear


# --- what stays as it was --------------------------------------------------------------------------------------------


def test_the_users_model_is_copied_unless_inplace_is_asked_for():
    net = convnet()
    before = snapshot(net)
    student = crt.prepare(net, recipe())
    assert student is not net
    assert type(net[0]) is nn.Conv2d
    with torch.no_grad():
        student[0]._parameters["weight"].zero_()
    assert_same_bits(before, snapshot(net))
    weight = net[0].weight
    assert crt.prepare(net, recipe(), inplace=True) is net
    assert net[0]._parameters["weight"] is weight
    assert type(net[0]).__name__ == "QuantizedConv2d"


def test_float_checkpoint_keys_stay_and_a_float_checkpoint_loads():
    net, trained = convnet(), convnet()
    student = crt.prepare(net, recipe())
    added = student.state_dict().keys() - net.state_dict().keys()
    assert net.state_dict().keys() <= student.state_dict().keys()
    assert all(".weight_quantizer." in key or ".input_quantizer." in key for key in added)
    missing, unexpected = student.load_state_dict(trained.state_dict(), strict=False)
    assert set(missing) == added
    assert not unexpected
    assert torch.equal(student[0]._parameters["weight"], trained[0].weight)


@pytest.mark.parametrize("training", [True, False])
def test_train_or_eval_mode_is_kept(training):
    student = crt.prepare(convnet().train(training), recipe())
    assert all(module.training is training for module in student.modules())


def test_hooks_and_frozen_parameters_are_kept():
    net = mlp()
    net[0].weight.requires_grad_(False)
    seen = []
    net[2].register_forward_hook(lambda *args: seen.append(1))
    student = crt.prepare(net, recipe())
    assert not student[0]._parameters["weight"].requires_grad
    student(vectors()[0]).sum().backward()
    assert seen


def test_a_single_layer_is_a_model():
    student = crt.prepare(nn.Linear(6, 3), recipe())
    assert student.weight_quantizer.quantizer.bits == 8  # first and last
    student(vectors()[0]).sum().backward()
    assert student.input_quantizer.name == "input_quantizer"


def test_float64_models_compute_in_float64():
    student = crt.prepare(mlp().double(), recipe())
    out = student(vectors()[0].double())
    out.sum().backward()
    assert out.dtype == torch.float64
    assert {p.dtype for p in student.parameters()} == {torch.float64}
    assert student[0].weight_quantizer.scale.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_keep_float32_scales(dtype):
    student = crt.prepare(mlp().to(dtype), recipe())
    out = student(vectors()[0].to(dtype))
    out.float().sum().backward()
    assert out.dtype == dtype
    assert student[0].weight_quantizer.scale.dtype == torch.float32
    assert student[0].weight.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_student_can_be_cast_afterwards(dtype):
    student = crt.prepare(mlp(), recipe())
    student(vectors()[0])
    out = student.to(dtype)(vectors()[0].to(dtype))
    out.sum().backward()
    assert out.dtype == dtype


def test_channels_last_is_kept():
    net = convnet()[:7].to(memory_format=torch.channels_last)
    x = images()[0].to(memory_format=torch.channels_last)
    student = crt.prepare(net, recipe(overrides={"0": {"activations": None}}))
    expected = net(x)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    assert student(x).stride() == expected.stride()
    assert student[3].input_quantizer(x).stride() == x.stride()
    assert student[3].weight.stride() == net[3].weight.stride()


def test_the_repr_shows_the_quantizers():
    shown = repr(crt.prepare(mlp(), recipe(4)))
    assert "QuantizedLinear(" in shown
    assert "(weight_quantizer): FakeQuantize(LSQ(bits=4, per_channel=True, signed=True" in shown
    assert "(input_quantizer): FakeQuantize(LSQ(bits=4, per_channel=False, signed=None, narrow=False), kernel=" in shown


# --- the recipe ------------------------------------------------------------------------------------------------------


def bits(student: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    def width(quantizer):
        return quantizer.quantizer.bits if isinstance(quantizer, crt.FakeQuantize) else None

    return {
        name: (width(module.weight_quantizer), width(module.input_quantizer))
        for name, module in student.named_modules()
        if hasattr(module, "weight_quantizer")
    }


def test_first_and_last_layer_have_eight_bits():
    assert bits(crt.prepare(mlp(), recipe(4))) == {"0": (8, 8), "2": (4, 4), "4": (8, 8)}
    assert bits(crt.prepare(mlp(), recipe(4, first_last_bits=None))) == {"0": (4, 4), "2": (4, 4), "4": (4, 4)}


def test_overrides_skip_and_floats_are_followed():
    chosen = recipe(4, overrides={"2": {"weights": cr.MinMax(2)}, "0": {"activations": None}}, skip=("4",))
    student = crt.prepare(mlp(), chosen)
    assert bits(student) == {"0": (8, None), "2": (2, 4)}
    assert type(student[4]) is nn.Linear
    assert isinstance(student[2].weight_quantizer.quantizer, cr.MinMax)
    weightless = crt.prepare(mlp(), cr.Recipe(None, cr.LSQ(4), first_last_bits=None))
    assert bits(weightless) == dict.fromkeys("024", (None, 4))
    assert torch.equal(weightless[0].weight, weightless[0]._parameters["weight"])


# --- torch's fast path ------------------------------------------------------------------------------------------------


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_the_transformer_fast_path_does_not_pass_the_quantizers_by():
    student = crt.prepare(encoder(), recipe(2, skip=("*self_attn",), first_last_bits=None))
    x = torch.randn(2, 5, 8)
    trained = student(x)
    # No hook may be used to look at this: torch leaves the fast path where there is one.
    with torch.no_grad():
        evaluated = student.eval()(x)
    torch.testing.assert_close(evaluated, trained, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        teacher, converted = crt.Teacher(student)(x), crt.convert(student)(x)
    assert torch.equal(teacher, evaluated)
    assert torch.equal(converted, evaluated)


class _NamedOtherwise(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(("layer", "keyword"), [(nn.Linear(4, 3), "input"), (_NamedOtherwise(4, 3), "x")])
def test_a_layer_may_be_called_by_keyword(layer, keyword):
    student = crt.prepare(layer, cr.Recipe(cr.LSQ(4), cr.LSQ(2), first_last_bits=None))
    x = torch.randn(8, 4)
    assert torch.equal(student(x), student(**{keyword: x}))
    assert not torch.equal(student(x), nn.functional.linear(x, student.weight, student.bias))


def test_a_sparse_embedding_is_refused_by_name():
    net = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 2))
    with pytest.raises(cr.CRCoreError, match=r"'0' \(Embedding\): sparse=True"):
        crt.prepare(net, cr.Recipe(cr.LSQ(4), cr.LSQ(4)))
