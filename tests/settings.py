"""Settings that a model type has beside its tiny default: one field of its config at a time, or two
(`settings_pairs.py`).

`benchmarks/sweep_settings.py` holds every type to them. Fields are those that the code of the
model's own modules reads; values are the literals that it compares with, every known type of layer
and of RoPE, both truths, and small numbers beside the default.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from packed_attn_patches.tiny import tiny_config, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from packed_attn import patch_model
from tests.exactness import documents
from tests.exactness import packed as packed_batch
from tests.sweep import (
    HEADS,
    LENGTHS,
    Outcome,
    said,
    sweep_model,
)
from tests.sweep_precision import LOGITS

# What a setting may be found to be. "unchanged": stock's outputs, loss and parameters are those of
# the default to the bit, and the patched model's logits are too.
STATUSES = ("exact", "rounding", "unchanged", "refused", "not built", "wrong")

AS_DEFAULT = "as by default"  # the reason of a setting that is refused in the same words

# What is varied, from the likeliest to matter.
KINDS = (
    *("flag", "choice", "layers", "unset", "none", "count", "rope", "token", "size", "number"),
    "pair",
)
# Counts that say which tokens or heads see which, and layers of which kind; others are sizes.
_STRUCTURE = (
    "window|chunk|pattern|interval|period|offset|every|freq|step|kernel|conv|block|local|global|group"
    "|kv|key_value|top_?k|shared|dense|nextn|mtp|stride|radius|bucket|first_|rank|index|position"
    "|n_ctx|max_seq|context_length|ngram"
)
_TOKEN = "token_id|token_index|pad_index|_id$"  # names of ids of tokens

# Fields that are left as they are, and why.
LEFT_OUT = {
    r"drop|jitter|noise_(?!alpha)": "randomness, which differs between a pack and a document alone",
    r"(?<!ex)act$|act_fn|activation|nonlinearity": "elementwise",
    r"(^|_)eps(ilon)?$|init|theta": "another number of the same computation",
    r"vocab|hidden_size|d_model|n_embd|intermediate|ffn|d_ff|n_inner|ffn_hidden|embed_dim|emb_dim"
    r"|embedding_size|(^|(?<!head)(?<!kernel)_)dim$|(?<!conv1d_)width": "a width",
    r"return_dict|output_attentions|output_hidden_states": "what is returned, not what it is",
    r"output_router_logits|aux_loss|router_z": "a loss that is a statistic of the batch",
    r"problem_type|num_labels|id2label|label2id": "what labels mean",
    r"dtype|quantization_config|model_type|architectures|version|_name|gradient_check|torchscript"
    r"|is_encoder_decoder|_attn_implementation|experts_implementation|mamba_kernels|use_mambapy": (
        "not of the model's mathematics"
    ),
}
_OTHER_PARTS = ("vision", "audio", "image", "video", "vq", "talker", "speech", "perceiver", "depth")

# Code that every model shares and that reads the config too.
_SHARED = ("transformers.masking_utils", "transformers.modeling_rope_utils")
ATTENTION = "attn_implementation"
# Lists that a class derives from other fields where they are left out.
_DERIVED = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")


@dataclass(frozen=True)
class Setting:
    """One field of a config, `part.field` of a nested one, and its value.

    Attributes:
        value: of a "pair", the two settings that it is of.
        derive: lists of layers are left to the config class, which may make them of the field.
        shown: the value in words, where it is long.
    """

    kind: str
    field: str
    value: Any
    derive: bool = False
    shown: str = ""

    @staticmethod
    def pair(one: Setting, other: Setting) -> Setting:
        """Two settings of different fields at once."""
        field, words = f"{one.field} + {other.field}", f"{one.words} + {other.words}"
        return Setting("pair", field, (one, other), shown=words)

    @property
    def words(self) -> str:
        """The value as it is shown."""
        return (self.shown or repr(self.value)) + (" (layers derived)" if self.derive else "")

    @property
    def single(self) -> tuple[Setting, ...]:
        """The settings of one field each that hold at once."""
        return self.value if self.kind == "pair" else (self,)

    @property
    def attention(self) -> str | None:
        """The attention implementation, which is an argument of its own."""
        return next((s.value for s in self.single if s.field == ATTENTION), None)

    def overrides(self, model_type: str) -> dict[str, Any]:
        """The arguments of `tiny_config`."""
        config = tiny_config(model_type)
        parts: dict[str, dict[str, Any]] = {}
        for setting in self.single:
            part, _, name = setting.field.rpartition(".")
            owner = getattr(config, part) if part else config
            if name != ATTENTION:
                fields = setting._around(owner) | parts.get(part, {})
                parts[part] = fields | {name: copy.deepcopy(setting.value)}
        whole = parts.pop("", {})
        return whole | {n: _part(getattr(config, n), fields) for n, fields in parts.items()}

    def _around(self, owner: Any) -> dict[str, Any]:
        """What else changes with a field, unless another setting gives it."""
        fields: dict[str, Any] = {}
        if self.derive:
            fields |= {n: ... for n in _DERIVED if n in vars(owner)}
        if "dynamic" in self.shown and hasattr(owner, "max_position_embeddings"):
            fields["max_position_embeddings"] = 16  # the length from which it grows
        return fields


def _part(owner: Any, fields: dict[str, Any]) -> Any:
    """A nested config with other fields."""
    if isinstance(owner, PreTrainedConfig) and owner.model_type:
        return tiny_config(owner.model_type, **fields)
    if isinstance(owner, PreTrainedConfig):  # a part that is no model of its own
        given = {n: v for n, v in vars(owner).items() if not n.startswith("_")}
        return type(owner)(**{**given, **fields})
    return {**copy.deepcopy(owner), **fields}


@dataclass
class Finding:
    """What became of one setting."""

    head: str
    model_type: str
    kind: str
    field: str
    value: str
    status: str
    reason: str = ""
    route: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """What a stock model is, by which two of them are compared to the bit."""

    parameters: dict[str, Tensor]
    shown: list[Tensor]

    def is_of(self, other: Seen) -> bool:
        """Whether neither parameters nor outputs nor the loss differ."""
        if self.parameters.keys() != other.parameters.keys():
            return False
        pairs = [(self.parameters[n], other.parameters[n]) for n in self.parameters]
        return all(
            a.shape == b.shape and torch.equal(a, b)
            for a, b in [*pairs, *zip(self.shown, other.shown)]
        )


class Default:
    """The tiny model of a type as it is by default: what a setting is compared with.

    Args:
        derive: with lists of layers as its config class makes them.
    """

    def __init__(self, head: str, model_type: str, derive: bool = False) -> None:
        self.head, self.model_type = head, model_type
        names = vars(tiny_config(model_type))
        model = self.built({n: ... for n in _DERIVED if derive and n in names})
        self.seen = self.look(model)
        self.model = model
        self.refusal = ""
        try:
            patch_model(copy.deepcopy(model))
        except NotImplementedError as error:
            self.refusal = str(error)

    def built(self, overrides: Mapping[str, Any], attention: str | None = None) -> Any:
        return tiny_model(
            self.model_type,
            auto_class=getattr(transformers, HEADS[self.head].auto_class),
            attn_implementation=attention,
            **overrides,
        )

    def look(self, model: nn.Module) -> Seen:
        """The parameters of a model of this type, and what it gives."""
        return Seen(model.state_dict(), self._shown(model))

    def _shown(self, model: Any) -> list[Tensor]:
        """Logits of two documents, and the loss of one in train mode."""
        head = HEADS[self.head]
        docs = [d[None] for d in documents(lengths=LENGTHS)]
        shown = []
        with torch.no_grad():
            for doc in (docs[2], docs[3]):
                pair = {"decoder_input_ids": doc} if head.pairs else {}
                shown.append(model(input_ids=doc, **pair).logits)
            labels = head.labels(docs[2][0])
            given = labels if head.per_document else labels[None]
            pair = {"decoder_input_ids": docs[2]} if head.pairs else {}
            shown.append(model.train()(input_ids=docs[2], labels=given, **pair).loss)
        model.eval()
        return shown


def sweep_settings(head: str, model_type: str, settings: Sequence[Setting]) -> list[Finding]:
    """What becomes of each setting of one type."""
    default = Default(head, model_type)
    derived: Default | None = None
    findings: list[Finding] = []
    for setting in settings:
        before = [f.status for f in findings if f.field == setting.field]
        enough = "unchanged" in before or len(before) - before.count("not built") > 1
        if setting.kind == "unset" and not setting.derive and enough:
            continue  # its values are guesses: of those that build, two or one without effect do
        if setting.derive:
            if before[-1] not in ("unchanged", "not built"):
                continue  # it has an effect beside the layers that are given
            try:
                derived = derived or Default(head, model_type, derive=True)
            except Exception:
                continue  # its class makes lists of layers that are too long for a tiny model
        base = derived if setting.derive and derived else default
        finding = sweep_setting(base, setting)
        findings.append(finding)
        if finding.status == "refused" and "attn_implementation='eager'" in finding.reason:
            findings.append(sweep_setting(base, setting, "eager"))  # the way out that it names
    return findings


def sweep_setting(default: Default, setting: Setting, attention: str | None = None) -> Finding:
    """What becomes of one setting; one that differs in float32 is decided in float64."""
    shown = setting.words + (f" ({attention})" if attention else "")
    finding = Finding(
        default.head, default.model_type, setting.kind, setting.field, shown, "not built"
    )
    try:
        overrides = setting.overrides(default.model_type)
        attention = attention or setting.attention
        model = default.built(overrides, attention)
        unchanged = default.look(model).is_of(default.seen)
    except Exception as error:
        finding.reason = said(error)
        return finding
    if unchanged:
        finding.status, finding.reason = _unchanged(default, model)
        return finding
    outcome = sweep_model(Outcome(default.head, default.model_type), model, brief=True)
    if outcome.status == "wrong":
        model = default.built(overrides, attention)
        if not default.look(model).is_of(default.look(model)):
            finding.reason = "stock's outputs are random"
            return finding
    if outcome.status == "wrong":
        model = _in_double(default.built(overrides, attention))
        precise = sweep_model(Outcome(default.head, default.model_type), model, brief=True)
        outcome = precise if precise.status == "exact" else outcome
    finding.status, finding.reason, finding.route = outcome.status, outcome.reason, outcome.route
    if finding.reason == default.refusal != "":
        finding.reason = AS_DEFAULT
    bad = {n: v for n, v in outcome.checks.items() if v not in ("exact", "rounding")}
    if bad:
        names = {v: ", ".join(n for n in bad if bad[n] == v) for v in bad.values()}
        finding.reason = "; ".join(f"{n}: {v}" for v, n in names.items())
        if all(v.startswith("raises NotImplementedError") for v in names):
            finding.status = "refused"  # by name, where only a packed batch shows what it is
    elif "rounding" in outcome.checks.values():
        finding.status = "rounding"
    return finding


def _in_double(model: Any) -> Any:
    """The model in float64, for which fused products of experts are not made."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
    return model.double()


