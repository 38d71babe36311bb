"""Student (diffusers folder) → bundle (ONNX + manifest). Needs torch, diffusers and onnx; serving does not import it."""
