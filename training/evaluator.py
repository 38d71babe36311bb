"""The evaluator: a small image–text encoder, trained apart from any generator, whose features the metrics compare.

    evaluator = Evaluator.load(Path("training/assets/evaluator"))
    seen = evaluator.images(pictures_NHWC)             # uint8 → seen.embedding (N, E), seen.features (N, D)
    texts = evaluator.texts(["noto rocket"])           # (1, E)
    seen.embedding @ texts.T                           # cosine similarities

It shares nothing with the generator that it judges: own tokenizer, own text tower, pixels instead of latents.
Shapes: N pictures, B batch, H and W pixels, L tokens, E embedding width, D feature width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from engines.files import replace_folder
from training.errors import TrainingError

ASSETS = Path(__file__).parent / "assets" / "evaluator"
"""The trained evaluator that ships."""

WEIGHTS, CONFIG, TOKENIZER = "evaluator.safetensors", "evaluator.json", "tokenizer.json"
FORMAT_VERSION = 1
PAD_ID = 0


@dataclass(frozen=True)
class EvaluatorConfig:
    """Sizes of both towers."""

    size: int = 128
    """Side of the pictures it looks at, in pixels; others are resized."""
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """Channels per stage; the first runs at a quarter of the picture, each next at half of the one before."""
    blocks: tuple[int, ...] = (0, 1, 2, 1)
    """Residual blocks per stage."""
    embedding: int = 128
    vocabulary: int = 3000
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_length: int = 24
    """Tokens; longer captions are cut."""


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first_norm(self.first(x)))
        return F.relu(x + self.second_norm(self.second(h)))


class ImageTower(nn.Module):
    """Pictures `(B, 3, H, W)` in [−1, 1] → pooled features `(B, D)`, D the last width."""

    def __init__(self, config: EvaluatorConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, blocks in zip(config.widths, config.blocks, strict=True):
            # The stem's stride of 4 is what makes this cheap: full resolution costs most and tells a picture least.
            kernel, stride, padding = (7, 4, 2) if before == 3 else (3, 2, 1)
            layers += [
                nn.Conv2d(before, width, kernel, stride, padding, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            layers += [_Residual(width) for _ in range(blocks)]
            before = width
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pooled: Tensor = self.layers(x_BCHW).mean(dim=(2, 3))
        return pooled


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        qkv = self.qkv(self.norm_1(x_BLD)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask_BL[:, None, None, :])
        x_BLD = x_BLD + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        update: Tensor = self.down(F.gelu(self.up(self.norm_2(x_BLD))))
        return x_BLD + update


class TextTower(nn.Module):
    """Token ids `(B, L)`, padded with `PAD_ID` → mean over real tokens `(B, text_width)`."""

    def __init__(self, config: EvaluatorConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.text_width)
        self.positions = nn.Parameter(0.02 * torch.randn(config.text_length, config.text_width))
        self.layers = nn.ModuleList(
            _Attention(config.text_width, config.text_heads) for _ in range(config.text_layers)
        )
        self.norm = nn.LayerNorm(config.text_width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids_BL: Tensor) -> Tensor:
        mask_BL = ids_BL != PAD_ID
        # A caption without a known word still has to attend somewhere.
        mask_BL = mask_BL | (~mask_BL.any(dim=1, keepdim=True))
        x_BLD = self.tokens(ids_BL) + self.positions[: ids_BL.shape[1]]
        for layer in self.layers:
            x_BLD = layer(x_BLD, mask_BL)
        weight = mask_BL.to(x_BLD.dtype)[..., None]
        pooled: Tensor = (self.norm(x_BLD) * weight).sum(1) / weight.sum(1)
        return pooled


class EvaluatorModel(nn.Module):
    """Both towers, their projections into one space, and the temperature of their similarities."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: EvaluatorConfig) -> None:
        super().__init__()
        self.image, self.text = ImageTower(config), TextTower(config)
        self.image_out = nn.Linear(config.widths[-1], config.embedding, bias=False)
        self.text_out = nn.Linear(config.text_width, config.embedding, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # 1 / 0.07, CLIP's start
        # Of real training pictures: standardised features make distances readable, whatever a channel's scale.
        self.register_buffer("feature_mean", torch.zeros(config.widths[-1]))
        self.register_buffer("feature_std", torch.ones(config.widths[-1]))

    def embed_images(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings `(B, E)` and raw pooled features `(B, D)`, float32."""
        pooled = self.image(x_BCHW)
        return F.normalize(self.image_out(pooled).float(), dim=-1), pooled.float()

    def embed_texts(self, ids_BL: Tensor) -> Tensor:
        """Unit embeddings `(B, E)`, float32."""
        return F.normalize(self.text_out(self.text(ids_BL)).float(), dim=-1)


@dataclass(frozen=True)
class Seen:
    """What the evaluator makes of N pictures."""

    embedding: NDArray[np.float32]
    """`(N, E)`, unit length: to compare with captions."""
    features: NDArray[np.float32]
    """`(N, D)`, standardised over real training pictures: for Fréchet distance and diversity."""


@dataclass
class Evaluator:
    """A trained model with its tokenizer, in float32."""

    model: EvaluatorModel
    tokenizer: Tokenizer
    config: EvaluatorConfig
    info: dict[str, Any] = field(default_factory=dict)
    """How it was trained and what it scored; nothing here changes a result."""

    @torch.no_grad()
    def images(self, pictures_NHWC: NDArray[np.uint8], batch: int = 64) -> Seen:
        """Look at uint8 RGB pictures `(N, height, width, 3)`."""
        self.model.eval()
        parts = [
            self.model.embed_images(
                to_input(torch.from_numpy(np.array(pictures_NHWC[at : at + batch])), self.config.size)
            )
            for at in range(0, len(pictures_NHWC), batch)
        ]
        features = (torch.cat([part[1] for part in parts]) - self.model.feature_mean) / self.model.feature_std
        return Seen(torch.cat([part[0] for part in parts]).numpy(), features.numpy())

    @torch.no_grad()
    def texts(self, captions: Sequence[str], batch: int = 256) -> NDArray[np.float32]:
        """Unit embeddings `(len(captions), E)`."""
        self.model.eval()
        parts = [
            self.model.embed_texts(
                token_ids(self.tokenizer, captions[at : at + batch], self.config.text_length)
            )
            for at in range(0, len(captions), batch)
        ]
        result: NDArray[np.float32] = torch.cat(parts).numpy()
        return result

    def save(self, folder: Path) -> None:
        """Make `folder` the three files, weights as float16; one that was there stays whole until then."""
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in self.model.state_dict().items()
        }
        # Not `save_file`: it writes files that nobody else may read, and this one is shipped.
        (partial / WEIGHTS).write_bytes(
            to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
        )
        document = {"format_version": FORMAT_VERSION, "model": asdict(self.config), **self.info}
        (partial / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (partial / TOKENIZER).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
        replace_folder(partial, folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            TrainingError: a file is missing, unreadable or of another format version.
        """
        remedy = "train one with `cdm-train emoji-evaluator`, or name another with --evaluator"
        try:
            document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            version = document.pop("format_version", None)
            if version != FORMAT_VERSION:
                raise TrainingError(
                    f"{folder}: evaluator format {version}, this version reads {FORMAT_VERSION}; {remedy}"
                )
            sizes: dict[str, Any] = document.pop("model")
            sizes = {name: tuple(v) if isinstance(v, list) else v for name, v in sizes.items()}
            config = EvaluatorConfig(**sizes)
            model = EvaluatorModel(config)
            model.load_state_dict({k: v.float() if v.is_floating_point() else v
                                   for k, v in load_file(folder / WEIGHTS).items()})  # fmt: skip
            tokenizer = Tokenizer.from_str((folder / TOKENIZER).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise TrainingError(f"{folder} is no readable evaluator ({error}); {remedy}") from error
        model.eval().requires_grad_(False)
        return cls(model, tokenizer, config, document)


def to_input(pictures_BHWC: Tensor, size: int) -> Tensor:
    """uint8 `(B, H, W, 3)` → float32 `(B, 3, size, size)` in [−1, 1], channels last in memory."""
    x = pictures_BHWC.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last)


def token_ids(tokenizer: Tokenizer, captions: Sequence[str], length: int) -> Tensor:
    """int64 `(len(captions), length)`, cut and padded with `PAD_ID`."""
    ids = torch.full((len(captions), length), PAD_ID, dtype=torch.int64)
    for row, encoding in enumerate(tokenizer.encode_batch(list(captions))):
        found = encoding.ids[:length]
        ids[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
    return ids
