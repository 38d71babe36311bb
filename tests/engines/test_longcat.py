"""The LongCat family computes what `LongCatImagePipeline` computes."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LongCatImagePipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engines.export.graphs import DenoiserGraph, TextEncoderGraph
from engines.export.onnx_file import OPSET, GraphModule, save_model, to_onnx
from engines.export.parity import open_session
from engines.families.base import INDEX, FamilyError
from engines.families.longcat import REWRITER, LongCatFamily, cfg_renorm, pack, unpack
from engines.spelling import frame, tokenize
from tests.tiny_longcat import PAD, WORDS, build_tiny_longcat

PROMPTS = [
    "red apple",
    "",
    "a sign says 'Hi you' and \"red\" or ‘苹果’ or “it's” now",
    f"pad {PAD} inside and at the end{PAD}",
    "красное яблоко 🍎 e\u0301 don't",
    "'" + "apple " * 700,
]
ODD = (10, 6)
"""(height, width) in latent pixels: 5 × 3 tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_longcat(tmp_path_factory.mktemp("longcat") / "tiny")


@pytest.fixture(scope="module")
def family(folder: Path) -> LongCatFamily:
    return LongCatFamily.load(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> LongCatImagePipeline:
    loaded = LongCatImagePipeline.from_pretrained(folder, text_processor=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _relative(mine: Any, theirs: Any) -> float:
    mine, theirs = torch.as_tensor(mine), torch.as_tensor(theirs)
    return float((mine - theirs).norm() / theirs.norm())


# text


@torch.no_grad()
def test_embeddings_equal_the_pipelines(family: LongCatFamily, pipeline: LongCatImagePipeline) -> None:
    mine = family.encode(PROMPTS)["encoder_hidden_states"]
    theirs, _ = pipeline.encode_prompt(PROMPTS)
    assert mine.shape == (len(PROMPTS), 512, 32)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert all(_relative(mine[row], mine[1]) > 1e-2 for row in range(len(PROMPTS)) if row != 1)


def test_padding_is_no_token_even_of_a_prompt_that_spells_it(family: LongCatFamily) -> None:
    ids = family.tokenize(PROMPTS)["input_ids"]
    assert family.pad_id not in family.pipeline.tokenizer.get_vocab().values()
    assert (ids[:, : len(family.prefix)] == torch.tensor(family.prefix)).all()
    body = ids[:, len(family.prefix) :]
    pad_token = family.pipeline.tokenizer.pad_token_id
    assert [(body[row] == pad_token).sum().item() for row in (0, 3)] == [0, 2]
    padding = (body == family.pad_id).sum(dim=1).tolist()
    assert padding[1] == 512
    assert padding[5] == 0
    assert body[3, 512 - padding[3] - 1] == pad_token


@settings(deadline=None, max_examples=100)
@given(
    st.one_of(
        st.text(st.characters(codec="utf-8")),
        st.lists(st.sampled_from([*WORDS, *"'\"‘’“” \n", PAD, "<|im_end|>", "don't", "苹"])).map("".join),
    )
)
@example(PROMPTS[2])
@example(PROMPTS[5])
def test_tokenizer_file_gives_the_familys_ids(family: LongCatFamily, prompt: str) -> None:
    """What a server without transformers does with `tokenizer_specs`."""
    (spec,) = family.tokenizer_specs()
    tokenizer = _read(spec["json"])
    assert spec["spell_quotes"]
    ids = tokenize(prompt, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    row = frame(ids, spec["length"], spec["pad_id"], spec["prefix"])
    assert row == family.tokenize([prompt])["input_ids"][0].tolist()


def _read(document: str, cache: dict[str, Tokenizer] = {}) -> Tokenizer:  # noqa: B006
    if document not in cache:
        cache[document] = Tokenizer.from_str(document)
    return cache[document]


@torch.no_grad()
def test_text_encoder_in_bfloat16_keeps_exact_angles(folder: Path, family: LongCatFamily) -> None:
    """What is loaded in bfloat16, or cast to it later, has the float32 frequencies of its rotary embedding."""
    places = torch.arange(600).expand(3, 1, -1)
    exact = _rotary(family)(torch.zeros(()), places)
    loaded, cast = (LongCatFamily.load(folder, dtype) for dtype in (torch.bfloat16, torch.float32))
    cast.text_encoders()[0].module.to(torch.bfloat16)
    for other in (loaded, cast):
        angles = _rotary(other)(torch.zeros(()), places)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(angles, exact, strict=True))
        states = other.encode(PROMPTS)["encoder_hidden_states"]
        assert states.dtype == torch.bfloat16
        assert _relative(states.float(), family.encode(PROMPTS)["encoder_hidden_states"]) < 1e-2


def _rotary(family: LongCatFamily) -> Any:
    assert family.language is not None
    return family.language.rotary_emb


# latents


def test_dropped_text_encoders_leave_nothing_in_memory(folder: Path) -> None:
    """Nor do the parts of Qwen that never encode: its vision tower and its head."""
    family = LongCatFamily.load(folder)
    assert any("visual" in name for name, _ in family.pipeline.text_encoder.named_parameters())
    family.drop_text_encoders()
    assert all(value.device.type == "meta" for value in family.pipeline.text_encoder.parameters())
    assert all(value.device.type == "cpu" for value in family.transformer.parameters())


def test_packing_is_the_pipelines_and_undone() -> None:
    x = torch.randn(2, 16, 10, 6)
    assert torch.equal(pack(x), LongCatImagePipeline._pack_latents(x, 2, 16, 10, 6))
    assert torch.equal(unpack(pack(x), 10, 6), x)


def _sample(
    family: LongCatFamily, noise: torch.Tensor, prompts: list[str], guidance: float, minimum: float
) -> torch.Tensor:
    """A picture by hand, in [0, 1]."""
    x, (cond, uncond) = noise, (family.encode(texts) for texts in (prompts, [""] * len(prompts)))
    for sigma, sigma_next in pairwise(family.sigmas(3, tuple(noise.shape[2:]))):
        rows = torch.full((len(noise),), sigma)
        velocity = family.velocity(family.transformer, x, rows, cond)
        if guidance != 1.0:
            velocity = cfg_renorm(
                velocity, family.velocity(family.transformer, x, rows, uncond), guidance, minimum
            )
        x = x + (sigma_next - sigma) * velocity
    return (family.decode(x) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "guidance", "options", "minimum"),
    [
        ((8, 8), 1.0, {}, 0.0),
        (ODD, 1.0, {}, 0.0),
        ((8, 8), 4.5, {}, 0.0),
        (ODD, 4.5, {"cfg_renorm_min": 0.6}, 0.6),
        (ODD, 4.5, {"enable_cfg_renorm": False}, 1.0),
    ],
)
def test_sampling_by_hand_equals_the_pipelines_picture(
    family: LongCatFamily,
    pipeline: LongCatImagePipeline,
    size: tuple[int, int],
    guidance: float,
    options: dict[str, Any],
    minimum: float,
) -> None:
    height, width = size
    prompts = (
        PROMPTS[:3] if guidance == 1.0 else PROMPTS[2:3]
    )  # guided, the pipeline takes one prompt at a time
    noise = torch.randn((len(prompts), 16, height, width), generator=torch.Generator().manual_seed(1))
    theirs = pipeline(
        prompts, height=8 * height, width=8 * width, num_inference_steps=3, guidance_scale=guidance,
        latents=pack(noise), output_type="pt", enable_prompt_rewrite=False, **options,
    ).images  # fmt: skip
    assert theirs.shape == (len(prompts), 3, 8 * height, 8 * width)
    assert theirs.std() > 0.1
    mine = _sample(family, noise, prompts, guidance, minimum)
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [None, (64, 96)])
def test_sigmas_are_shifted_by_the_pictures_size(family: LongCatFamily, size: tuple[int, int] | None) -> None:
    tokens = 64 * 64 if size is None else 32 * 48
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    for steps in range(1, 9):
        plain = [1 - step * (1 - 1 / steps) / max(steps - 1, 1) for step in range(steps)]
        expected = [*(math.exp(mu) / (math.exp(mu) + 1 / sigma - 1) for sigma in plain), 0.0]
        assert family.sigmas(steps, size) == pytest.approx(expected, abs=1e-6)
        assert family.sigmas(steps, size)[0] == 1.0


