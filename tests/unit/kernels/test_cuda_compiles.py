"""The GPU's kernels through Triton's whole compiler, up to a GPU's machine code, for which no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

# Not imported here: it would keep the interpreter from the tests beside this one.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# In place of a launch, the kernel is compiled for the arguments that it would be launched with.
SCRIPT = """
import functools
import inspect
import re
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from disttrain.kernels import Chunks, Feedback
from disttrain.kernels.cuda import kernels as cuda

dtypes = {}

def compile(kernel, *arguments, enable_fp_fusion, **constants):
    signature = {name: mangle_type(value) for name, value in zip(kernel.arg_names, arguments)}
    assert [*signature, *constants] == kernel.arg_names, "launched with all arguments, in order"
    assert "i64" not in signature.values(), "an integer that needs more bits is compiled for again"
    dtypes.setdefault(kernel.__name__, set()).add(signature[kernel.arg_names[0]])
    signature.update(dict.fromkeys(constants, "constexpr"))
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    options = {"enable_fp_fusion": enable_fp_fusion}
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["cubin"]

JITFunction.__getitem__ = lambda kernel, grid: functools.partial(compile, kernel)

kernels = cuda.CudaKernels()
for dtype in (torch.float32, torch.float64):
    grad = torch.ones(8192, dtype=dtype)
    for feedback in (None, Feedback.in_place(grad), Feedback(grad, grad.clone())):
        kernels.take_above(grad, feedback, 0.5, 100)
        kernels.take_largest(grad, feedback, 100)
        kernels.sign(grad, feedback, 4096)
        kernels.sign_and_level(grad, feedback, 4096)
        for value_bits in (None, 4, 16):
            kernels.take_largest_of_chunks(grad, feedback, Chunks(4096, 41, 0), value_bits)
        for seed in (None, 3, 2**32 - 3):
            kernels.quantize(grad, feedback, 8 if seed is None else 4, 2048, seed)
    for add in (False, True):
        parts = [torch.ones(8192, dtype=torch.uint8)] * 3
        for factors in (None, grad):
            kernels.dequantize_mean(
                parts, [torch.ones(4, dtype=dtype)] * 3, 8, 2048, grad, add=add, factors=factors
            )
            signs = [part[:1024] for part in parts]
            kernels.sign_mean(signs, [torch.ones(2, dtype=dtype)] * 3, 4096, grad, add=add, factors=factors)
        levels = [torch.ones(4, dtype=dtype)] * 3
        kernels.sign_and_level_mean([part[:2048] for part in parts], levels, 4096, grad, add=add)
    kernels.orthogonalize(grad, [(2, 1024), (4, 1536)])
    kernels.fill_zero_rows(grad, grad, [(2, 1024), (4, 1536)])

assert dtypes.keys() == set(re.findall(r"tiles\\w*\\.(\\w+)\\[\\(", inspect.getsource(cuda))), dtypes
# What decodes gets bytes first, whatever the gradient's dtype is.
assert all(found in ({"*fp32", "*fp64"}, {"*u8"}) for found in dtypes.values()), dtypes
"""


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