def _unchanged(default: Default, model: Any) -> tuple[str, str]:
    """The patched model's logits where stock's are those of the default."""
    head = HEADS[default.head]
    if head.pairs or head.per_document:
        return "unchanged", ""
    docs = [documents(lengths=LENGTHS)[i] for i in (2, 3)]
    batch = packed_batch(docs)
    try:
        patch_model(model)
    except NotImplementedError as error:
        refusal = str(error)
        return "refused", AS_DEFAULT if refusal == default.refusal else refusal
    try:
        with torch.no_grad():
            got = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    except Exception as error:
        return "wrong", f"(changes nothing) raises {said(error)}"
    want = torch.cat(default.seen.shown[:2], 1)
    error = float((got - want).abs().max() / want.abs().max())
    return ("unchanged", "") if error <= LOGITS else ("wrong", f"logits differ by {error:.1e}")


def settings_of(head: str, model_type: str) -> tuple[list[Setting], dict[str, str]]:
    """The settings of a type, in the order of `KINDS`, and the fields left out with the reason."""
    model = Default(head, model_type).model
    own, shared = _sources(model)
    source = own + shared
    settings: list[Setting] = []
    left_out: dict[str, str] = {}
    whole = tiny_config(model_type)
    for part, config in _parts(whole):
        for name, value, note in _fields(config, source):
            field = f"{part}.{name}" if part else name
            reason = _reason_to_leave(name)
            if reason is not None:
                left_out[field] = reason
                continue
            if name in ("rope_parameters", "rope_scaling"):
                ropes = _ropes(value, model)
                settings += [Setting("rope", field, v, shown=shown) for shown, v in ropes]
                continue
            found = list(_values(name, value, note, config, own))
            if not found:
                left_out[field] = "no other values known"
            layered = any(getattr(config, n, None) for n in _DERIVED)
            for kind, other in found:
                settings.append(Setting(kind, field, other))
                if layered and kind in ("flag", "unset", "count", "size"):
                    settings.append(Setting(kind, field, other, derive=True))
    settings += [Setting("choice", ATTENTION, x) for x in ("eager", "sdpa")]
    return sorted(settings, key=lambda s: KINDS.index(s.kind)), left_out


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    """A config and those nested in it that text goes through."""
    yield "", config
    for name, value in vars(config).items():
        if any(x in name for x in _OTHER_PARTS):
            continue
        if isinstance(value, PreTrainedConfig):
            yield name, value


