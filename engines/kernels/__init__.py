"""Custom OpenAI Triton kernels for the GPU path of torch and AOTInductor, behind one switch.

    from engines.kernels.switch import use_fused_kernels
    use_fused_kernels(family.transformer, enabled=True)     # its blocks run with the kernels; False: as before

    layer_norm_modulate      y = LN(x)·(1 + scale) + shift
    gate_residual_norm       r = x + gate·h, and y = LN(r)·(1 + scale) + shift
    qk_norm_rope             RMSNorm and rotary embedding of q and k, image and text written behind one another

Each is one file: the kernel, the operator (`torch.ops.cdm.…`, which torch.compile, torch.export and AOTInductor know),
the function to call, and the same in plain torch. All of them compute in float32, whatever they read and write, and
launch on the current CUDA device. They have no backward.

`python -m engines.kernels.compile` compiles them for every GPU generation, on any machine, and says what they take.
"""
