"""A base with an adapter is exported as what diffusers makes of the two; what cannot be is refused at once."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LongCatImageTransformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engines.errors import ExportError
from engines.export import student as student_module
from engines.export.adapter import read_adapter
from engines.export.student import check_dtypes, prepare_student
from engines.families.base import Family, load_family
from engines.families.loading import quiet

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTER = "pytorch_lora_weights.safetensors"


def settings(targets: list[str], **changes: Any) -> LoraConfig:
    """Rank 4, and neither alpha nor the second block's rank equal to it; both matrices random."""
    return LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 7,
            "rank_pattern": {"transformer_blocks.1.attn.to_q": 2},
            "alpha_pattern": {"transformer_blocks.0.attn.to_v": 3},
            "target_modules": targets,
            "init_lora_weights": False,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def base(student: Path) -> StableDiffusion3Pipeline:
    return load_pipeline(student)


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    with quiet():
        return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def save_diffusers(student: Path, folder: Path, metadata: bool, **changes: Any) -> Path:
    """Adapters of the transformer and of both CLIPs, as diffusers' training scripts save them."""
    pipeline = load_pipeline(student)
    modules: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        pipeline.transformer.add_adapter(settings([*ATTENTION, "ff.net.2"], **changes))
        modules["transformer"] = pipeline.transformer
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipeline, name)
            encoder.add_adapter(settings(["q_proj", "fc1"], rank_pattern={}, alpha_pattern={}))
            modules[name] = encoder
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": get_peft_model_state_dict(module) for name, module in modules.items()},
        **(_collate_lora_metadata(modules) if metadata else {}),
    )
    return folder


def save_peft(student: Path, folder: Path, **changes: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        wrapped = get_peft_model(
            load_family(student, only=("transformer",)).transformer, settings(ATTENTION, **changes)
        )
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                torch.nn.init.normal_(parameter)
        wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusers(student, tmp_path_factory.mktemp("adapters") / "diffusers", metadata=True)


@torch.no_grad()
def velocity(family: Family, transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    conditioning = {
        "encoder_hidden_states": torch.randn((2, 5, 64), generator=generator),
        "pooled_projections": torch.randn((2, 64), generator=generator),
    }
    x = torch.randn((2, 8, 6, 8), generator=generator)
    return family.velocity(transformer, x, torch.tensor([1.0, 0.4]), conditioning)


@torch.no_grad()
def embeddings(pipeline: Any) -> tuple[torch.Tensor, torch.Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(
        ["red apple", ""], None, None, do_classifier_free_guidance=False, max_sequence_length=12
    )
    return text, pooled


@pytest.mark.parametrize("metadata", [True, False], ids=["alpha-in-metadata", "alpha-is-rank"])
def test_merged_folder_is_what_diffusers_makes_of_base_and_adapter(
    student: Path, base: StableDiffusion3Pipeline, tmp_path: Path, metadata: bool
) -> None:
    lora = save_diffusers(student, tmp_path / "lora", metadata)
    merged = load_family(prepare_student(student, lora, tmp_path / "merged"))
    loaded = load_pipeline(student)
    loaded.load_lora_weights(str(lora))
    theirs = velocity(merged, loaded.transformer)
    torch.testing.assert_close(velocity(merged, merged.transformer), theirs, atol=1e-5, rtol=0)
    assert (theirs - velocity(merged, base.transformer)).abs().max() > 0.1
    pairs = zip(embeddings(merged.pipeline), embeddings(loaded), embeddings(base), strict=True)  # type: ignore[attr-defined]
    for mine, wanted, plain in pairs:
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0)
        assert (wanted - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["proj_out"]}],
    ids=["plain", "rslora", "dora", "whole-module"],
)
def test_merged_peft_adapter_is_what_peft_computes(
    student: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    lora = save_peft(student, tmp_path / "lora", **changes)
    merged = load_family(prepare_student(student, lora, tmp_path / "merged"))
    transformer = load_family(student, only=("transformer",)).transformer
    plain = velocity(merged, transformer)
    wrapped = PeftModel.from_pretrained(transformer, str(lora)).eval()
    theirs = velocity(merged, wrapped.base_model.model)
    torch.testing.assert_close(velocity(merged, merged.transformer), theirs, atol=1e-5, rtol=0)
    assert (theirs - plain).abs().max() > 0.1


def test_adapter_may_be_named_by_its_file(student: Path, tmp_path: Path, adapter: Path) -> None:
    peft = save_peft(student, tmp_path / "peft")
    for folder, file in ((adapter, ADAPTER), (peft, "adapter_model.safetensors")):
        by_folder, by_file = read_adapter(folder), read_adapter(folder / file)
        assert (by_file.path, by_file.settings, by_file.folder) == (
            by_folder.path,
            by_folder.settings,
            by_folder.folder,
        )
        torch.testing.assert_close(by_file.tensors, by_folder.tensors, atol=0, rtol=0)


def test_names_from_before_peft_are_understood(student: Path, tmp_path: Path, adapter: Path) -> None:
    tensors = {
        name: tensor
        for name, tensor in load_file(adapter / ADAPTER).items()
        if not name.startswith("text_encoder_2")
    }
    old = {
        name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        if name.startswith("transformer.")
        else name.replace(".lora_A.", ".lora_linear_layer.down.").replace(
            ".lora_B.", ".lora_linear_layer.up."
        ): tensor
        for name, tensor in tensors.items()
    }
    for folder, content in (("new", tensors), ("old", old)):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / ADAPTER)
        prepare_student(student, tmp_path / folder, tmp_path / f"{folder}-merged")
    for name in ("transformer", "text_encoder"):
        (new,) = (tmp_path / "new-merged" / name).glob("*.safetensors")
        assert (tmp_path / "old-merged" / name / new.name).read_bytes() == new.read_bytes(), name