def test_velocity_keeps_the_samples_dtype_and_tells_close_times_apart(folder: Path) -> None:
    half = LongCatFamily.load(folder, torch.bfloat16, only=("transformer",))
    x = torch.randn((1, 16, 8, 8))
    text = {"encoder_hidden_states": torch.randn((1, 7, 32))}
    with torch.no_grad():
        # 0.9 and 0.899 are the same bfloat16, and so are a thousand times each.
        early, late = [half.velocity(half.transformer, x, torch.tensor([s]), text) for s in (0.9, 0.899)]
    assert early.dtype == torch.float32
    assert not torch.equal(early, late)


# folders


def test_saved_folder_is_the_same_model_with_the_given_transformer(
    family: LongCatFamily, tmp_path: Path
) -> None:
    other = type(family.transformer).from_config(family.transformer.config)
    family.save(tmp_path / "saved", transformer=other)
    again = LongCatImagePipeline.from_pretrained(tmp_path / "saved", text_processor=None)
    assert type(again) is LongCatImagePipeline
    for name, weights in again.transformer.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name]), name
    prompts = PROMPTS[:2]
    torch.testing.assert_close(
        again.encode_prompt(prompts)[0], family.encode(prompts)["encoder_hidden_states"], atol=1e-5, rtol=0
    )
    assert not list((tmp_path / "saved").rglob("*.bin"))


