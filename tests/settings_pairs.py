"""Which two settings of a model type to hold it to at once: a leak may need both.

Of all pairs, those come first whose fields say which tokens see which, then those about positions
and heads. A pair counts where its stock model is that of neither setting alone, nor the default:
one of them may have no effect without the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

from packed_attn import patch_model
from tests.settings import ATTENTION, Default, Seen, Setting

PAIRED = ("flag", "choice", "layers", "unset", "count", "rope")
MOST = 16  # pairs of one type,
TRIED = 5 * MOST  # of as many: one setting may hide the other, or the two build no model
VALUES = 3  # of one field

# Fields by how likely two of them interact; all others come last.
LIKELY = (
    r"window|sliding|chunk|(?<!mlp_)layer_types|layers_block|bidirection|causal|is_decoder"
    r"|attention_type|attn_type|pattern|local|global|sink|index(?!_head_dim|_n_heads)|sparse"
    r"|kv_shared|shared_layer|nope|no_rope|interval|period|_freq"
    r"|every|stride|swa|prefix",
    rf"{ATTENTION}|rope|rotary|position|alibi|relative|conv|kernel|kv|key_value|top_?k|softcap|block|group|mtp"
    r"|nextn|memory|offset|lora|layers",
)


@dataclass(frozen=True)
class _Alone:
    """One setting and its stock model.

    Attributes:
        changes: the stock model is not that of the default.
    """

    setting: Setting
    seen: Seen
    changes: bool

    @property
    def rank(self) -> int:
        """From 0, the later the less likely it matters to another one."""
        named = (i for i, pattern in enumerate(LIKELY) if re.search(pattern, self.setting.field))
        return next(named, len(LIKELY)) + (not self.changes)


def pairs_of(head: str, model_type: str, settings: Sequence[Setting]) -> list[Setting]:
    """Pairs of a type's settings, the likeliest to matter first."""
    default = Default(head, model_type)
    if default.refusal:
        return []
    pairs: list[Setting] = []
    for one, other in _in_order(_alone(default, settings))[:TRIED]:
        pair = Setting.pair(one.setting, other.setting)
        seen = _seen(default, pair)
        if seen and not any(seen.is_of(s) for s in (default.seen, one.seen, other.seen)):
            pairs.append(pair)
        if len(pairs) == MOST:
            break
    return pairs


def _alone(default: Default, settings: Sequence[Setting]) -> dict[str, list[_Alone]]:
    """By field, the settings that stock runs and that are not refused."""
    alone: dict[str, list[_Alone]] = {}
    for setting in sorted(settings, key=_order_of_values):
        values = alone.setdefault(setting.field, [])
        effective = [v.changes for v in values]
        guessed = setting.kind == "unset" and False in effective  # one without effect is enough
        derived = setting.derive and True in effective  # it has an effect beside given layers
        if setting.kind not in PAIRED or len(values) == VALUES or guessed or derived:
            continue
        seen = _seen(default, setting)
        if seen is None:
            continue
        changes = not seen.is_of(default.seen)
        known = changes and any(seen.is_of(a.seen) for v in alone.values() for a in v)
        if not known:  # under another name, or by another value
            values.append(_Alone(setting, seen, changes))
    return alone


def _order_of_values(setting: Setting) -> tuple[bool, bool, float]:
    """Frequencies by length before others, the larger number first, layers as given last."""
    by_length = re.search("dynamic|longrope", setting.shown) is not None
    is_count = setting.kind == "count" and isinstance(setting.value, int)
    return setting.derive, not by_length, -setting.value if is_count else 0.0


def _in_order(alone: dict[str, list[_Alone]]) -> list[tuple[_Alone, _Alone]]:
    """Each field's first value beside the first of each other, then the next ones."""
    ranked = [
        (a.rank + b.rank + i + j, (a, b))
        for values, others in combinations(alone.values(), 2)
        for (i, a), (j, b) in product(enumerate(values), enumerate(others))
    ]
    return [pair for _, pair in sorted(ranked, key=lambda r: r[0])]


def _seen(default: Default, setting: Setting) -> Seen | None:
    """The stock model, where there is one and its patch is not refused."""
    try:
        model = default.built(setting.overrides(default.model_type), setting.attention)
        seen = default.look(model)
        patch_model(model)
    except Exception:
        return None
    return seen
