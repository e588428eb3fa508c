"""A block is as good as the blocks it was made from: the keys of the blocks form a chain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accullm_cli.pipeline import convert
from accullm_cli.progress import Event
from tests.tiny import make_checkpoint, tiny_config


class InterruptedRunError(Exception):
    pass


def change_plan_of_first_block(run: Path) -> None:
    """As if another budget had given one linear of block 1 other bits, while profile is up to date."""
    plan = json.loads((run / "plan.json").read_text())
    name = next(name for name in plan["linears"] if ".layers.0." in name)
    plan["linears"][name]["bits"] = 5
    (run / "plan.json").write_text(json.dumps(plan))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["profile"]["outputs"] = {}
    del manifest["stages"]["quantize"]
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_a_block_behind_a_new_one_is_made_again_even_after_an_interruption(tmp_path: Path) -> None:
    config = tiny_config(make_checkpoint("llama", tmp_path / "model"), tmp_path / "out")
    convert(config)
    change_plan_of_first_block(tmp_path / "out.run")

    def stop_after_first_block(event: Event) -> None:
        if event.stage == "quantize" and event.label == "block 1/2":
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        convert(config, stop_after_first_block)

    blocks: list[str] = []

    def note(event: Event) -> None:
        if event.stage == "quantize" and event.kind == "step":
            blocks.append(f"{event.label}: {event.reason}")

    convert(config, note)
    assert blocks == ["block 1/2: up to date", "block 2/2: input changed (block before)"]
