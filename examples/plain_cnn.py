"""A plain torch CNN, narrowed: a small PreTrainedModel around it, and a declaration of its layers.

    python examples/plain_cnn.py --folder ../shared/models/resnet20_cifar10 --images ../shared/data -o narrow

The network is the CIFAR-10 ResNet of He et al. (2016, section 4.2). Its shortcuts have no weights: they take every
second pixel and put zeros beside the channels. Here they are 1x1 convolutions that do the same, so that each stage has
channels of its own. Three things make a network of one's own known: a config and a model class, their names in
`transformers` (from where a narrowed model is rebuilt, in whatever process: so import this file before loading one),
and a family.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from optimum_rmtkd import Family, ResidualConvLayout, RMTKDConfig, Step, count_parameters, narrow, register_family


class CifarResNetConfig(PreTrainedConfig):
    model_type = "cifar_resnet"
    depth: int = 20
    hidden_sizes: list | None = None

    def __post_init__(self, **kwargs):
        self.hidden_sizes = self.hidden_sizes or [16, 32, 64]
        super().__post_init__(**kwargs)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class CifarResNetForImageClassification(PreTrainedModel):
    config_class = CifarResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        sizes, count = config.hidden_sizes, (config.depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, sizes[0], 3, 1, 1, bias=False), nn.BatchNorm2d(sizes[0])
        widths = [sizes[0], *[size for size in sizes for _ in range(count)]]
        self.blocks = nn.ModuleList(map(Block, widths[:-1], widths[1:]))
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None, **kwargs):
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        for block in self.blocks:
            x = block(x)
        logits = self.classifier(x.mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


for known in (CifarResNetConfig, CifarResNetForImageClassification):
    setattr(transformers, known.__name__, known)

register_family(
    Family(
        name="CIFAR ResNet",
        model_types=("cifar_resnet",),
        layout=ResidualConvLayout(
            stem=(Step("@.conv1", ("@.bn1",)),),
            stages="@.blocks",  # in a row, without stages around them
            steps=(Step("conv1", ("bn1",)), Step("conv2", ("bn2",))),
            shortcut=Step("shortcut"),
            heads=("@.classifier",),
        ),
    )
)


def pretrained(folder: str | Path) -> CifarResNetForImageClassification:
    """The network of `shared/models/resnet*_cifar10`, its shortcuts as convolutions."""
    folder = Path(folder)
    depth = json.loads((folder / "config.json").read_text())["depth"]
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=depth, num_labels=10)).eval()
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("layer"):
            stage, number, rest = name.removeprefix("layer").split(".", 2)
            name = f"blocks.{(int(stage) - 1) * (depth - 2) // 6 + int(number)}.{rest}"
        state[name.replace("linear.", "classifier.")] = tensor
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert all("shortcut" in name or "num_batches_tracked" in name for name in missing), missing
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Block) and hasattr(module, "shortcut"):
                outputs, inputs = module.shortcut.weight.shape[:2]
                module.shortcut.weight.zero_()
                places = torch.arange(inputs)
                module.shortcut.weight[places + (outputs - inputs) // 2, places] = 1.0
    return model


def images_of(folder: str | Path, part: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of CIFAR-10 as pixel values (count, 3, 32, 32), and their labels."""
    rows = pq.read_table(Path(folder) / f"cifar10_jpg_{part}.parquet").slice(0, count).to_pydict()
    arrays = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in rows["image"]]
    pixels = torch.tensor(np.stack(arrays)).movedim(-1, 1) / 255
    mean, spread = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (pixels - mean) / spread, torch.tensor(rows["label"])


@torch.no_grad()
def logits_of(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """(count, classes)"""
    return torch.cat([model(pixel_values=part).logits for part in pixels.split(250)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="Of the checkpoint.")
    parser.add_argument("--images", required=True, help="Folder of the parquet files of CIFAR-10.")
    parser.add_argument("--target-flops", type=float, default=0.3, help="Share of the work to remove.")
    parser.add_argument("-o", "--output", required=True, help="Folder for the narrow model.")
    arguments = parser.parse_args()
    model = pretrained(arguments.folder)
    calibration, (pixels, labels) = (
        images_of(arguments.images, "train", 512)[0],
        images_of(arguments.images, "test", 500),
    )
    recipe = RMTKDConfig(target_flops=arguments.target_flops, round_to=1, min_width=2, calibration_samples=512)
    small = narrow(model, [{"pixel_values": part} for part in calibration.split(64)], recipe)
    small.save_pretrained(arguments.output)
    again = type(small).from_pretrained(arguments.output).eval()
    dense, found = logits_of(model, pixels).argmax(-1), logits_of(again, pixels).argmax(-1)
    print(f"parameters {count_parameters(model):,} -> {count_parameters(again):,}")
    for name, same in (
        ("accuracy before", dense == labels),
        ("after", found == labels),
        ("agreement", found == dense),
    ):
        print(f"{name} {100 * float(same.double().mean()):.1f} %")


if __name__ == "__main__":
    main()
