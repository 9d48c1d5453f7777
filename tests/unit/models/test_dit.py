"""DiTDH: parity with the reference, published names and sizes, initialisation, labels."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from mmfm.models import dit
from mmfm.models.dit import DIT_PRESETS, DiT, DiTConfig
from mmfm.models.layers import compile_blocks
from support.places import GOLDEN

TINY = DiTConfig(
    input_size=4,
    patch_size=2,
    in_channels=3,
    hidden_size=(16, 24),
    depth=(2, 1),
    num_heads=(2, 2),
    num_classes=5,
    label_dropout=0.1,
)


def tiny(seed=0, **changes):
    """A small model whose zero-initialised maps are filled, so that every input reaches the output."""
    generator = torch.Generator().manual_seed(seed)
    config = DiTConfig(**{**TINY.__dict__, **changes})
    model = DiT(config, generator=generator)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def inputs(batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 4, 4, generator=generator), torch.rand(batch, generator=generator)


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN / "dit_ddt_tiny.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("prefix, expected", [("model", "velocity"), ("guide", "guide_velocity")])
def test_velocity_equals_reference(golden, prefix, expected):
    tensors, metadata = golden
    config = json.loads(metadata["config"])
    if prefix == "guide":
        config["depth"] = json.loads(metadata["guide_depth"])
    model = DiT(DiTConfig(**config, label_dropout=0.1)).eval()
    state = {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
    for name in ("pos_embed", "enc_feat_rope.freqs_cos", "dec_feat_rope.freqs_sin"):
        torch.testing.assert_close(model.state_dict()[name], state[name], rtol=0, atol=1e-6)
    model.load_state_dict(state)
    with torch.no_grad():
        velocity = model(tensors["x"], tensors["t"], tensors["y"])
    assert (velocity - tensors[expected]).abs().max() <= 1e-5 * tensors[expected].abs().max()


@pytest.mark.parametrize("name, parameters", [("XL", 838_675_796), ("S", 196_455_764)])
def test_published_names_shapes_and_counts(name, parameters):
    reference = json.loads((GOLDEN / "dit_state_dicts.json").read_text())[f"DiTDH-{name}"]
    with torch.device("meta"):
        model = DiT(DiTConfig(16, 1, 768, **DIT_PRESETS[name], num_classes=1000, label_dropout=0.1))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == reference["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_frozen_parameters_are_those_without_training():
    assert {n for n, p in tiny().named_parameters() if not p.requires_grad} == {"pos_embed", "t_embedder.W"}


def test_initial_weights_follow_the_generator_or_the_global_seed():
    def state(generator=None):
        return DiT(TINY, generator=generator).state_dict()

    first, second, other = (state(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["t_embedder.W"], other["t_embedder.W"])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = state()
        torch.manual_seed(3)
        second = state()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_xavier_initial_weights():
    """Xavier-uniform maps and embeddings of 0.02, frequencies of 1; modulations, output and biases of 0."""
    config = DiTConfig(8, 2, 16, (96, 128), (1, 1), (2, 2), num_classes=100, label_dropout=0.1)
    model = DiT(config, generator=torch.Generator().manual_seed(0))
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2], model.y_embedder.embedding_table):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.t_embedder.W.std().item() == pytest.approx(1, rel=0.15)
    for layer in (model.x_embedder.proj, model.s_embedder.proj, model.s_projector, model.blocks[0].attn.qkv,
                  model.blocks[1].mlp.w12):  # fmt: skip
        rows = layer.weight.flatten(1)
        assert rows.abs().max().item() == pytest.approx((6 / sum(rows.shape)) ** 0.5, rel=0.01)
    zero = [*(block.adaLN_modulation[-1] for block in (*model.blocks, model.final_layer)), model.final_layer.linear]
    assert not any(layer.weight.any() for layer in zero)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_pytorch_initial_weights_are_those_of_the_published_code():
    """At the widths of XL: the standard deviation of a uniform number within 1 / sqrt(inputs), weights and biases."""
    config = DiTConfig(2, 1, 768, (1152, 2048), (1, 1), (16, 16), num_classes=50, label_dropout=0.0)
    models = {
        init: DiT(config, init=init, generator=torch.Generator().manual_seed(0)) for init in ("xavier", "pytorch")
    }
    model, (first, last) = models["pytorch"], models["pytorch"].blocks
    assert first.attn.qkv.weight.std().item() == pytest.approx(0.0170, abs=1e-4)
    assert models["xavier"].blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.0208, abs=1e-4)
    assert first.mlp.w3.weight.std().item() == pytest.approx(0.0104, abs=1e-4)
    for layer in (first.attn.proj, last.attn.qkv, last.mlp.w12, last.mlp.w3, model.s_projector):
        expected = (3 * layer.in_features) ** -0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.01)
        assert layer.bias.std().item() == pytest.approx(expected, rel=0.1)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.01)
        assert layer.bias.std().item() == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.1)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for layer in (model.x_embedder.proj, model.s_embedder.proj):
        assert layer.weight.abs().max().item() == pytest.approx(
            (6 / sum(layer.weight.flatten(1).shape)) ** 0.5, rel=0.01
        )
        assert not layer.bias.any()
    zero = [*(block.adaLN_modulation[-1] for block in (*model.blocks, model.final_layer)), model.final_layer.linear]
    assert not any(parameter.any() for layer in zero for parameter in layer.parameters())


def test_new_model_predicts_zero_and_learns():
    model = DiT(TINY, generator=torch.Generator().manual_seed(0))
    x, t = inputs()
    velocity = model(x, t, torch.tensor([0, 1, 5]))
    assert velocity.shape == x.shape and not velocity.any()
    (velocity - x).square().mean().backward()
    assert model.final_layer.linear.weight.grad.any()


@pytest.mark.parametrize("num_classes, dropout, rows, null", [(5, 0.1, 6, 5), (5, 0.0, 5, None), (0, 0.1, None, None)])
def test_label_table(num_classes, dropout, rows, null):
    model = tiny(num_classes=num_classes, label_dropout=dropout)
    table = model.state_dict().get("y_embedder.embedding_table.weight")
    assert (None if table is None else len(table)) == rows
    assert model.null_label == null


def test_labels_change_the_velocity_and_time_does_too():
    model, (x, t) = tiny(), inputs()
    y = torch.tensor([0, 1, 2])
    with torch.no_grad():
        velocity = model(x, t, y)
        assert torch.equal(velocity, model.train()(x, t, y)), "the model itself must hold no randomness"
        assert not torch.allclose(velocity, model(x, t, torch.full_like(y, model.null_label)))
        assert not torch.allclose(velocity, model(x, t / 2, y))


def test_labels_must_fit_the_model():
    x, t = inputs()
    with pytest.raises(ValueError, match="null_label = 5"):
        tiny()(x, t)
    with pytest.raises(ValueError, match="unconditional"):
        tiny(num_classes=0)(x, t, torch.zeros(3, dtype=torch.int64))
    assert tiny(num_classes=0)(x, t).shape == x.shape


def test_patches_return_to_their_place():
    image = tiny()._unpatchify(torch.arange(2 * 4 * 12).reshape(2, 4, 12))
    assert image.shape == (2, 3, 4, 4)
    assert image[0, :, 0, 0].tolist() == [0, 1, 2], "channels are last within a patch"
    assert image[0, :, 0, 1].tolist() == [3, 4, 5]
    assert image[0, :, 0, 2].tolist() == [12, 13, 14], "the second patch is right of the first"
    assert image[0, :, 2, 0].tolist() == [24, 25, 26], "the third patch is below the first"


def test_activations_are_checkpointed_on_request_and_only_for_gradients(monkeypatch):
    blocks, (x, t) = [], inputs()
    monkeypatch.setattr(dit, "checkpoint", lambda block, *given, **_: (blocks.append(block), block(*given))[1])
    for asked, differentiated, expected in ((False, True, 0), (True, False, 0), (True, True, 3)):
        blocks.clear()
        with torch.set_grad_enabled(differentiated):
            DiT(TINY, **{"checkpoint_activations": True} if asked else {})(x, t, torch.tensor([0, 1, 2]))
        assert len(blocks) == expected, (asked, differentiated)


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for checkpoint_activations in (False, True):
        model, (x, t) = tiny(), inputs()
        model.checkpoint_activations = checkpoint_activations
        model(x, t, torch.tensor([0, 1, 2])).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_runs_under_bf16_autocast():
    model, (x, t) = tiny(), inputs()
    y = torch.tensor([0, 1, 2])
    with torch.no_grad():
        exact = model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x, t, y).float()
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_traces_into_one_graph_for_compilation():
    model, (x, t) = tiny(), inputs()
    y = torch.tensor([0, 1, 2])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y))


def test_every_size_of_batch_is_compiled(monkeypatch):
    """Of a model, whose head is of another size, and of a guide; with PyTorch's own limit, the ninth is not."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block, **options: compiled(block, backend="eager", **options))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    networks = tiny(), tiny(hidden_size=(8, 24), num_heads=(1, 2))
    for network in networks:
        compile_blocks(network)
    for batch in (2, 3, 4, 5):
        for network in networks:
            with torch.no_grad():
                network(*inputs(batch), torch.zeros(batch, dtype=torch.long))


def test_fast_arithmetic_has_the_gradients_of_the_plain_one(monkeypatch):
    """Complex rotation and the SwiGLU's own gradient, against what the compiler is given."""
    gradients = []
    for plain in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda plain=plain: plain)
        model, (x, t) = tiny(), inputs()
        x.requires_grad_()
        model(x, t, torch.tensor([0, 1, 2])).square().mean().backward()
        gradients.append({"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": (16, 25)}, "hidden_size 25"),
        ({"patch_size": 3}, "input_size 4"),
        ({"depth": (0, 1)}, "depth"),
        ({"num_classes": -1}, "num_classes"),
        ({"label_dropout": 1.5}, "label_dropout"),
        ({"hidden_size": (12, 24), "num_heads": (2, 2)}, "multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DiT(DiTConfig(**{**TINY.__dict__, **changes}))
