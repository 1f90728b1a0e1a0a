"""What the terminal shows, wide or narrow: numbers stay whole."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from trajdist.argument_types import CONFIG_HELP
from trajdist.cli import _complain, main
from trajdist.config_files import _config_folders
from trajdist.errors import ArtifactError
from trajdist.planning.plan import _ROWS, advice
from trajdist.runtime.progress import Progress, make_console
from trajdist.scoring.evaluation import metrics_table
from trajdist.tables import counted
from trajdist.tools.inspection import inspect

KEYS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro")


def measured(kinds: list[str]) -> dict:
    values = {key: 0.1 + number / 1000 for number, key in enumerate(KEYS)}
    defects = {kind: values | {"num_images": 12, "num_detected": 11} for kind in kinds}
    counts = {"num_images": 36 + 12 * len(kinds), "num_good": 36, "false_alarm_rate": 3 / 36, "num_unreadable": 2}
    return values | counts | {"defects": defects}


def printed(table: object, width: int) -> str:
    console = Console(width=width, force_terminal=True, color_system=None, markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


CODES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e"


def test_what_others_wrote_does_nothing_to_a_terminal(tmp_path, capfd):
    """A run, an adapter or an error's text may hold anything; what is shown can only be read."""
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "status.json").write_text(json.dumps({"status": CODES, "why": f"{CODES} of [bold]", CODES: 1}))
    assert main(["inspect", str(tmp_path)]) == 0
    console = make_console(True)
    table = Table(title=CODES)
    table.add_column(CODES)
    table.add_row(CODES)
    for shown in (f"a name {CODES}\nand a line", table):
        console.print(shown)
    _complain(CODES)
    written = "".join(capfd.readouterr())
    assert not set(CODES) & set(written) - set(ascii(CODES))
    assert written.count(r"\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e") == 8
    assert "\nand a line" in written


@pytest.mark.parametrize("width", [60, 80, 200])
def test_metrics_are_whole_in_narrow_terminals(width):
    shown = printed(metrics_table(measured(["scratch", "foreign", "a long name of a defect"])), width)
    assert "…" not in shown
    assert all(len(line) <= width for line in shown.splitlines())
    assert shown.count("11 of 12") == 3
    assert all(shown.count(f"{0.1 + number / 1000:.3f}") == 4 for number in range(len(KEYS)))
    assert "33 of 36 defects found, 3 false alarms in 36 good images, 2 unreadable" in " ".join(shown.split())


def test_one_false_alarm():
    metrics = measured(["scratch"]) | {"false_alarm_rate": 1 / 36, "num_unreadable": 0}
    assert "11 of 12 defects found, 1 false alarm in 36 good images" in printed(metrics_table(metrics), 200)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_progress_says_what_is_left_in_narrow_terminals(width):
    console = Console(width=width, force_terminal=True, color_system=None)
    record = {"images": 402000, "images_per_s": 1250.4, "loss": 0.3, "memory_bytes": 2**33, "epoch": 1, "step": 3}
    with console.capture() as capture, Progress(console, "phase 2", 1281167) as progress:
        progress.show(record)
    shown = capture.get()
    assert "402000/1281167" in shown
    assert re.search(r"-:--:--|\d:\d\d:\d\d", shown)
    assert all(words in shown for words in ("loss 0.3000", "1250.4", "8.00 GiB"))
    assert "…" not in shown


def test_names_of_tensors_are_whole_in_narrow_terminals(tmp_path):
    name = "base_model.model.decoder.0.lora_A.weight"
    save_file({name: torch.zeros(2, 3)}, tmp_path / "a.safetensors")
    shown = "".join(printed(table, 45) for table in inspect(tmp_path / "a.safetensors"))
    assert "…" not in shown
    assert all(part in shown for part in ("base_model.model", ".lora_A.weight"))


def test_a_file_that_is_cut_off_is_not_described_as_sound(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", (tmp_path / "a.safetensors").stat().st_size - 4)
    with pytest.raises(ArtifactError, match="is not a valid safetensors file"):
        list(inspect(tmp_path / "a.safetensors"))


def test_a_plan_names_the_precision():
    plan = {"num_processes": 1, "device": "cpu", "precision": "no", "num_workers": 1, "bottleneck": "given"}
    shown = {name: cell(plan) for name, cell in _ROWS.items() if name in ("processes", "precision", "bottleneck")}
    assert shown == {"processes": "1 on cpu, 1 worker each", "precision": "float32", "bottleneck": ""}
    assert advice("decode", 1, "cpu").startswith("decoding by 1 worker per process is slowest")


def test_one_is_not_a_plural():
    assert [counted(1, "shard"), counted(0, "shard"), counted(2000, "process", "processes")] == [
        "1 shard",
        "0 shards",
        "2,000 processes",
    ]


def test_the_help_names_the_shipped_configs():
    shipped = {file.stem for folder in _config_folders() for file in folder.glob("*.yaml")}
    assert shipped == set(re.findall(r"\w+", CONFIG_HELP.split(":")[1])) - {"or"}