def _sources(model: nn.Module) -> tuple[str, str]:
    """The code of the modules that the model and its configs are made of, and what all share."""
    parts = [
        v for m in model.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)
    ]
    names = {type(x).__module__ for x in [*model.modules(), *parts]}
    names = {n for n in names if n.startswith("transformers.models.")}
    own = "\n".join(inspect.getsource(sys.modules[n]) for n in sorted(names))
    return own, "\n".join(inspect.getsource(sys.modules[n]) for n in _SHARED)


def _fields(config: Any, source: str) -> Iterator[tuple[str, Any, str]]:
    """(name, value, annotation) of the fields that the code reads, declared or not."""
    notes: dict[str, str] = {}
    for cls in reversed(type(config).__mro__):
        notes |= {n: str(a) for n, a in vars(cls).get("__annotations__", {}).items()}
    aliases: dict[str, list[str]] = {}
    for alias, name in type(config).attribute_map.items():
        aliases.setdefault(name, []).append(alias)
    for name, value in vars(config).items():
        if name.startswith("_") or isinstance(value, PreTrainedConfig):
            continue
        names = "|".join([name, *aliases.get(name, [])])
        if re.search(rf"\b(?:config|cfg|self)\.(?:{names})\b|[\"'](?:{names})[\"']", source):
            yield name, value, notes.get(name, "")
    literal = r"[\"'](\w+)[\"'],\s*([\w.\"'-]+)\s*\)"
    if not config.model_type:
        return  # a part of another config, which the code that is shared asks for nothing
    asked = re.findall(
        rf"(?:getattr\(\s*(?:self\.)?config,|kwargs\.(?:pop|get)\()\s*{literal}", source
    )
    for name, default in dict(asked).items():
        if name in vars(config) or name.startswith("_"):
            continue
        try:
            yield name, ast.literal_eval(default), ""
        except (ValueError, SyntaxError):
            continue


