"""From a `model` config to a network that takes [0, 1] images and returns logits."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fedleak.errors import UsageError
from fedleak.instantiate import Part, locate
from fedleak.models.frozen import frozen_as_buffers
from fedleak.models.init import INITIALISATIONS, initialise
from fedleak.models.layers import Logits, Normalize, RepeatChannels


def build_model(part: Part, image_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """Build, initialise and check the shared model. The same arguments give the same weights.

    Args:
        part: its target is the import path of a class or function that returns a `torch.nn.Module`; of its settings,
            ``init`` (default ``default``) is an initialisation and ``normalize`` null or {mean, std}; every other one
            is an argument. ``image_shape`` and ``classes`` (or ``num_classes``) are passed if the target takes them.
        image_shape: (C, H, W) of one image.
        classes: number of classes.
        seed: decides the weights. torch's global random state is left as it was.

    Returns:
        A model in train mode, on the CPU: images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``. One-channel
        images are repeated where the target's first convolution wants three; repetition and normalisation are layers.
        Where the target returns a tuple or an output object, its logits are taken, see `Logits`.

    Raises:
        UsageError: the target cannot be imported, refuses its arguments, or does not return such a model.
    """
    settings, target = part.settings, part.target
    init = settings.pop("init", None)
    init = "default" if init is None else init
    normalize = settings.pop("normalize", None)
    if not isinstance(init, str) or init not in INITIALISATIONS:
        raise UsageError(f"model.init={init} is unknown; choose one of {', '.join(INITIALISATIONS)}")
    factory = locate(target, part.key)
    arguments = _arguments(factory, target, settings, image_shape, classes)

    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: torch.manual_seed would also seed the accelerator's, which is not restored.
        torch.default_generator.manual_seed(seed)
        try:
            network = factory(**arguments)
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            raise UsageError(f"model._target_={target} could not be built: {_brief(error)}") from error
        if not isinstance(network, nn.Module):
            raise UsageError(f"model._target_={target} gave a {type(network).__name__}; it must give a torch.nn.Module")
        initialise(network, init)
        frozen_as_buffers(network)
        model = _adapt(network, image_shape, normalize)
        _check(model, target, image_shape, classes)
    return model.train()


def _arguments(
    factory: Callable[..., Any],
    target: str,
    config: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    classes: int,
) -> dict[str, Any]:
    """What to call the factory with: the config's keys, and the data's shape and classes if it takes them."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return dict(config)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    arguments: dict[str, Any] = {}
    if "image_shape" in names:
        arguments["image_shape"] = tuple(image_shape)
    if "classes" in names:
        arguments["classes"] = classes
    elif "num_classes" in names or takes_any:  # torchvision hands **kwargs on to a constructor with num_classes
        arguments["num_classes"] = classes
    unknown = [key for key in config if key not in names]
    if unknown and not takes_any:
        raise UsageError(
            f"model.{unknown[0]}={config[unknown[0]]} is no argument of {target}; it takes {', '.join(names) or 'none'}"
        )
    return arguments | dict(config)


def _adapt(network: nn.Module, image_shape: tuple[int, int, int], normalize: Any) -> nn.Module:
    """`network` between the layers that its input and its output need; itself if it needs none."""
    layers: list[tuple[str, nn.Module]] = []
    channels = image_shape[0]
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if channels == 1 and first is not None and first.in_channels == 3:
        layers.append(("repeat", RepeatChannels(3)))
        channels = 3
    if normalize is not None:
        if not isinstance(normalize, dict) or set(normalize) != {"mean", "std"}:
            raise UsageError(f"model.normalize={normalize} cannot be used; give {{mean: [..], std: [..]}} or null")
        mean, std = ([v] if isinstance(v, int | float) else v for v in (normalize["mean"], normalize["std"]))
        if len(mean) not in (1, channels):
            raise UsageError(
                f"model.normalize mean={mean} has {len(mean)} channels and the images {channels}; give 1 or {channels}"
            )
        layers.append(("normalize", Normalize(mean, std)))
    after = [("logits", Logits())] if _returns_more(network, layers, image_shape) else []
    if not layers and not after:
        return network
    return nn.Sequential(OrderedDict([*layers, ("model", network), *after]))


def _returns_more(network: nn.Module, before: list[tuple[str, nn.Module]], image_shape: tuple[int, int, int]) -> bool:
    """Whether a network returns anything but a tensor in train or eval mode; what fails here, `_check` explains."""
    whole = copy.deepcopy(nn.Sequential(OrderedDict([*before, ("model", network)])))
    try:
        with torch.no_grad():
            found = [whole.train(training)(torch.zeros(2, *image_shape)) for training in (True, False)]
    except Exception:
        return False
    return not all(isinstance(output, torch.Tensor) for output in found)


def _check(model: nn.Module, target: str, image_shape: tuple[int, int, int], classes: int) -> None:
    """One forward pass in each mode on a copy, since BatchNorm's statistics move in train mode."""
    images = torch.zeros(2, *image_shape)
    trial = copy.deepcopy(model)
    for training in (True, False):
        try:
            with torch.no_grad():
                logits = trial.train(training)(images)
        except Exception as error:
            raise UsageError(
                f"model._target_={target} fails on images of {'×'.join(map(str, image_shape))}: {_brief(error)}; "
                "choose another data.image_size or model"
            ) from error
        if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
            got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise UsageError(
                f"model._target_={target} gives {got} for a batch of 2; it must give logits [2, {classes}]"
            )


def _brief(error: BaseException) -> str:
    """An error on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
