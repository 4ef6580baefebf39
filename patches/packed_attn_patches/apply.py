"""Putting packed-attn on one model instance, and taking it off again.

Two routes, chosen by `families.route`: the attention interface, where attention layers take the
layout, and unpacking, where the whole model runs on documents batched by length. Models whose token
mixers may take the layout too (`fast_mixers.py`) are made ready for both.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel

from packed_attn_patches.families import (
    Route,
    UnknownModelType,
    backbone_route,
    first_position,
    head_of,
    is_encoder_decoder,
    reason_against_forests,
    route,
    runs_on_pairs,
)
from packed_attn_patches.fast_mixers import MixerForward, mixers_of
from packed_attn_patches.foreign import CodeWatch, foreign_parts, is_foreign
from packed_attn_patches.forwards import EntranceForward, forward_of
from packed_attn_patches.inputs import LayoutHook, replacement_of
from packed_attn_patches.interface import NAMES, is_ours, stock_of
from packed_attn_patches.llama4 import ScalingForward, scaling_layers
from packed_attn_patches.noise import put_back_noise
from packed_attn_patches.padding_free import CheckAdapters, PackRows, PadRows
from packed_attn_patches.pairs import PairedForward, PairHook
from packed_attn_patches.rope import RopeForward, Watch, reason_against_ropes, ropes_of
from packed_attn_patches.unpack import UnpackedForward
from packed_attn_patches.wrappers import (
    NO_DATA_PARALLEL,
    forget_compiled,
    put_forward,
    take_forward,
    unwrapped,
)

TESTED = (Version("5.17"), Version("5.25"))  # the second is the first version not tested
_RECORD = "_packed_attn_record"


@dataclass(frozen=True)
class Settings:
    """What a model is patched with; see `packed_attn.patch_model`."""

    backend: str = "auto"
    padding_free: bool = False
    share_prefixes: bool = False


@dataclass(frozen=True)
class PatchRecord:
    """What `unpatch` needs, held by the model itself so that it is copied and pickled with it.

    Attributes:
        settings: as given to `patch`.
        route: how the model was made exact.
        configs: every config that was replaced, and the copy that replaced it.
        foreign: what was in the model beside the code of its type (see `foreign.py`).
    """

    settings: Settings
    route: Route
    configs: tuple[tuple[PreTrainedConfig, PreTrainedConfig], ...]
    foreign: tuple[str, ...] = ()


def patch(
    model: nn.Module, settings: Settings = Settings(), on_unknown: str = "raise"
) -> nn.Module:
    """Makes `model` respect document boundaries; see `packed_attn.patch_model`."""
    _patch(unwrapped(model), settings, on_unknown)
    forget_compiled(model)
    return model


def _patch(model: nn.Module, settings: Settings, on_unknown: str) -> nn.Module:
    """Patches a model that nothing wraps."""
    record = model.__dict__.get(_RECORD)
    if record is not None and record.settings == settings and _is_whole(model, record):
        return model
    if record is not None:
        unpatch(model)
    try:
        chosen = route(model, on_unknown)
    except UnknownModelType as refusal:
        raise UnknownModelType(f"{refusal}. {_probed(model)}") from None
    if is_foreign(model) and chosen is not Route.UNPACK:
        chosen = _foreign(model, on_unknown)
    assert isinstance(model, PreTrainedModel)
    _warn_untested()
    _put_on(model, chosen, settings)
    if model.__dict__[_RECORD].foreign:
        _prove(model, settings, on_unknown)
    return model


def _is_whole(model: nn.Module, record: PatchRecord) -> bool:
    """Whether nothing was put over a forward of the patch or in place of its attention, and no code
    came into it since."""
    if foreign_parts(model) != record.foreign:
        return False
    implementations = [config._attn_implementation for config in _configs(model)]
    attention = not record.configs or all(i is None or is_ours(i) for i in implementations)
    return attention and not any(
        isinstance(hook, LayoutHook) and hook.unpacked and replacement_of(module) is not None
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )


def _prove(model: PreTrainedModel, settings: Settings, on_unknown: str) -> None:
    """A patched model with code in it that is not its type's is shown not to mix documents, on the
    way of its type or, where that is allowed, on documents batched by equal length; or refused."""
    record: PatchRecord = model.__dict__[_RECORD]
    try:
        reason = _mixing(model)
        if reason is not None and on_unknown == "unpack" and record.route is not Route.UNPACK:
            unpatch(model)
            _put_on(model, Route.UNPACK, settings)
            reason = _mixing(model)
    except BaseException:
        unpatch(model)
        raise
    if reason is None:
        return
    unpatch(model)
    what, *others = record.foreign
    more = f" and {len(others)} more" if others else ""
    way_out = (
        ""
        if on_unknown == "unpack"
        else (
            ". on_unknown='unpack' runs it on documents batched by equal length, exact and slower, "
            "where nothing mixes the rows of a batch"
        )
    )
    raise NotImplementedError(
        f"patch_model refuses {type(model).__name__}: its type is known, but not what is in it "
        f"({what}{more}), and {reason}{way_out}"
    )


def _mixing(model: PreTrainedModel) -> str | None:
    """Why audits of one row and two, in evaluation and train mode, do not show a patched model to
    be exact; None where they do."""
    from packed_attn.audit.proof import cell
    from packed_attn.audit.subject import LENGTHS, Subject

    try:
        subject = Subject(model, LENGTHS, seed=0)
    except ValueError as error:
        return f"no audit of it can run: {error}"
    for convention in ("packed batch", "two rows", "train mode"):
        report = cell(subject, convention, stop_at_leak=True)
        if report.outcome == "error":  # such as of a forward that makes no logits, a loss alone
            warnings.warn(
                f"{type(model).__name__} has code in it that is not its type's, and no audit could "
                f"run ({convention}: {report.reason}), so nothing shows that documents stay apart",
                RuntimeWarning,
                stacklevel=5,
            )
        elif report.outcome is not None:
            return f"its audit ({convention}) does not run: {report.reason}"
        if report.leaks:
            leak = report.first_leaking_module
            where = "" if leak is None else f", first in {leak}"
            failed = next(check for check in report.checks if check.verdict == "fails")
            return f"its audit ({convention}) fails{where}: {failed.name}, {failed.figure:.1e}"
    return None


def _put_on(model: PreTrainedModel, chosen: Route, settings: Settings) -> None:
    """All of the patch or, where an exception stops it, nothing."""
    if settings.padding_free and is_encoder_decoder(model):
        raise NotImplementedError(
            f"padding_free: {type(model).__name__} has padded rows on two sides; without it packs "
            "of source and target documents work"
        )
    # A head may need unpacking for its own sake, while padded rows meet the backbone alone.
    inner = backbone_route(model, chosen) if settings.padding_free else chosen
    reason = reason_against_ropes(model)
    if reason is not None:
        raise NotImplementedError(f"patch_model refuses {type(model).__name__}, which {reason}")
    reason = reason_against_forests(_entrances(model)[-1], inner)
    if settings.share_prefixes and reason is not None:
        raise NotImplementedError(
            f"share_prefixes: {type(model).__name__} {reason}; without it plain packs work"
        )
    mixers = _mixers(model) if inner is Route.UNPACK_CAUSAL else ()
    layers_take_it = inner is Route.INTERFACE or bool(mixers)
    configs = _with_copies(model) if layers_take_it else ()
    record = PatchRecord(settings, chosen, configs, foreign_parts(model))
    model.__dict__[_RECORD] = record
    try:
        entrances = _entrances(model)
        watch = Watch.of(model)
        if layers_take_it:
            _exchange(model, record.configs)
            _put_on_layers(model, mixers, watch)
        if settings.padding_free:
            backbone = entrances[-1]
            model.register_forward_pre_hook(CheckAdapters(), with_kwargs=True)
            rows = PackRows(settings.share_prefixes)
            backbone.register_forward_pre_hook(rows, with_kwargs=True)
            backbone.register_forward_hook(PadRows(), with_kwargs=True)
        for module in entrances:
            code = CodeWatch.of(module)
            if runs_on_pairs(module):
                put_forward(module, PairedForward(module, chosen, head_of(module)))
                pairs = PairHook(settings.backend, code=code)
                module.register_forward_pre_hook(pairs, with_kwargs=True)
                continue
            taken = chosen if module is model else inner
            hook = LayoutHook(
                settings.backend,
                unpacked=taken is not Route.INTERFACE,
                mixers=taken is Route.UNPACK_CAUSAL and bool(mixers),
                shifts=head_of(module).shifts,
                first_position=first_position(model),
                outer=module is model and len(entrances) > 1,
                rope=watch,
                code=code,
            )
            own = EntranceForward(module)
            if hook.unpacked:
                own = UnpackedForward(module, taken, head_of(module), hook)
            put_forward(module, own)
            module.register_forward_pre_hook(hook, with_kwargs=True)
    except BaseException:
        unpatch(model)
        raise


def _put_on_layers(
    model: PreTrainedModel, mixers: tuple[nn.Module, ...], watch: Watch | None
) -> None:
    """Forwards of their own for the parts that have to be told the documents."""
    for mixer in mixers:
        put_forward(mixer, MixerForward(mixer))
    if watch is not None:
        for rope in ropes_of(model):
            put_forward(rope, RopeForward(rope, watch))
    for layer in scaling_layers(model):
        put_forward(layer, ScalingForward(layer))


def _mixers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The token mixers that may take the layout, where its attention may too."""
    config: Any = model.config
    return mixers_of(model) if stock_of(config._attn_implementation) in NAMES else ()