def _reason_to_leave(name: str) -> str | None:
    return next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, name)), None)


def _values(
    name: str, value: Any, note: str, config: Any, source: str
) -> Iterator[tuple[str, Any]]:
    """(kind, value) of what else a field may be."""
    if value is not None and "None" in note and not re.search(_TOKEN, name):
        yield "none", None
    if isinstance(value, bool):
        yield "flag", not value
    elif isinstance(value, str) or (value is None and "str" in note):
        known = [v for v in _literals(name, note, source) if v != value]
        yield from (("choice", v) for v in known)
        if value is None and (not known or "bool" in note):
            yield from (("unset", v) for v in (True, False))
    elif isinstance(value, list | tuple):
        yield from (("layers", v) for v in _lists(list(value), source))
    elif isinstance(value, int):
        yield from _counts(name, value)
    elif isinstance(value, float):
        yield "number", 4.0 if value > 64 else 0.7 if value == 1 else 2 * value or 0.5
    elif isinstance(value, dict):
        for key, number in value.items():
            if isinstance(number, int | float):
                yield from (("count", {**value, key: n}) for n in (1, 8) if n != number)
    elif value is None:
        layers = len(getattr(config, "layer_types", None) or "xx")
        yield from (("unset", v) for v in _set(name, note, layers))


def _set(name: str, note: str, layers: int) -> list[Any]:
    """Values for a field that is not set."""
    if "bool" in note or (not note and re.search("^(use|is|has|do|add)_|causal", name)):
        return [True, False]
    named = not note and re.search("cap|clip|limit|scal|multipl", name)
    if named or ("float" in note and "int" not in note):
        return [5.0, 0.7]
    if "list" in note or name.endswith("layers_types"):
        return [[0] * layers, [1] * layers, [0], [layers - 1]]
    if "int" in note or re.search("window|chunk|rank|size|num|n_|dim|group|layers|block", name):
        return [8, 2, 1, 16, 24]
    return []


