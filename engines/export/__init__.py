"""Student (diffusers folder) → bundle (ONNX, manifest).

Needs torch, diffusers and onnx; serving imports none of this.
"""