def test_longcat_takes_an_adapter_without_prefix_and_one_of_its_text_encoder(tmp_path: Path) -> None:
    from tests.tiny_longcat import build_tiny_longcat

    folder = build_tiny_longcat(tmp_path / "longcat")
    transformer = LongCatImageTransformer2DModel.from_pretrained(folder / "transformer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        transformer.add_adapter(
            settings(["attn.to_q", "proj_mlp"], rank_pattern={}, alpha_pattern={}), adapter_name="default"
        )
    transformer.save_lora_adapter(tmp_path / "lora")
    merged = prepare_student(folder, tmp_path / "lora", tmp_path / "merged")
    mine = LongCatImageTransformer2DModel.from_pretrained(merged / "transformer")
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn((1, 6, 64), generator=generator),
        "encoder_hidden_states": torch.randn((1, 4, 32), generator=generator),
        "timestep": torch.tensor([0.7]),
        "txt_ids": torch.zeros(4, 3),
        "img_ids": torch.ones(6, 3),
        "return_dict": False,
    }
    with torch.no_grad():
        theirs = transformer(**inputs)[0]
        torch.testing.assert_close(mine(**inputs)[0], theirs, atol=1e-5, rtol=0)
        transformer.disable_lora()
        assert (theirs - transformer(**inputs)[0]).abs().max() > 0.1


def test_without_an_adapter_nothing_is_touched(student: Path, tmp_path: Path) -> None:
    assert prepare_student(student, None, tmp_path / "merged") == student
    assert prepare_student(Path("someone/a-model"), None, tmp_path / "merged") == Path("someone/a-model")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("links", [True, False], ids=["one-file-system", "two"])
def test_what_no_adapter_changes_is_linked_or_copied(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    source = shutil.copytree(student, tmp_path / "base")
    torch.save({}, source / "vae" / "diffusion_pytorch_model.bin")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    merged = prepare_student(source, save_peft(student, tmp_path / "lora"), tmp_path / "merged")
    for path, content in before.items():
        name = path.relative_to(source)
        if path.suffix == ".bin":
            assert not (merged / name).exists()
        elif name == Path("transformer", WEIGHTS):
            assert (merged / name).read_bytes() != content
        else:
            assert (merged / name).read_bytes() == content, name
            assert (merged / name).samefile(path) == links, name
        assert path.read_bytes() == content
    assert (merged / "provenance.json").is_file()


def test_weights_are_merged_in_float32_whatever_the_base_is_stored_in(student: Path, tmp_path: Path) -> None:
    half = shutil.copytree(student, tmp_path / "half")
    weights = half / "transformer" / WEIGHTS
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}, weights)
    merged = prepare_student(half, save_peft(student, tmp_path / "lora"), tmp_path / "merged")
    with safe_open(merged / "transformer" / WEIGHTS, framework="pt") as opened:
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F32"}  # noqa: SIM118