def _probed(model: nn.Module) -> str:
    """What an audit finds when the unknown model is run as if its attention took the layout."""
    from packed_attn.audit import audit
    from packed_attn.audit.subject import BLIND, LENGTHS, Subject

    assert isinstance(model, PreTrainedModel)
    try:
        if not Subject(model, LENGTHS, seed=0).looks_beyond():
            return f"An audit of it shows nothing: {BLIND}"
        _put_on(model, Route.INTERFACE, Settings())
        report = audit(model)
    except Exception as error:
        return f"Run as if its attention took the layout, it raises {type(error).__name__}: {error}"
    finally:
        if is_patched(model):
            unpatch(model)
    if report.isolated:
        return "Run as if its attention took the layout, an audit of it finds no leak"
    leak = report.first_leaking_module
    return f"Run as if its attention took the layout, documents mix first in {leak}"


def unpatch(model: nn.Module) -> nn.Module:
    """Puts the original configs back and removes the hooks.

    Raises:
        ValueError: the model is not patched.
    """
    wrapper, model = model, unwrapped(model)
    record: PatchRecord | None = model.__dict__.get(_RECORD)
    if record is None:
        raise ValueError(f"{type(model).__name__} is not patched by packed-attn")
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, LayoutHook | CheckAdapters | PackRows):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, PadRows):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
        take_forward(module)
    put_back_noise(model)
    _put_back_configs(model, record)
    del model.__dict__[_RECORD]
    forget_compiled(wrapper)
    return wrapper


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` holds on this instance or on the model that it wraps."""
    return any(_RECORD in vars(module) for module in model.modules())


def _refuse_data_parallel(wrapper: nn.Module, _: str, module: nn.Module | None) -> None:
    """Where a patched model is put into one, which a Trainer does as it begins."""
    if isinstance(wrapper, nn.DataParallel) and module is not None and is_patched(module):
        raise NotImplementedError(NO_DATA_PARALLEL)


register_module_module_registration_hook(_refuse_data_parallel)


def remains(model: nn.Module) -> str | None:
    """What is left of a patch on a model without a record; None on a whole one.

    An exception inside `patch` undoes all of it; this is for models that something else has
    copied or rebuilt in parts.
    """
    if is_patched(model):
        return None
    for path, module in model.named_modules():
        where = path or type(model).__name__
        if any(isinstance(hook, LayoutHook) for hook in module._forward_pre_hooks.values()):
            return f"{where} has the patch's hook"
        for value in (vars(module).get("forward"), vars(module).get("_old_forward")):
            if forward_of(value) is not None:
                return f"{where} has the patch's forward"
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if is_ours(implementation):
            return f"the config of {where} has the patch's attention {implementation!r}"
    return None


def _foreign(model: nn.Module, on_unknown: str) -> Route:
    """The route of a known model type whose code is not transformers' own: nothing is known."""
    if on_unknown == "unpack":
        return Route.UNPACK
    raise NotImplementedError(
        f"patch_model refuses {type(model).__name__}: its code is {type(model).__module__}, not "
        "transformers' own, so nothing is known of its attention. on_unknown='unpack' runs it on "
        "documents batched by equal length, exact and slower; audit(model) shows what leaks"
    )


def patched_module(model: nn.Module) -> nn.Module:
    """The patched model inside `model`, which may be itself or a wrapper around it.

    Raises:
        ValueError: nothing in it is patched.
    """
    inner = unwrapped(model)
    if not is_patched(inner):
        raise ValueError(f"{type(model).__name__} is not patched: call patch_model(model) first")
    return inner


def route_of(model: nn.Module) -> Route:
    """How a patched model was made exact."""
    record: PatchRecord = unwrapped(model).__dict__[_RECORD]
    return record.route


def _configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    for module in model.modules():
        yield from (v for v in vars(module).values() if isinstance(v, PreTrainedConfig))


def _with_copies(model: nn.Module) -> tuple[tuple[PreTrainedConfig, PreTrainedConfig], ...]:
    """The model's configs, each with a copy that has our attention: other models built from the
    same object keep theirs. Copies are made before anything changes, so a failure changes nothing.
    """
    memo: dict[int, Any] = {}
    configs = {id(config): config for config in _configs(model)}.values()
    pairs = tuple((config, copy.deepcopy(config, memo)) for config in configs)
    for config, copied in pairs:
        stock = stock_of(config._attn_implementation)
        if stock is not None:
            copied._attn_implementation_internal = NAMES[stock]
    return pairs


def _exchange(model: nn.Module, pairs: Iterable[tuple[Any, Any]]) -> None:
    """The second config of each pair in place of the first, wherever a module has it."""
    others = {id(one): other for one, other in pairs}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in others:
                setattr(module, name, others[id(value)])


def _put_back_configs(model: nn.Module, record: PatchRecord) -> None:
    """The original configs; where something was set since (a vocabulary resized, another attention
    chosen), the copies that hold it, with stock attention."""
    for config, copied in record.configs:
        if is_ours(copied._attn_implementation):
            copied._attn_implementation_internal = config._attn_implementation_internal
    # A config's own == leaves out what is no field of its class.
    if all(vars(copied) == vars(config) for config, copied in record.configs):
        _exchange(model, ((copied, config) for config, copied in record.configs))


def _entrances(model: PreTrainedModel) -> list[nn.Module]:
    """The model and the inner models that some callers enter past it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    encoder = model.get_encoder() if is_encoder_decoder(model) else None
    # An encoder's head may call a linear layer its decoder.
    inner = (model, model.base_model, encoder, decoder)
    models = (m for m in inner if isinstance(m, PreTrainedModel))
    unique = {id(m): m for m in models}
    return list(unique.values())


def is_tested_version() -> bool:
    """Whether the installed transformers is one that the sweep of all model types has run on."""
    return TESTED[0] <= Version(transformers.__version__) < TESTED[1]


def _warn_untested() -> None:
    if not is_tested_version():
        warnings.warn(
            f"transformers {transformers.__version__} is outside the tested range {TESTED[0]} to "
            f"{TESTED[1]} (not included): the patched model is audited, and refused if it leaks",
            RuntimeWarning,
            stacklevel=4,
        )
