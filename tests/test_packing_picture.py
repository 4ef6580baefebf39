"""draw_packs: a picture of any plan, and an error for a plan without packs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from packed_attn.packing import draw_packs, pack_lengths

pytest.importorskip("matplotlib", reason="pictures need matplotlib")


@pytest.mark.parametrize("lengths", [[5], [3, 4, 9, 20], np.arange(1, 300).tolist()])
def test_draws_any_plan(lengths, tmp_path: Path):
    from matplotlib.image import imread

    draw_packs(pack_lengths(lengths, 16), tmp_path / "packs.png", max_length=4)
    pixels = imread(tmp_path / "packs.png")[..., :3]
    assert pixels.shape[0] > 800
    colours = np.unique((pixels.reshape(-1, 3) * 255).astype(int), axis=0)
    assert [217, 217, 217] in colours.tolist()  # waste is grey
    assert len(colours) > 20


def test_a_plan_without_packs_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="packs must hold at least one pack"):
        draw_packs(pack_lengths([], 16), tmp_path / "packs.png")
    assert not list(tmp_path.iterdir())
