"""Bundle → model repository of NVIDIA Triton Inference Server: one model per component, ready to be served.

Needs tritonclient[grpc] (its `ModelConfig`); `model.py` is not imported here but copied into the repository.
"""
