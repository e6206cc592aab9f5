"""utils/models.py: the networks against torchvision's, their weights on and off disk, and the errors."""

import urllib.error

import numpy as np
import pytest
import torch
from torch import nn

from utils import models
from utils.config import ModelConfig, UserError
from utils.splits import Split

SHAPES = {"small": (12, 12, 3), "large": (65, 70, 3), "grey": (12, 12, 1)}


def image_split(kind="small", n=10) -> Split:
    return split_of(np.random.default_rng(0).integers(0, 256, (n, *SHAPES[kind]), dtype=np.uint8))


def vector_split(n=10, d=5) -> Split:
    return split_of(np.random.default_rng(0).normal(3, 2, (n, d)).astype(np.float32))


def split_of(inputs: np.ndarray) -> Split:
    n = len(inputs)
    return Split(inputs, np.zeros(n, np.int64), None, None, np.arange(n))


def batch_of(split: Split) -> torch.Tensor:
    return torch.from_numpy(split.inputs) if split.is_vector else torch.from_numpy(split.inputs).permute(0, 3, 1, 2)


def build(split: Split, **settings) -> nn.Module:
    torch.manual_seed(0)
    return models.build_backbone(ModelConfig(**settings), split, np.arange(split.n)).eval()


def shapes_of(module: nn.Module) -> dict[str, tuple]:
    return {name: tuple(w.shape) for name, w in module.state_dict().items()}


def torchvision_resnet18(seed=1) -> nn.Module:
    from torchvision.models import resnet18

    torch.manual_seed(seed)
    network = resnet18().eval()
    for module in network.modules():  # statistics that a wrong order of layers would show
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


# ResNet18


def test_resnet18_has_torchvisions_parameters():
    own, theirs = shapes_of(build(image_split("large"))), shapes_of(torchvision_resnet18())
    for name in ("normalise.mean", "normalise.std"):
        assert own.pop(name) == (3,)
    for name in ("fc.weight", "fc.bias"):
        theirs.pop(name)
    assert own == theirs


def test_resnet18_computes_what_torchvisions_does():
    split, theirs = image_split("large", 4), torchvision_resnet18()
    own = build(split)
    theirs.fc = nn.Identity()
    own.load_state_dict({**own.state_dict(), **theirs.state_dict()})
    with torch.inference_mode():
        features, expected = own(batch_of(split)), theirs(own.normalise(batch_of(split)))
    assert features.shape == (4, 512) == (4, own.n_features) and features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_resnet18_starts_like_torchvisions():
    """The same spread of fresh weights: He's initialisation by fan out; batch normalisation 1 and 0; no conv bias."""
    own = build(image_split("large"))
    for name, w in own.named_parameters():
        if w.dim() == 4:
            expected = np.sqrt(2 / (w.shape[0] * w.shape[2] * w.shape[3]))
            assert w.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (w == (1 if name.endswith("weight") else 0)).all(), name


@pytest.mark.parametrize(
    "height, width, is_small", [(64, 64, True), (65, 65, False), (64, 200, True), (200, 64, True), (28, 28, True)]
)
def test_stem_is_small_up_to_64_pixels_of_the_shorter_side(height, width, is_small):
    backbone = build(split_of(np.zeros((2, height, width, 3), np.uint8)), width=2)
    assert backbone.conv1.kernel_size == ((3, 3) if is_small else (7, 7))
    assert backbone.conv1.stride == ((1, 1) if is_small else (2, 2))
    assert isinstance(backbone.maxpool, nn.Identity if is_small else nn.MaxPool2d)


def test_small_stem_keeps_the_size_until_the_second_stage():
    backbone, sizes = build(image_split(), width=2), {}
    for name in ("conv1", "layer1", "layer4"):
        getattr(backbone, name).register_forward_hook(lambda m, i, y, name=name: sizes.update({name: y.shape[-2:]}))
    backbone(batch_of(image_split()))
    assert sizes == {"conv1": (12, 12), "layer1": (12, 12), "layer4": (2, 2)}


@pytest.mark.parametrize("side", [1, 2, 8, 28])
def test_small_images_of_any_side_work(side):
    split = split_of(np.full((2, side, side, 1), 7, np.uint8))
    assert build(split, width=2)(batch_of(split)).shape == (2, 16)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_width_scales_every_stage(width):
    backbone = build(image_split("grey"), width=width)
    shapes = shapes_of(backbone)
    assert shapes["conv1.weight"] == (width, 1, 3, 3)
    for stage in (1, 2, 3, 4):
        assert shapes[f"layer{stage}.1.conv2.weight"] == (width * 2 ** (stage - 1),) * 2 + (3, 3)
    assert backbone.n_features == 8 * width and backbone(batch_of(image_split("grey"))).shape == (10, 8 * width)