def _literals(name: str, note: str, source: str) -> list[str]:
    """Strings that the code compares a field with, and those that its annotation names."""
    found: list[str] = []
    if "Literal" in note:
        found += re.findall(r"[\"']([\w.-]+)[\"']", note)
    found += re.findall(rf"\b{name}\s*[!=]=\s*[\"']([\w.-]+)[\"']", source)
    for listed in re.findall(rf"\b{name}\s+(?:not\s+)?in\s*[\[({{]([^\])}}]*)", source):
        found += re.findall(r"[\"']([\w.-]+)[\"']", listed)
    # Classes and functions by name: NAMES[config.field].
    for table in re.findall(rf"\b([A-Z_0-9]+)\[(?:self\.)?(?:config\.)?{name}\]", source):
        body = re.search(rf"^{table}\s*=\s*{{(.*?)^}}", source, re.S | re.M)
        found += re.findall(r"^\s+[\"']([\w.-]+)[\"']:", body.group(1), re.M) if body else []
    return list(dict.fromkeys(found))


def _lists(value: list[Any], source: str) -> list[list[Any]]:
    """All of one known kind, mixes of two, and for numbers and truths others and fewer."""
    n = len(value)
    found: list[list[Any]] = []
    if value and all(isinstance(v, str) for v in value):
        known = [*dict.fromkeys(value)]
        known += [k for k in ALLOWED_LAYER_TYPES if re.search(rf"[\"']{k}[\"']", source)]
        kinds = list(dict.fromkeys(known))
        found += [[k] * n for k in kinds]
        found += [[a, b] * (n // 2) + [a] * (n % 2) for a in kinds for b in kinds if a != b]
    elif all(isinstance(v, bool) for v in value):
        found += [[False] * n, [True] * n, [not v for v in value]]
    elif all(isinstance(v, int) for v in value):
        found += [[0] * n, [1] * n, value[::-1], [], [0], [1], list(range(n)), [2] * n, [5] * n]
    elif all(isinstance(v, float) for v in value):
        found += [value[::-1], [2 * v for v in value]]
    unique: list[list[Any]] = []
    for other in found:
        if other != value and other not in unique:
            unique.append(other)
    return unique


def _counts(name: str, value: int) -> Iterator[tuple[str, Any]]:
    """Small numbers beside the default; for ids of tokens, one that documents have."""
    if re.search(_TOKEN, name):
        yield "token", int(documents(lengths=LENGTHS)[2][10])
        if "pad" in name:
            yield from (("token", v) for v in (-1, None))
    elif re.search("position|n_ctx|max_seq|context_length", name):
        yield "count", 20
    else:
        kind = "count" if re.search(_STRUCTURE, name) else "size"
        others = {0, 1, value // 2, value + 1} | ({2 * value} if value <= 4 else set())
        if value > 64:  # from where documents are longer
            others = {1, 4, 16}
        for other in sorted(others - {value}):
            yield kind, other


def _ropes(value: Any, model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, value) of every type of RoPE, with lengths that documents pass."""
    sizes = [b.numel() for n, b in model.named_buffers() if n.endswith("inv_freq")]
    half = sizes[0] if sizes else 4
    base = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    more: dict[str, dict[str, Any]] = {
        "longrope": {
            "short_factor": [1.0 + i / 8 for i in range(half)],
            "long_factor": [3.0 + i / 4 for i in range(half)],
        },
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }
    kinds: dict[str, dict[str, Any]] = {
        kind: {"rope_type": kind, **base, **more.get(kind, {})} for kind in ROPE_INIT_FUNCTIONS
    }
    kinds["half of a head"] = {"partial_rotary_factor": 0.5}
    parts = list((value or {}).values()) if isinstance(value, dict) else []
    if not parts or not all(isinstance(v, dict) for v in parts):
        yield from ((kind, {**(value or {}), **own}) for kind, own in kinds.items())
        return
    first = next(iter(value))
    for kind, own in kinds.items():
        yield kind, {name: {**v, **own} for name, v in value.items()}
        yield f"{kind} of {first}", {**value, first: {**value[first], **own}}
