"""Memory, copies and graphs of one device, on a double of the CUDA runtime."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from types import FunctionType

import numpy as np
import pytest
from cuda.bindings import runtime as real

from engines.cuda import STAGING_BYTES, Cuda
from engines.errors import ExecutionError, RuntimeUnavailable
from tests.engines.fake_cuda import FakeCuda

GIVES_ONE = {
    "cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaDriverGetVersion", "cudaStreamCreateWithFlags", "cudaMalloc",
    "cudaMallocHost", "cudaStreamEndCapture", "cudaGraphInstantiate",
}  # fmt: skip
GIVES_TWO = {"cudaMemGetInfo"}

no_gpu = pytest.mark.skipif(
    not int(real.cudaGetDeviceCount()[0]), reason="a GPU would really be called with made-up addresses"
)


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def cuda(fake: FakeCuda) -> Iterator[Cuda]:
    cuda = Cuda(fake)
    yield cuda
    cuda.close()


def download(cuda: Cuda, pointer: int, like: np.ndarray) -> np.ndarray:
    return cuda.download(pointer, like.shape, like.dtype)


def test_a_device_says_what_it_is(cuda: Cuda) -> None:
    assert (cuda.name, cuda.capability, cuda.driver) == ("NVIDIA Fake 4090", "8.9", 13010)


@no_gpu
def test_no_device_is_told_by_cudas_own_name_for_it() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"no usable CUDA device here: .*cudaError"):
        Cuda()


def test_no_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", None)
    with pytest.raises(RuntimeUnavailable, match="needs the package cuda-python"):
        Cuda()


def test_arrays_come_back_as_they_went(cuda: Cuda) -> None:
    arrays = [
        np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],  # not contiguous
        np.array([7, -1], np.int64),
        np.float32(0.25),
        np.arange(7, dtype=np.uint8),
    ]
    pointers = [cuda.allocate(array.nbytes) for array in arrays]
    for array, pointer in zip(arrays, pointers, strict=True):
        cuda.upload(pointer, array)
    for array, pointer in zip(arrays, pointers, strict=True):
        np.testing.assert_array_equal(download(cuda, pointer, array), array)


def test_an_uploaded_array_is_the_callers_again_at_once(cuda: Cuda) -> None:
    array, pointer = np.ones(4, np.float32), cuda.allocate(16)
    cuda.upload(pointer, array)
    array[:] = 2
    assert download(cuda, pointer, array).tolist() == [1, 1, 1, 1]


def test_uploads_that_outgrow_the_staging_memory_all_arrive(cuda: Cuda) -> None:
    sizes = [STAGING_BYTES // 2, STAGING_BYTES // 2 + 1, 3 * STAGING_BYTES, 5]
    arrays = [np.full(size, index + 1, np.uint8) for index, size in enumerate(sizes)]
    pointers = [cuda.allocate(array.nbytes) for array in arrays]
    for array, pointer in zip(arrays, pointers, strict=True):
        cuda.upload(pointer, array)
    for array, pointer in zip(arrays, pointers, strict=True):
        np.testing.assert_array_equal(download(cuda, pointer, array), array)


def test_a_forgotten_rows_memory_serves_the_next_of_its_size_and_a_held_one_keeps_its_own(cuda: Cuda) -> None:
    first, held = cuda.row((2, 3)), cuda.row((3, 2))
    pointer = first.pointer
    assert held.pointer != pointer
    del first
    gc.collect()
    assert cuda.row((4,)).pointer != pointer, "another size"
    assert cuda.row((6,)).pointer == pointer


def test_rows_may_be_forgotten_on_another_thread_without_calling_cuda(cuda: Cuda, fake: FakeCuda) -> None:
    rows = [cuda.row((5,)) for _ in range(3)]
    pointers = {row.pointer for row in rows}
    before = len(fake.calls)
    thread = threading.Thread(target=rows.clear)
    thread.start()
    thread.join()
    assert len(fake.calls) == before
    assert {row.pointer for row in [cuda.row((5,)) for _ in range(3)]} == pointers


def test_a_capture_records_without_running_and_a_launch_runs_it_on_what_is_there_then(cuda: Cuda) -> None:
    source, target = cuda.row((2,)), cuda.row((2,))
    cuda.upload(target.pointer, np.zeros(2, np.float32))

    def enqueue() -> bool:
        cuda.copy(target.pointer, source.pointer, source.nbytes)
        return True

    graph = cuda.capture(enqueue)
    like = np.zeros(2, np.float32)
    assert download(cuda, target.pointer, like).tolist() == [0, 0]
    for value in (1, 2):
        cuda.upload(source.pointer, np.full(2, value, np.float32))
        cuda.launch(graph)
        assert download(cuda, target.pointer, like).tolist() == [value, value]


def test_a_capture_that_fails_leaves_the_stream_usable(cuda: Cuda, fake: FakeCuda) -> None:
    with pytest.raises(ExecutionError, match="cannot be captured"):
        cuda.capture(lambda: False)
    assert not fake.capturing
    assert fake.calls[-1][0] == "cudaGraphDestroy"
    fake.fail("cudaStreamEndCapture", real.cudaError_t.cudaErrorStreamCaptureInvalidated)
    with pytest.raises(ExecutionError, match="cudaErrorStreamCaptureInvalidated"):
        cuda.capture(lambda: True)
    assert not fake.capturing
    assert fake.calls[-1][0] == "cudaGetLastError", "another library would report this error as its own"
    cuda.synchronize()


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_every_status_is_checked_and_told_by_name(cuda: Cuda, fake: FakeCuda, function: str) -> None:
    def put() -> None:
        cuda.upload(cuda.row((3,)).pointer, np.zeros(3, np.float32))
        cuda.synchronize()

    fake.fail(function)
    with pytest.raises(ExecutionError, match="cudaErrorIllegalAddress"):
        put()


def test_out_of_memory_says_how_much_was_asked_for(cuda: Cuda, fake: FakeCuda) -> None:
    fake.fail("cudaMalloc", real.cudaError_t.cudaErrorMemoryAllocation)
    with pytest.raises(ExecutionError, match="could not allocate 12 bytes: cudaErrorMemoryAllocation"):
        cuda.row((3,))


def test_close_frees_everything_once_held_rows_too(fake: FakeCuda) -> None:
    cuda = Cuda(fake)
    held = cuda.row((8,))
    cuda.upload(held.pointer, np.zeros(8, np.float32))
    cuda.capture(lambda: True)
    assert fake.held()
    cuda.close()
    assert not fake.held()
    calls = len(fake.calls)
    cuda.close()
    del held
    gc.collect()
    assert len(fake.calls) == calls


@no_gpu
def test_the_real_bindings_take_every_call_that_was_made(cuda: Cuda, fake: FakeCuda) -> None:
    """Without a driver they refuse each, but only after they have understood it."""
    row = cuda.row((2,))
    cuda.upload(row.pointer, np.zeros(2, np.float32))
    cuda.launch(cuda.capture(lambda: True))
    cuda.download(row.pointer, (2,), np.dtype(np.float32))
    cuda.free_bytes()
    fake.fail("cudaMalloc")
    with pytest.raises(ExecutionError):
        cuda.row((2,))
    cuda.close()
    made = dict(fake.calls)
    assert set(made) == {
        name
        for name, function in vars(FakeCuda).items()
        if name.startswith("cuda") and isinstance(function, FunctionType)
    }
    for name, arguments in made.items():
        answer = getattr(real, name)(*arguments)
        assert isinstance(answer[0], real.cudaError_t), name
        assert len(answer) == 1 + (name in GIVES_ONE) + 2 * (name in GIVES_TWO), name