def test_features_are_float32_under_bf16():
    split = image_split()
    with torch.autocast("cpu", torch.bfloat16):
        assert build(split, width=4)(batch_of(split)).dtype == torch.float32


def test_weights_follow_torchs_seed_alone():
    first, again = build(image_split(), width=4).state_dict(), build(image_split(), width=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


# MLP and heads


def test_mlp_has_the_sizes_of_the_setting():
    backbone = build(vector_split(), mlp=[7, 3, 4])
    sizes = [(layer.in_features, layer.out_features) for layer in backbone.layers if isinstance(layer, nn.Linear)]
    assert sizes == [(5, 7), (7, 3), (3, 4)] and backbone.n_features == 4


def test_mlp_by_hand():
    split = vector_split()
    backbone = build(split, mlp=[2])
    layer = backbone.layers[0]
    x = (split.inputs - split.inputs.mean(0)) / split.inputs.std(0)
    expected = np.maximum(x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy(), 0)
    np.testing.assert_allclose(backbone(batch_of(split)).detach().numpy(), expected, atol=1e-5)


def test_network_and_two_heads_are_linear_in_the_features():
    split = image_split()
    backbone = build(split, width=4)
    one, two = models.Network(backbone, 5), models.TwoHeads(backbone, 2, 5)
    x = batch_of(split)
    assert one(x).shape == (10, 5)
    torch.testing.assert_close(one(x), backbone(x) @ one.head.weight.T + one.head.bias)
    coarse, fine = two(x)
    torch.testing.assert_close(coarse, backbone(x) @ two.coarse_head.weight.T + two.coarse_head.bias)
    torch.testing.assert_close(fine, backbone(x) @ two.fine_head.weight.T + two.fine_head.bias)


# Input statistics


@pytest.mark.parametrize("kind", ["small", "grey"])
def test_input_statistics_of_images(kind):
    split = image_split(kind, 2500)
    rows = np.arange(3, 2400)
    pixels = split.inputs[rows].reshape(-1, split.inputs.shape[-1]) / 255
    mean, std = models.input_statistics(split, rows)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-6)


def test_input_statistics_of_vectors():
    split = vector_split(1700)
    mean, std = models.input_statistics(split, np.arange(1700))
    np.testing.assert_allclose(mean, split.inputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, split.inputs.std(0), rtol=1e-5)


def test_input_statistics_read_training_rows_only():
    split = image_split()
    split.inputs[5:] = 0
    np.testing.assert_array_equal(
        models.input_statistics(split, np.arange(5)), models.input_statistics(split_of(split.inputs[:5]), np.arange(5))
    )


