"""torch.fx, feature extractors, TorchScript, torch.export, ONNX: of a patched model, or by name
refused; and of what unpatch(model, merge=True) leaves."""

import collections

import pytest
import timm
import torch
import torchvision
import transformers
from timm.models._features_fx import GraphExtractNet
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import fused_lora
from fused_lora.nn.child_adapters import FusedLoRAConv2d
from tests.patching.models import build, wake

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def shallow():
    return build(depth=1)


def hf():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config).eval()


def torchvision_vit():
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model.eval()


def torchvision_swin():
    return torchvision.models.SwinTransformer([4, 4], 24, [2], [2], [4, 4], num_classes=3).eval()


def beit():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
    return timm.create_model("beit_base_patch16_224", depth=1, num_classes=5, **sizes).eval()


def timm_swin():
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, depths=(1, 1), num_heads=(2, 2), **sizes).eval()


FOLLOWED = {"timm": build, "timm Swin": timm_swin, "torchvision": torchvision_vit}
READ = {"timm BEiT": beit, "torchvision Swin": torchvision_swin}  # weights read while tracing
EVERY = FOLLOWED | READ | {"transformers": hf}
TRACERS = {
    "fx": torch.fx.symbolic_trace,
    "features": lambda model: create_feature_extractor(model, [_last(model)]),
    "GraphExtractNet": lambda model: GraphExtractNet(model, [_last(model)]),
}
every_tracer = pytest.mark.parametrize("tracer", TRACERS)
followed = pytest.mark.parametrize("name", FOLLOWED)
pytestmark = pytest.mark.filterwarnings("ignore")


def _last(model):
    """The node of the head."""
    return get_graph_node_names(model)[1][-1]


def result(y):
    y = next(iter(y.values())) if isinstance(y, dict) else y
    return getattr(y, "logits", y)


def patched(make, **options):
    torch.manual_seed(0)
    model = make()
    fused_lora.patch(model, rank=4, **options)
    return wake(model)


def plain_class(model):
    return not any("fused_lora" in type(m).__module__ for m in model.modules())


@pytest.mark.parametrize("tracer", [*TRACERS, "TorchScript"])
def test_after_unpatch_it_is_traced(tracer):
    model = patched(build)
    y = model(X).detach()
    fused_lora.unpatch(model, merge=True)
    trace = torch.jit.script if tracer == "TorchScript" else TRACERS[tracer]
    torch.testing.assert_close(result(trace(model)(X)).detach(), y, **CLOSE)


class TestFx:
    @followed
    @every_tracer
    @pytest.mark.parametrize("level", ["block", "linear"])
    def test_an_adapted_linear_is_one_node(self, name, tracer, level):
        """Values and gradients are the model's; what is written later is seen by both."""
        model = patched(FOLLOWED[name], level=level)
        traced = TRACERS[tracer](model)
        trained = [p for p in model.parameters() if p.requires_grad]
        for _ in range(2):
            y, found = result(model(X)), result(traced(X))
            torch.testing.assert_close(found, y, **CLOSE)
            ours, theirs = (torch.autograd.grad(t.square().sum(), trained) for t in (found, y))
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, **CLOSE)
            before = y.detach()
            with torch.no_grad():
                for parameter in trained:
                    parameter.add_(0.05)
        assert float((result(model(X)) - before).abs().max()) > 1e-3

    @followed
    def test_the_nodes_are_those_of_the_plain_model(self, name):
        model = FOLLOWED[name]()
        names = get_graph_node_names(model)
        fused_lora.patch(model, rank=4)
        assert get_graph_node_names(model) == names

    @followed
    def test_merged_and_disabled_later_it_computes_what_the_model_does(self, name):
        model = patched(FOLLOWED[name]).eval()
        traced, y = torch.fx.symbolic_trace(model), model(X).detach()
        with torch.no_grad():
            fused_lora.merge(model)
            torch.testing.assert_close(traced(X), y, **CLOSE)
            fused_lora.unmerge(model)
            with fused_lora.disable(model):
                base = traced(X)
                torch.testing.assert_close(base, model(X), **CLOSE)
            assert float((base - y).abs().max()) > 1e-3
            torch.testing.assert_close(traced(X), y, **CLOSE)

    @pytest.mark.parametrize("name", READ)
    @every_tracer
    def test_a_weight_that_is_read_would_be_a_constant_and_is_refused(self, name, tracer):
        model = patched(READ[name])
        y = model(X).detach()
        with pytest.raises(RuntimeError, match=r"adapted weight.*unpatch first: .*merge=True"):
            TRACERS[tracer](model)
        model.eval()  # torchvision's tracer trains and evaluates, and stopped in between
        torch.testing.assert_close(model(X).detach(), y, **CLOSE)
        fused_lora.unpatch(model, merge=True)
        torch.testing.assert_close(result(TRACERS[tracer](model)(X)).detach(), y, **CLOSE)

    def test_linears_and_convolutions_on_their_own(self):
        torch.manual_seed(0)
        conv = FusedLoRAConv2d.adopt(nn.Conv2d(3, 4, 3), rank=2)
        around = fused_lora.nn.adopt_additive(nn.Linear(4, 4), rank=2)
        linear = fused_lora.FusedLoRALinear(4, 4, rank=2)
        model = wake(nn.Sequential(conv, nn.Flatten(2), nn.Linear(900, 4), around, linear))
        traced = torch.fx.symbolic_trace(model)
        assert [n.op for n in traced.graph.nodes][1:-1] == ["call_module"] * 5
        torch.testing.assert_close(traced(X), model(X))
        with pytest.raises(RuntimeError, match="FusedLoRALinear is one node of the model that hol"):
            torch.fx.symbolic_trace(linear)

    def test_a_live_peft_model(self):
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["qkv", "fc1"]))
        wake(model)
        fused_lora.patch(model)
        base = model.base_model.model
        traced = torch.fx.symbolic_trace(base)
        torch.testing.assert_close(traced(X), model(X), **CLOSE)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_torchscript_is_refused_by_name_and_the_model_stays_as_it_was(name, merged):
    model = patched(EVERY[name]).eval()
    y = result(model(X)).detach()
    if merged:
        fused_lora.merge(model)
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile a \w+: unpatch first"):
        torch.jit.script(model)
    torch.testing.assert_close(result(model(X)).detach(), y, **CLOSE)
    fused_lora.unpatch(model)
    assert plain_class(model)