def test_processor_that_rewrites_prompts_is_kept_and_never_loaded(folder: Path, tmp_path: Path) -> None:
    """It needs torchvision, which nothing here has."""
    whole = shutil.copytree(folder, tmp_path / "whole")
    index = json.loads((whole / INDEX).read_text(encoding="utf-8"))
    index[REWRITER] = ["transformers", "Qwen2_5_VLProcessor"]
    (whole / INDEX).write_text(json.dumps(index), encoding="utf-8")
    (whole / REWRITER).mkdir()
    (whole / REWRITER / "chat_template.jinja").write_text("kept", encoding="utf-8")
    family = LongCatFamily.load(whole)
    assert family.pipeline.text_processor is None
    family.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / INDEX).read_text(encoding="utf-8"))
    assert (saved["_class_name"], saved[REWRITER]) == ("LongCatImagePipeline", index[REWRITER])
    assert (tmp_path / "saved" / REWRITER / "chat_template.jinja").read_text(encoding="utf-8") == "kept"


def test_a_part_is_loaded_alone(folder: Path, family: LongCatFamily) -> None:
    text, flow = (LongCatFamily.load(folder, only=(part,)) for part in ("text_encoder", "transformer"))
    assert {weights.device.type for weights in text.transformer.parameters()} == {"meta"}
    assert (flow.text_encoders(), flow.text_modules()) == ([], {})
    assert torch.equal(flow.tokenize(PROMPTS)["input_ids"], family.tokenize(PROMPTS)["input_ids"])
    alone, together = (some.encode(PROMPTS[:1])["encoder_hidden_states"] for some in (text, family))
    assert torch.equal(alone, together)


def test_tokenizer_that_pads_on_the_left_is_refused(folder: Path, tmp_path: Path) -> None:
    left = shutil.copytree(folder, tmp_path / "left")
    config = left / "tokenizer" / "tokenizer_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text(encoding="utf-8")), "padding_side": "left"}),
        encoding="utf-8",
    )
    with pytest.raises(FamilyError, match="pads on the left"):
        LongCatFamily.load(left, only=())


# graphs


def _export(module: GraphModule, example: dict[str, torch.Tensor], root: Path, capfd: Any) -> Any:
    model = to_onnx(module, example, OPSET["float32"])
    capfd.readouterr()  # the exporter prints its progress
    save_model(root, "graph", model)
    return open_session(root / "graph.onnx"), model


def _assert_same(session: Any, module: GraphModule, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        expected = module(*(inputs[name] for name in module.inputs))
    found = session.run(list(module.outputs), {name: tensor.numpy() for name, tensor in inputs.items()})
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == tuple(theirs.shape)
        assert _relative(mine, theirs) < 1e-5


@pytest.mark.parametrize("skip", [(), LongCatFamily.rewrites], ids=["fused", "as diffusers has it"])
def test_exported_denoiser_equals_torch_at_other_shapes(
    folder: Path, tmp_path: Path, capfd: Any, skip: tuple[str, ...]
) -> None:
    family = LongCatFamily.load(folder, only=("transformer",))
    text = {"text_states": {0: "batch", 1: "text_encoder_states"}}
    plain = DenoiserGraph(family, text)

    def inputs(batch: int, height: int, width: int, length: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(batch)
        sigma = torch.rand((batch,), generator=random) / 2 + 0.5
        return {
            "x": torch.randn((batch, 16, height, width), generator=random),
            "sigma": sigma,
            "sigma_next": sigma / 2,
            "text_states": torch.randn((batch, length, 32), generator=random),
        }

    fused = LongCatFamily.load(folder, only=("transformer",))
    fused.fuse(skip)
    session, model = _export(DenoiserGraph(fused, text), inputs(2, 8, 12, 20), tmp_path, capfd)
    for shape in ((1, 10, 6, 64), (3, 6, 14, 9), (2, 2, 2, 512)):
        _assert_same(session, plain, inputs(*shape))
    cosines = [node.op_type for node in model.graph].count("Cos")
    assert cosines == (1 if not skip else 4)  # of time, and of positions along three axes


def test_exported_text_encoder_equals_torch_at_other_lengths(
    folder: Path, tmp_path: Path, capfd: Any
) -> None:
    family = LongCatFamily.load(folder, only=("text_encoder",))
    family.text_length = 24
    (encoder,) = family.text_encoders()
    module = TextEncoderGraph(encoder, encoder.outputs)
    session, _ = _export(module, family.tokenize(PROMPTS[:2]), tmp_path, capfd)
    for length, prompts in ((24, PROMPTS[2:5]), (64, PROMPTS[:1]), (512, PROMPTS[4:6])):
        family.text_length = length
        _assert_same(session, module, family.tokenize(prompts))
