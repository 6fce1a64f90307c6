"""`convert`: integers that compute, bit for bit, what the fake-quantized model computed."""

from __future__ import annotations

import copy

import crcore_torch as crt
import pytest
import torch
from small_nets import (
    ACTIVATIONS,
    PAIRS,
    WEIGHTS,
    assert_same_bits,
    compiles,
    convnet,
    images,
    mlp,
    recipe,
    sgd,
    snapshot,
    train_step,
    trained,
    vectors,
)
from torch import nn

import crcore as cr


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_student_and_teacher_convert_to_the_bit(weights, activations):
    chosen = cr.Recipe(WEIGHTS[weights], ACTIVATIONS[activations], first_last_bits=None)
    student, teacher = trained(chosen)
    x = 3 * images(16, seed=9)[0]
    for model in (student, teacher):
        converted = crt.convert(model)
        with torch.no_grad():
            expected = (student.eval() if model is student else teacher)(x)
            assert torch.equal(converted(x), expected)
        assert not any(parameter.requires_grad for parameter in converted.parameters())
        assert not any(module.training for module in converted.modules())
        for name, layer in converted.named_modules():
            integers = getattr(layer, "integer_weight", None)
            if integers is None:
                continue
            bits = WEIGHTS[weights].bits + weights.startswith("DoReFa")  # its codes are odd numerators
            span = int(integers.codes.max()) - int(integers.codes.min())
            assert not integers.codes.is_floating_point(), name
            assert span <= 2**bits, name
            if bits <= 8 and "unsigned" not in weights:
                assert integers.codes.dtype == torch.int8, name
            assert layer.weight.equal((integers.codes.float() - integers.zero_point) * integers.scale)
    assert any(isinstance(m, crt.IntegerWeight) for m in converted.modules()) is (weights != "none")


def test_converting_leaves_the_model_as_it_is():
    student, _ = trained(recipe())
    before, kinds = snapshot(student), [type(m) for m in student.modules()]
    crt.convert(student)
    assert_same_bits(before, snapshot(student))
    assert [type(m) for m in student.modules()] == kinds
    assert student.training
    train_step(student, None, sgd(student), images())


def test_the_float_weight_is_gone():
    converted = crt.convert(trained(recipe())[0])
    keys = converted.state_dict().keys()
    assert "0.weight" not in keys
    assert {"0.integer_weight.codes", "0.integer_weight.scale", "0.integer_weight.zero_point"} <= keys
    assert isinstance(converted[0], nn.Conv2d)
    assert "IntegerConv2d" in repr(converted)


@pytest.mark.parametrize("weights", ["LSQ 16 bits", "MinMax affine unsigned", "LSQ unsigned 8 bits", "DoReFa 8 bits"])
def test_the_integers_of_a_trained_model_load_into_a_fresh_converted_one(weights):
    """Even where the fresh weights are all zero, which would fit into fewer bits than the trained ones."""
    chosen = cr.Recipe(WEIGHTS[weights], cr.LSQPlus(4), first_last_bits=None)
    converted = crt.convert(trained(chosen)[0])
    net = convnet()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    fresh = crt.prepare(net, chosen)
    fresh(images()[0])
    fresh = crt.convert(fresh)
    fresh.load_state_dict(converted.state_dict())
    assert_same_bits(snapshot(converted), snapshot(fresh))
    x = images(seed=9)[0]
    assert torch.equal(fresh(x), converted(x))


