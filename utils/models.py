"""The networks: a ResNet18 of any width (or an MLP for vectors) with one head, a stack of heads, or two heads."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils import artifacts, distributed
from utils.config import ModelConfig, UserError
from utils.splits import Split

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL_SIDE = 64  # pixels; up to here the stem is 3x3 with stride 1 and no max-pool
MAX_STATISTICS_ROWS = 20_000


def input_statistics(split: Split, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the training rows: (C,) per channel in [0, 1] units for images, (D,) for vectors.

    At most 20,000 evenly spaced rows are read.  A constant channel gets standard deviation 1.
    """
    rows = rows[:: -(-len(rows) // MAX_STATISTICS_ROWS)]
    total = square = 0.0
    count = 0
    for start in range(0, len(rows), 1000):
        block = split.inputs[rows[start : start + 1000]].astype(np.float64)
        block = block.reshape(-1, block.shape[-1]) / (1.0 if split.is_vector else 255.0)
        total, square, count = total + block.sum(0), square + (block**2).sum(0), count + len(block)
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    return mean.astype(np.float32), np.where(std < 1e-6, 1.0, std).astype(np.float32)


class Normalise(nn.Module):
    """uint8 images (or float vectors) to zero mean and unit variance; the statistics travel in the state_dict."""

    def __init__(self, mean: np.ndarray, std: np.ndarray):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.float() / 255
        shape = (1, -1, 1, 1) if x.dim() == 4 else (1, -1)
        return (x - self.mean.view(shape)) / self.std.view(shape)


class ResNet18(nn.Module):
    """He et al. 2016, table 1 (18 layers), of torchvision's BasicBlocks and with torchvision's parameter names.

    For images of at most 64 px the stem is a 3x3 convolution of stride 1 without max-pool, as is usual on CIFAR.
    (B, C, H, W) uint8 or float in -> (B, 8 * width) float32 features.
    """

    def __init__(self, in_channels: int, side: int, width: int, normalise: Normalise):
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        self.normalise = normalise
        small = side <= SMALL_SIDE
        self.conv1 = nn.Conv2d(in_channels, width, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        channels = width
        for number, stride in enumerate((1, 2, 2, 2), start=1):
            planes = width * 2 ** (number - 1)
            downsample = None
            if stride != 1:
                downsample = nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
            blocks = [BasicBlock(channels, planes, stride, downsample), BasicBlock(planes, planes)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
            channels = planes
        self.n_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalise(x)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.float().mean((2, 3))  # pooled in float32: features keep their precision under bf16 autocast


class MLP(nn.Module):
    """For vectors: linear and ReLU per hidden size, ReLU after the last too.  (B, D) -> (B, sizes[-1]) float32."""

    def __init__(self, n_inputs: int, sizes: list[int], normalise: Normalise):
        super().__init__()
        self.normalise = normalise
        layers: list[nn.Module] = []
        for n_in, n_out in zip([n_inputs, *sizes[:-1]], sizes, strict=True):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.n_features = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.normalise(x)).float()


class Network(nn.Module):
    """A backbone and one head: (B, ...) inputs -> (B, K) logits."""

    def __init__(self, backbone: nn.Module, n_classes: int):
        super().__init__()
        self.backbone = backbone
        self.head: nn.Module = nn.Linear(backbone.n_features, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class TwoHeads(nn.Module):
    """A backbone with a coarse and a fine head: (B, ...) inputs -> ((B, K_C), (B, K_F)) logits."""

    def __init__(self, backbone: nn.Module, n_coarse: int, n_fine: int):
        super().__init__()
        self.backbone = backbone
        self.coarse_head = nn.Linear(backbone.n_features, n_coarse)
        self.fine_head = nn.Linear(backbone.n_features, n_fine)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(x)
        return self.coarse_head(features), self.fine_head(features)


def make_backbone(model: ModelConfig, split: Split, normalise: Normalise) -> nn.Module:
    """The backbone for this kind of input, its weights drawn from torch's global generator."""
    if split.is_vector:
        return MLP(split.inputs.shape[1], model.mlp, normalise)
    height, width, channels = split.inputs.shape[1:]
    return ResNet18(channels, min(height, width), model.width, normalise)


def build_backbone(model: ModelConfig, split: Split, train_rows: np.ndarray) -> nn.Module:
    """A backbone to train (seed torch first), with input statistics of the training rows or ImageNet weights.

    Raises UserError where model.pretrained does not fit the data or the weights cannot be had.
    """
    if not model.pretrained:
        return make_backbone(model, split, Normalise(*input_statistics(split, train_rows)))
    if split.is_vector or split.inputs.shape[3] != 3:
        kind = "vectors" if split.is_vector else "grey images"
        raise UserError(f"model.pretrained: ImageNet weights need RGB images and these are {kind}; set it to false")
    backbone = make_backbone(model, split, Normalise(IMAGENET_MEAN, IMAGENET_STD))
    load_imagenet_weights(backbone)
    return backbone


def load_imagenet_weights(backbone: ResNet18) -> None:
    """Copy torchvision's ImageNet weights into every parameter of the same shape: all but a replaced stem."""
    import pickle
    import struct

    from torchvision.models import ResNet18_Weights

    folder = f"{torch.hub.get_dir()}/checkpoints"
    try:
        weights = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:  # URLError is one
        raise UserError(
            f"model.pretrained: the weights could not be downloaded ({error}); put the file into {folder}"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, struct.error):
        raise UserError(
            f"model.pretrained: the weights' file in {folder} is damaged; delete it to download it again"
        ) from None
    own = backbone.state_dict()
    fitting = {name: w for name, w in weights.items() if name in own and own[name].shape == w.shape}
    backbone.load_state_dict({**own, **fitting})


def unnormalised(split: Split) -> Normalise:
    """A placeholder of the right shape for statistics that come with a saved state_dict."""
    size = split.inputs.shape[-1]
    return Normalise(np.zeros(size), np.ones(size))


def load_backbone(model: ModelConfig, split: Split, path: Path) -> nn.Module:
    """The backbone of the network saved at `path`, whatever its heads.  Raises UserError where it does not fit."""
    backbone = make_backbone(model, split, unnormalised(split))
    state = artifacts.load_torch(path)
    part = {name.removeprefix("backbone."): w for name, w in state.items() if name.startswith("backbone.")}
    load_state(backbone, part, path)
    return backbone


def load_network(model: ModelConfig, split: Split, n_classes: int, path: Path) -> Network:
    """The one-headed network saved at `path`.  Raises UserError where it does not fit."""
    network = Network(make_backbone(model, split, unnormalised(split)), n_classes)
    load_state(network, artifacts.load_torch(path), path)
    return network


def load_state(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: does not fit the network of this configuration ({reason})") from None


class SumOverProcesses(torch.autograd.Function):
    """The sum of every process's tensor; as each one's loss depends on it, so is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return distributed.sum_over_ranks(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return distributed.sum_over_ranks(gradient)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the mean and variance over all processes of a run, as if the batch were in one.

    torch.nn.SyncBatchNorm does the same on CUDA and refuses to run on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()
        count = distributed.sum_over_ranks(torch.tensor(float(values.numel() // values.shape[1])))
        mean = SumOverProcesses.apply(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_statistics(network: nn.Module, is_cuda: bool) -> None:
    """Make every batch normalisation of `network` one over all processes; its state_dict stays as it is."""
    if is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm2d  # it adds no state, so the object can stay


def freeze_all_but_norm_and_head(network: Network) -> None:
    """Only normalisation layers and the head keep learning (finetune.freeze)."""
    for parameter in network.backbone.parameters():
        parameter.requires_grad = False
    for module in network.backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters():
                parameter.requires_grad = True
