"""Arrays of any app by the names of its model: renamed, numbered, reordered, in part, with others among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WRAPPERS = ("module.", "_module.", "_orig_mod.", "model.", "net.")
"""What trainers put before a model's own names."""


@dataclass(frozen=True)
class Fitted:
    """A model's arrays, in float32.

    Attributes:
        parameters, buffers: the model's names -> tensor, those that were there.
        missing: names of parameters that were not.
        extra: keys that belong to none.
        dtypes: kinds of numbers that came, other than float32 and the integers of counters.
        exact: whether every array came by its own name.
        misshapen: names of the model whose arrays came in another shape.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    dtypes: tuple[str, ...]
    exact: bool
    misshapen: tuple[str, ...] = ()


def fit(arrays: Mapping[str, Tensor], model: nn.Module) -> Fitted:
    """Arrays by the model's names; what cannot belong to it is left out and told."""
    state = {name: value.shape for name, value in model.state_dict().items()}
    parameters = {name for name, _ in model.named_parameters()}
    names = rename(arrays, model)
    found: dict[str, Tensor] = {}
    for key, name in names.items():
        if _same_shape(arrays[key].shape, state[name]):
            found[name] = arrays[key].reshape(state[name])
    extra = tuple(key for key in arrays if names.get(key) not in found)
    kinds = {str(v.dtype).removeprefix("torch.") for v in found.values() if v.dtype != torch.float32}
    return Fitted(
        parameters={n: _plain(found[n]) for n in state if n in found and n in parameters},
        buffers={n: _plain(found[n]) for n in state if n in found and n not in parameters},
        missing=tuple(n for n in state if n in parameters and n not in found),
        extra=extra,
        dtypes=tuple(sorted(kinds - {"int64", "int32"})),
        exact=all(key == name for key, name in names.items()) and not extra,
        misshapen=tuple(name for key, name in names.items() if name not in found),
    )


def _same_shape(one: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes are equal, or both of a single number: some ways of storing one give it a dimension."""
    return one == other or one.numel() == other.numel() == 1


def _plain(value: Tensor) -> Tensor:
    """Floats in float32, whole numbers as they are."""
    return value.float() if value.is_floating_point() else value


def rename(arrays: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Which of the model's names each key stands for; keys that stand for none are left out."""
    state = {name: value.shape for name, value in model.state_dict().items()}
    parameters = [name for name, _ in model.named_parameters()]
    by_name = {key: name for key in arrays if (name := _own_name(key, state)) is not None}
    if by_name and len(set(by_name.values())) == len(by_name) and len(by_name) >= len(arrays) / 2:
        return by_name
    keys = list(arrays)
    if all(key.isdigit() for key in keys):
        keys.sort(key=int)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    for names in (list(state), parameters, trained):
        if [state[n] for n in names] == [arrays[k].shape for k in keys]:
            return dict(zip(keys, names, strict=True))
    return dict(_in_order(keys, arrays, state))


def _own_name(key: str, state: Mapping[str, torch.Size]) -> str | None:
    """The model's name for a key: itself, or without what was put before either of them."""
    plain = key
    stripped = True
    while stripped and plain not in state:
        stripped = False
        for wrapper in WRAPPERS:
            if plain.startswith(wrapper):
                plain, stripped = plain.removeprefix(wrapper), True
    if plain in state:
        return plain
    inner = [name for name in state if name.endswith(f".{key}") or key.endswith(f".{name}")]
    return inner[0] if len(inner) == 1 else None


def _in_order(
    keys: list[str], arrays: Mapping[str, Tensor], state: Mapping[str, torch.Size]
) -> Iterator[tuple[str, str]]:
    """Keys and names whose shapes agree, both in order; what fits nowhere is passed over."""
    names = list(state)
    place = 0
    for key in keys:
        ahead = [i for i in range(place, len(names)) if state[names[i]] == arrays[key].shape]
        if ahead:
            place = ahead[0] + 1
            yield key, names[ahead[0]]