@pytest.mark.parametrize("n, n_read", [(99, 99), (100, 100), (101, 51), (199, 100), (250, 84)])
def test_input_statistics_read_no_more_rows_than_they_say(n, n_read, monkeypatch):
    """A stride rounded down let 39,999 of "at most 20,000" rows through."""
    monkeypatch.setattr(models, "MAX_STATISTICS_ROWS", 100)
    split = vector_split(n)
    np.testing.assert_allclose(
        models.input_statistics(split, np.arange(n))[0], split.inputs[:: -(-n // 100)].mean(0), rtol=1e-5
    )
    assert len(split.inputs[:: -(-n // 100)]) == n_read


def test_a_constant_channel_has_standard_deviation_one():
    images = image_split().inputs.copy()
    images[..., 1] = 77
    mean, std = models.input_statistics(split_of(images), np.arange(10))
    assert std[1] == 1 and std[0] != 1 and mean[1] == pytest.approx(77 / 255)


def test_normalise_makes_zero_mean_and_unit_variance():
    for split in (image_split(), vector_split()):
        layer = models.Normalise(*models.input_statistics(split, np.arange(split.n)))
        y = layer(batch_of(split)).movedim(1, -1)
        y = y.reshape(-1, y.shape[-1])
        torch.testing.assert_close(y.mean(0), torch.zeros(y.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(y.std(0, correction=0), torch.ones(y.shape[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalise_is_subtraction_and_division(channels, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, channels, 7, 5), generator=generator, dtype=torch.uint8)
    images = images if dtype == torch.uint8 else images / 255
    mean, std = np.linspace(0.2, 0.6, channels), np.linspace(0.1, 0.3, channels)
    expected = (images.double() / (255 if dtype == torch.uint8 else 1)).permute(0, 2, 3, 1).sub(torch.tensor(mean))
    expected = (expected / torch.tensor(std)).permute(0, 3, 1, 2).float()
    before = images.clone()
    for layout in (torch.contiguous_format, torch.channels_last):
        found = models.Normalise(mean, std)(images.to(memory_format=layout))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_normalise_by_hand():
    layer = models.Normalise(np.array([0.5]), np.array([0.25]))
    pixels = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2)
    assert layer(pixels).flatten().tolist() == [-2, 2]
    assert layer(torch.tensor([[1.0]])).tolist() == [[2]]


# ImageNet weights


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """torch.hub's folder, with a stand-in for ImageNet weights in it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(torchvision_resnet18().state_dict(), folder / "resnet18-f37072fd.pth")
    return folder


@pytest.mark.parametrize("kind", ["large", "small"])
def test_pretrained_loads_all_but_a_replaced_stem(kind, torch_home):
    own = build(image_split(kind), pretrained=True).state_dict()
    theirs = torchvision_resnet18().state_dict()
    fresh = {name for name, w in own.items() if name in theirs and not torch.equal(w, theirs[name])}
    assert fresh == (set() if kind == "large" else {"conv1.weight"})
    assert own.keys() - theirs.keys() == {"normalise.mean", "normalise.std"}
    np.testing.assert_allclose(own["normalise.mean"], [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(own["normalise.std"], [0.229, 0.224, 0.225], rtol=1e-6)


def test_pretrained_needs_rgb_images(torch_home):
    with pytest.raises(UserError, match="model.pretrained: .* RGB .* grey images; set it to false"):
        build(image_split("grey"), pretrained=True)
    with pytest.raises(UserError, match="model.pretrained: .* RGB .* vectors; set it to false"):
        build(vector_split(), pretrained=True)


def test_pretrained_needs_width_64():
    with pytest.raises(UserError, match="model.width: 16 .* model.pretrained"):
        ModelConfig(width=16, pretrained=True)


def test_pretrained_without_a_network_says_where_to_put_the_file(torch_home, monkeypatch):
    from torchvision.models import ResNet18_Weights

    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match="model.pretrained: .*no route to host.*; put the file into .*hub/checkpoints"):
        build(image_split(), pretrained=True)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x80\x02junk", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_file_of_weights_is_named(content, torch_home):
    (torch_home / "resnet18-f37072fd.pth").write_bytes(content)
    with pytest.raises(UserError, match="model.pretrained: .*hub/checkpoints is damaged; delete it"):
        build(image_split(), pretrained=True)


def test_default_is_not_pretrained():
    assert ModelConfig().pretrained is False


# Saved networks


def saved(network: nn.Module, tmp_path):
    torch.save(network.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("split", [image_split(), image_split("grey"), vector_split()], ids=["rgb", "grey", "vectors"])
def test_a_network_comes_back_from_disk_with_its_statistics(split, tmp_path):
    settings = ModelConfig(width=4, mlp=[6])
    network = models.Network(build(split, width=4, mlp=[6]), 3).eval()
    path = saved(network, tmp_path)
    again = models.load_network(settings, split, 3, path).eval()
    assert torch.equal(again(batch_of(split)), network(batch_of(split)))
    backbone = models.load_backbone(settings, split, path).eval()
    assert torch.equal(backbone(batch_of(split)), network.backbone(batch_of(split)))


def test_a_backbone_comes_back_whatever_its_heads(tmp_path):
    split = image_split()
    network = models.TwoHeads(build(split, width=4), 2, 7).eval()
    backbone = models.load_backbone(ModelConfig(width=4), split, saved(network, tmp_path)).eval()
    assert torch.equal(backbone(batch_of(split)), network.backbone(batch_of(split)))


def test_a_network_of_another_width_does_not_fit(tmp_path):
    split = image_split()
    path = saved(models.Network(build(split, width=4), 3), tmp_path)
    for load in (
        lambda: models.load_backbone(ModelConfig(width=8), split, path),
        lambda: models.load_network(ModelConfig(width=8), split, 3, path),
        lambda: models.load_network(ModelConfig(width=4), split, 4, path),
        lambda: models.load_network(ModelConfig(width=4), image_split("grey"), 3, path),
        lambda: models.load_backbone(ModelConfig(), vector_split(), path),
    ):
        with pytest.raises(
            UserError, match=r"model.pt: does not fit the network of this configuration \(.+\)"
        ) as caught:
            load()
        assert "\n" not in str(caught.value)


# Freezing


def trainable(network: nn.Module) -> set[str]:
    return {name for name, w in network.named_parameters() if w.requires_grad}


def test_freezing_leaves_normalisation_and_head():
    network = models.Network(build(image_split(), width=2), 3)
    everything = trainable(network)
    models.freeze_all_but_norm_and_head(network)
    frozen = everything - trainable(network)
    assert frozen == {name for name, w in network.named_parameters() if w.dim() == 4} and len(frozen) == 20
    assert {"head.weight", "head.bias", "backbone.bn1.weight", "backbone.layer4.0.downsample.1.bias"} <= trainable(
        network
    )


def test_freezing_an_mlp_leaves_the_head():
    network = models.Network(build(vector_split(), mlp=[4, 4]), 3)
    models.freeze_all_but_norm_and_head(network)
    assert trainable(network) == {"head.weight", "head.bias"}