def test_a_converted_model_can_be_copied_and_pickled(tmp_path):
    converted = crt.convert(trained(recipe())[0])
    torch.save(converted, tmp_path / "model.pt")
    x = images(seed=9)[0]
    for twin in (copy.deepcopy(converted), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(twin(x), converted(x))


def test_tied_weights_share_their_integers():
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["embed"].weight
    student = crt.prepare(net, cr.Recipe(cr.LSQ(4, per_channel=True), None))
    converted = crt.convert(student)
    assert converted["embed"].integer_weight is converted["head"].integer_weight
    assert torch.equal(converted["head"].weight, student["head"].weight)
    tokens = torch.arange(9)
    assert torch.equal(converted["embed"](tokens), student["embed"](tokens))


def test_a_shared_module_is_converted_once():
    shared = nn.Linear(4, 4)
    student = crt.prepare(nn.Sequential(shared, nn.ReLU(), shared), recipe())
    x = torch.randn(5, 4)
    student(x)
    converted = crt.convert(student)
    assert converted[0] is converted[2]
    assert torch.equal(converted(x), student.eval()(x))


def test_the_input_codes_are_integers_in_the_grid():
    converted = crt.convert(trained(cr.Recipe(cr.LSQ(4), cr.LSQPlus(4), first_last_bits=None))[0])
    quantizer = converted[3].input_quantizer
    x = 5 * torch.randn(7, 8, 3, 3)
    codes = quantizer.codes(x)
    assert torch.equal(codes, codes.round())
    assert (codes.min(), codes.max()) == (0, 15)
    assert torch.equal((codes - quantizer.zero_point) * quantizer.scale, quantizer(x))
    assert quantizer(torch.zeros(1, 8)).abs().max() == 0  # real zero


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precisions_convert_to_the_bit(dtype):
    student = crt.prepare(mlp().to(dtype), recipe())
    x = vectors()[0].to(dtype)
    student(x)
    converted = crt.convert(student)
    assert converted[0].integer_weight.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(converted(x), student.eval()(x))


def test_evaluating_a_converted_model_in_train_mode_observes_nothing():
    converted = crt.convert(trained(cr.Recipe(cr.MinMax(4), cr.MinMax(4)))[0])
    before = snapshot(converted[0])
    converted.train()(100.0 * images()[0])
    assert_same_bits(before, snapshot(converted[0]))


@compiles
def test_a_wrapped_student_converts_to_what_is_inside():
    student, _ = trained(recipe())
    converted = crt.convert(torch.compile(student, backend="eager"))
    assert type(converted) is type(student)


def test_what_cannot_be_converted_is_named():
    with pytest.raises(cr.CRCoreError, match="Sequential has no quantized layer; convert takes a model from prepare"):
        crt.convert(convnet())
    with pytest.raises(cr.CRCoreError, match=r"'0.input_quantizer'.*have not seen data yet"):
        crt.convert(crt.prepare(convnet(), recipe()))
    with pytest.raises(cr.CRCoreError, match="has no quantized layer"):
        crt.convert(crt.convert(trained(recipe())[0]))
    student, _ = trained(recipe())
    with pytest.raises(cr.CRCoreError, match=r"float teacher.*convert the student"):
        crt.convert(crt.Teacher(student, cr.EMA(quantized=False)))


@compiles
@pytest.mark.filterwarnings("ignore:.*register_constant:UserWarning")
@pytest.mark.parametrize("form", ["student", "teacher", "converted"])
def test_torch_export_computes_the_same(form):
    student, teacher = trained(recipe())
    model = {"student": student.eval(), "teacher": teacher.model, "converted": crt.convert(student)}[form]
    x = images(4, seed=9)[0]
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=0, atol=0)


class _Functional(nn.Module):
    """Quantizes a matrix of its own, as the message of prepare says."""

    def __init__(self, quantizer):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 4))
        self.quantize = crt.FakeQuantize(quantizer, role="weight").initialize(self.matrix)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(nn.functional.linear(x, self.quantize(self.matrix)))


@pytest.mark.parametrize("quantizer", [cr.MinMax(4), cr.DoReFa(4), cr.LSQ(4)])
def test_a_matrix_of_the_users_own_that_moved_since_the_last_forward_converts_exactly(quantizer):
    student = crt.prepare(_Functional(quantizer), cr.Recipe(cr.LSQ(4), cr.LSQ(4), skip="matrix"))
    x = torch.randn(16, 4)
    student(x)
    with torch.no_grad():
        student.matrix.mul_(1.3).add_(0.1)
    student.eval()
    assert torch.equal(crt.convert(student)(x), student(x))