@pytest.mark.parametrize("name", ["timm", "timm BEiT", "torchvision"])
def test_jit_trace_records_the_equation(name):
    model = patched(EVERY[name]).eval()
    other = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():  # with gradients, torch's own attention traces in two ways
        traced = torch.jit.trace(model, X)
        torch.testing.assert_close(traced(other), model(other), **CLOSE)


class TestExport:
    OPTIONS = (
        {"dora": True},
        {"mid": "full"},
        {"qkv": "joint"},
        {"adapter_dtype": torch.float64},
    )

    def test_one_node_per_linear_that_decomposes(self):
        self.exported(patched(shallow).eval(), nodes=4)

    @pytest.mark.slow
    @pytest.mark.parametrize("options", OPTIONS, ids="+".join)
    def test_with_every_option(self, options):
        self.exported(patched(shallow, **options).eval(), nodes=4)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", sorted(set(EVERY) - {"timm"}))
    def test_every_kind_of_model(self, name):
        self.exported(patched(EVERY[name]).eval())

    @staticmethod
    def exported(model, nodes=None):
        """Exported for any batch: the fused operation; decomposed, torch's own alone."""
        batch = ({0: torch.export.Dim("batch")},)
        if "pixel_values" in model.forward.__code__.co_varnames:
            batch = {"pixel_values": batch[0]}
        program = torch.export.export(model, (X,), dynamic_shapes=batch)
        targets = [str(n.target) for n in program.graph.nodes]
        assert nodes is None or targets.count("fused_lora.lora_linear_exported.default") == nodes
        torch.testing.assert_close(result(program.module()(X[:1])), result(model(X[:1])), **CLOSE)
        plain = program.run_decompositions()
        ops = [n.target for n in plain.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
        assert ops and {op.namespace for op in ops} == {"aten"}
        torch.testing.assert_close(result(plain.module()(X[:1])), result(model(X[:1])), **CLOSE)

    def test_an_exported_model_trains_as_the_model_does(self):
        model = patched(shallow)
        program = torch.export.export(model.eval(), (X,))
        copy = program.module()
        for each in (copy, model):
            each(X).square().sum().backward()
        own = dict(model.named_parameters())
        for name, parameter in copy.named_parameters():
            if own[name].requires_grad:
                torch.testing.assert_close(parameter.grad, own[name].grad, **CLOSE)

    def test_compiled_after_it_was_exported(self):
        model = patched(shallow).eval()
        module = torch.export.export(model, (X,)).module()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), model(X), **CLOSE)
        torch._dynamo.reset()


slow = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(EVERY) - {"timm"})]


@pytest.mark.parametrize("name", ["timm", *slow])
def test_onnx(name):
    pytest.importorskip("onnxscript")
    model = patched(EVERY[name]).eval()
    program = torch.onnx.export(model, (X,), dynamo=True, verbose=False)
    kinds = collections.Counter(node.domain for node in program.model.graph)
    assert set(kinds) == {""}  # ONNX's own operators
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), result(model(X)).detach(), **CLOSE)


class TestInputByName:
    """``linear(input=x)``, as torch.nn.Linear takes it."""

    X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("kind", ["linear", "grouped", "read", "around"])
    def test_of_linears(self, kind):
        torch.manual_seed(0)
        plain = nn.Linear(4, 6)
        adopt = {
            "linear": lambda: fused_lora.FusedLoRALinear.adopt(plain, rank=2),
            "grouped": lambda: fused_lora.nn.FusedLoRAGroupedLinear.adopt(plain, {"q": (0, 2)}, 2),
            "read": lambda: fused_lora.nn.FusedLoRAWeight.adopt(plain, {"": (0, 6)}, {"": 2}),
            "around": lambda: fused_lora.nn.adopt_additive(plain, rank=2),
        }
        linear = wake(adopt[kind]())
        assert torch.equal(linear(input=self.X), linear(self.X))
        assert torch.equal(torch.compile(linear, backend="eager")(input=self.X), linear(self.X))
        torch._dynamo.reset()

    def test_of_a_convolution(self):
        conv = wake(FusedLoRAConv2d.adopt(nn.Conv2d(3, 4, 3), rank=2))
        assert torch.equal(conv(input=X), conv(X))

    def test_in_a_patched_model(self):
        model = patched(build)
        fc1, x = model.blocks[0].mlp.fc1, torch.randn(2, 5, 48)
        assert torch.equal(fc1(input=x), fc1(x))
