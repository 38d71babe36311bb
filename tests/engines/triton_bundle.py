"""A bundle of known bytes, and what is read of the repository that it becomes."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from engines.bundle import Bundle, Graph, file_ref, load_bundle, write_manifest
from engines.fake import fake_manifest

COMPONENTS = ("text_encoder", "denoiser", "decoder")
WEIGHTS = b"external weights"


def known_bundle(root: Path) -> Bundle:
    """Graphs of known bytes, each with a bfloat16 form; the denoiser's weights lie beside its graph."""
    root.mkdir()
    manifest = fake_manifest(root, name="emoji")
    (root / "denoiser.onnx.data").write_bytes(WEIGHTS)
    components = {}
    for name, component in manifest.components.items():
        graphs = {}
        for precision, suffix in (("float32", ".onnx"), ("bfloat16", ".bf16.onnx")):
            path = root / f"{name}{suffix}"
            path.write_bytes(path.name.encode())
            data = (file_ref(root, root / "denoiser.onnx.data"),) if name == "denoiser" else ()
            graphs[precision] = Graph(file=file_ref(root, path), data=data, opset=20)
        components[name] = component.model_copy(update={"graphs": graphs})
    lengths = {"text_encoder_length": 77}
    write_manifest(root, manifest.model_copy(update={"components": components, "text_lengths": lengths}))
    return load_bundle(root)


def read_config(out: Path, component: str) -> pb.ModelConfig:
    """What Triton would read; the text format refuses fields that there are not."""
    text = (out / f"emoji-{component}" / "config.pbtxt").read_text(encoding="utf-8")
    config: pb.ModelConfig = text_format.Parse(text, pb.ModelConfig())
    return config


def tree(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