def test_one_component_is_in_memory_at_a_time(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    seen: list[Any] = []

    def merge(adapter: Any, name: str, module: Any) -> Any:
        assert all(earlier() is None for earlier in seen)
        seen.append(weakref.ref(module))
        return merge_(adapter, name, module)

    merge_ = student_module.merge_
    monkeypatch.setattr(student_module, "merge_", merge)
    prepare_student(student, adapter, tmp_path / "merged")
    assert len(seen) == 3


def test_base_on_the_hub_is_downloaded_for_merging(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = save_peft(student, tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(student)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    merged = prepare_student(Path("someone/a-model"), lora, tmp_path / "merged")
    assert asked == [("someone/a-model", {"use_safetensors": True})]
    assert (merged / "transformer" / WEIGHTS).is_file()

    def offline(*_: object, **__: object) -> str:
        raise OSError("No connection.\nMore.")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    with pytest.raises(
        ExportError, match=r"no folder a/b, and the hub's model 'a/b' cannot be had \(No connection\)"
    ):
        prepare_student(Path("a/b"), lora, tmp_path / "other")


def _rewritten(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path, Path], None]:
    """Change the tensors of the adapter; its metadata stays."""

    def rewrite(folder: Path, _: Path) -> None:
        with safe_open(folder / ADAPTER, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(folder / ADAPTER)
        change(tensors)
        save_file(tensors, folder / ADAPTER, metadata)

    return rewrite


FIRST = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"


def _rename(old: str, new: str) -> Callable[[Path, Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return _rewritten(change)


def _pickled(folder: Path, _: Path) -> None:
    torch.save({}, folder / "pytorch_lora_weights.bin")
    (folder / ADAPTER).unlink()


def _set(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path, Path], None]:
    return _rewritten(lambda tensors: tensors.update({name: make(tensors[name])}))


def _huge(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST.format("A")] = torch.full_like(tensors[FIRST.format("A")], 1e30)
    tensors[FIRST.format("B")] = torch.full_like(tensors[FIRST.format("B")], 1e30)


REFUSED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "no folder": (lambda lora, _: shutil.rmtree(lora), r"there is no adapter .*lora; give a file or folder"),
    "empty folder": (lambda lora, _: (lora / ADAPTER).unlink(), r"lora has no pytorch_lora_weights\.safetensors and"),
    "pickle": (_pickled, r"pytorch_lora_weights\.bin is a pickle"),
    "cut short": (
        lambda lora, _: os.truncate(lora / ADAPTER, 5000),
        r"pytorch_lora_weights\.safetensors cannot be read as safetensors",
    ),
    "two adapters": (
        lambda lora, _: shutil.copyfile(lora / ADAPTER, lora / "adapter_model.safetensors"),
        r"several adapters \(pytorch_lora_weights\.safetensors, adapter_model\.safetensors\); name one",
    ),
    "no LoRA": (
        _rewritten(lambda tensors: (tensors.clear(), tensors.update({"proj_out.weight": torch.zeros(2, 2)}))),
        r"holds no LoRA weights but proj_out\.weight",
    ),
    "another model": (
        _rename("transformer_blocks.1.", "transformer_blocks.7."),
        r"adapter for another transformer: transformer_blocks\.7\.attn\.\S+ belongs to no layer of this SD3Trans",
    ),
    "another width": (
        _set(FIRST.format("A"), lambda tensor: tensor[:, :32].contiguous()),
        r"to_q\.lora_A\.weight is \[4, 32\], the layer's weight \[64, 64\]",
    ),
    "another rank": (
        _set(FIRST.format("A"), lambda tensor: tensor[:3].contiguous()),
        r"cannot be merged into transformer: size mismatch for transformer_blocks\.0\.attn\.to_q\.lora_A",
    ),
    "half": (
        _rewritten(lambda tensors: tensors.pop(FIRST.format("B"))),
        r"to_q\.lora_A\.weight is there without transformer_blocks\.0\.attn\.to_q\.lora_B\.weight",
    ),
    "scales of its own": (
        _rewritten(
            lambda tensors: tensors.update({"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(8.0)})
        ),
        r"transformer_blocks\.0\.attn\.to_q\.alpha is no LoRA weight",
    ),
    "another component": (_rename("text_encoder_2.", "text_encoder_3."), r"text_encoder_3\.\S+ is for none of the"),
    "component that is not there": (
        lambda _, base: _without(base, "text_encoder_2"),
        r"lora is an adapter for text_encoder_2, which .*base does not have",
    ),
    "NaN": (
        _set(FIRST.format("B"), lambda tensor: tensor * float("nan")),
        r"to_q\.lora_B\.weight holds values that are no finite numbers",
    ),
    "too much": (
        _rewritten(_huge),
        r"transformer: transformer_blocks\.0\.attn\.to_q\.weight is not finite once .* is merged",
    ),
    "base not there": (lambda _, base: shutil.rmtree(base), r"base is not a diffusers folder: model_index\.json is"),
    "base quantized": (
        lambda _, base: _store(base / "transformer" / WEIGHTS, "proj_out.weight", torch.float8_e4m3fn),
        r"transformer/diffusion_pytorch_model\.safetensors: proj_out\.weight is F8_E4M3; weights in F64, F32, F16",
    ),
}  # fmt: skip


def _without(base: Path, name: str) -> None:
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    index[name] = [None, None]
    (base / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def _store(file: Path, name: str, dtype: torch.dtype) -> None:
    tensors = load_file(file)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_sentence_and_leaves_nothing(
    student: Path, tmp_path: Path, adapter: Path, case: str
) -> None:
    break_it, message = REFUSED[case]
    lora, base = shutil.copytree(adapter, tmp_path / "lora"), shutil.copytree(student, tmp_path / "base")
    break_it(lora, base)
    with pytest.raises(ExportError, match=message) as refused:
        prepare_student(base, lora, tmp_path / "merged")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json is of 'IA3'; a LORA adapter is needed"),
        (
            {"use_next_years_method": True},
            r"adapter_config\.json sets use_next_years_method, which PEFT \S+ does not know; install",
        ),
        (
            {"target_modules": ["attn.to_k"]},
            r"to_\w+\S*\.lora_A\.weight is in the file and not in its settings",
        ),
        ({"r": 3, "rank_pattern": {}}, r"cannot be merged into transformer: size mismatch for base_model"),
    ],
)
def test_peft_settings_that_do_not_fit_are_refused(
    student: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    lora = save_peft(student, tmp_path / "lora")
    path = lora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(ExportError, match=message) as refused:
        prepare_student(student, lora, tmp_path / "merged")
    assert "\n" not in str(refused.value)
    path.unlink()
    with pytest.raises(ExportError, match=r"adapter_config\.json is not a PEFT adapter's configuration"):
        prepare_student(student, lora, tmp_path / "merged")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floating_weights_and_known_integer_buffers_are_let_pass(
    student: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = shutil.copytree(student, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(12)[None]}, file)
    check_dtypes(folder)
    check_dtypes(Path("someone/a-model"))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
    ],
)
def test_quantized_weights_are_refused_by_file_tensor_and_dtype(
    student: Path, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    folder = shutil.copytree(student, tmp_path / "model")
    _store(folder / "vae" / WEIGHTS, "decoder.layers.0.weight", dtype)
    with pytest.raises(
        ExportError,
        match=rf"vae/{WEIGHTS}: decoder\.layers\.0\.weight is {name}; weights in F64, F32, F16, BF16 are",
    ):
        check_dtypes(folder)


def _shard(folder: Path) -> Path:
    """Two files and an index, as published transformers have them."""
    whole = folder / "transformer" / WEIGHTS
    tensors = load_file(whole)
    whole.unlink()
    stem, weight_map = "diffusion_pytorch_model", {}
    for number in (1, 2):
        file = f"{stem}-0000{number}-of-00002.safetensors"
        part = {
            name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % 2 == number - 1
        }
        save_file(part, folder / "transformer" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "transformer" / f"{stem}.safetensors.index.json").write_text(
        json.dumps(index), encoding="utf-8"
    )
    return folder / "transformer" / f"{stem}-00002-of-00002.safetensors"


def test_sharded_base_is_checked_and_merged_like_a_whole_one(student: Path, tmp_path: Path) -> None:
    sharded = shutil.copytree(student, tmp_path / "sharded")
    second = _shard(sharded)
    check_dtypes(sharded)
    lora = save_peft(student, tmp_path / "lora")
    files = [
        prepare_student(folder, lora, tmp_path / name) / "transformer" / WEIGHTS
        for name, folder in (("from-whole", student), ("from-shards", sharded))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    _store(second, next(iter(load_file(second))), torch.int8)
    with pytest.raises(ExportError, match=r"00002-of-00002\.safetensors: \S+ is I8"):
        check_dtypes(sharded)


def _missing_shard(folder: Path) -> None:
    _shard(folder).unlink()


def _bad_index(folder: Path) -> None:
    _shard(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        "{}", encoding="utf-8"
    )


def _variant(folder: Path) -> None:
    weights = folder / "transformer" / WEIGHTS
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))


def _pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "transformer" / WEIGHTS).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            _missing_shard,
            r"transformer lacks diffusion_pytorch_model-00002-of-00002\.safetensors, 1 of the 2 files that",
        ),
        (_bad_index, r"diffusion_pytorch_model\.safetensors\.index\.json is not an index of shards"),
        (
            _variant,
            r"transformer has no diffusion_pytorch_model\.safetensors .*there is config\.json, diff\S+\.fp16\.s",
        ),
        (_pointer, rf"{WEIGHTS} is no whole safetensors file: it is a Git LFS pointer; run git lfs pull"),
        (
            lambda folder: os.truncate(folder / "transformer" / WEIGHTS, 9000),
            rf"{WEIGHTS} is no whole safetensors file: .*; copy or download it again",
        ),
        (lambda folder: shutil.rmtree(folder / "vae"), r"model lacks vae, which its model_index\.json names"),
        (lambda folder: (folder / "model_index.json").unlink(), r"model is not a diffusers folder"),
    ],
)
def test_incomplete_folders_are_told_before_anything_is_loaded(
    student: Path, tmp_path: Path, break_it: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(student, tmp_path / "model")
    break_it(folder)
    with pytest.raises(ExportError, match=message) as refused:
        check_dtypes(folder)
    assert "\n" not in str(refused.value)
