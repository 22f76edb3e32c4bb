"""A pretend accelerator: tensors that are on a device which is not the CPU, and refuse to meet any that are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("lazy:0")
"""A device type that torch knows and of which no machine has one; its backward runs on the thread that asks for it."""

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations that take indices from the CPU, on CUDA too."""


class Log:
    """What happened on the device since the test began."""

    operations: ClassVar[int] = 0
    refused: ClassVar[list[str]] = []

    @classmethod
    def refuse(cls, why: str) -> None:
        cls.refused.append(why)
        raise RuntimeError(why)


class OnDevice(Tensor):
    """A tensor of the pretend device: a CPU tensor inside, which nothing but its operations sees."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # what torch does, and refuses for subclasses

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """While it is entered, `DEVICE` can be named wherever a device can: in ``torch.zeros`` as in ``.to``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def __enter__(self) -> Pretend:
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) makes a CPU tensor and then moves it
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self.before)


def compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Do one operation of torch on the CPU, and say of what it gives where it is; RuntimeError as CUDA raises."""
    tensors = list(tensors_in(args)) + list(tensors_in(kwargs.values()))
    ours = [value for value in tensors if isinstance(value, OnDevice)]
    named = kwargs.get("device")
    if named is None and not ours:
        return func(*args, **kwargs)
    inside = bool(ours) if named is None else torch.device(named).type == DEVICE.type
    Log.operations += bool(ours)
    if func not in (aten._to_copy.default, aten.copy_.default):
        if ours or inside:
            refuse_strays(func, args, tensors)
        if inside and isinstance(kwargs.get("generator"), torch.Generator):
            Log.refuse(f"{func}: a generator of the CPU cannot draw on the device")
    args, kwargs = tree_map_only(OnDevice, lambda value: value.inner, (args, dict(kwargs)))
    if named is not None:
        kwargs["device"] = torch.device("cpu")
    if func is aten._efficientzerotensor.default:
        func = aten.zeros.default  # zeros without memory know of themselves by a flag, which a wrapper loses
    result = func(*args, **kwargs)
    if func is aten.copy_.default:
        inside = any(value.inner is result for value in ours)
    if not inside:
        return result
    same = {id(value.inner): value for value in ours}  # what works in place gives back its own argument
    return tree_map_only(Tensor, lambda value: same[id(value)] if id(value) in same else OnDevice(value), result)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments, of which some are lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def refuse_strays(func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError where tensors of both places meet; single numbers and indices may, as on CUDA."""
    strays = [value for value in tensors if not isinstance(value, OnDevice) and value.dim() > 0]
    if func in INDEXING and isinstance(args[0], OnDevice):
        indices = {id(value) for value in args[1] if isinstance(value, Tensor)}
        strays = [value for value in strays if id(value) not in indices]
    if strays:
        Log.refuse(f"{func}: a CPU tensor {list(strays[0].shape)} among those of the device")


@pytest.fixture
def pretend() -> Iterator[torch.device]:
    """The pretend device while the test runs, which fails if nothing was computed there or anything strayed.

    What caught the error and went on without is told of too.
    """
    Log.operations, Log.refused = 0, []
    with Pretend():
        yield DEVICE
    assert not Log.refused
    assert Log.operations > 0


@pytest.fixture
def forgiven(pretend: torch.device) -> Iterator[None]:
    """Strays of this test are meant."""
    yield
    Log.refused.clear()
