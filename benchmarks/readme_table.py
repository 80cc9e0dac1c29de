"""Fill the README: run its example for the output, and make its tables from the JSON that `make bench` wrote."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ENCODER = ("eager", "torch.compile", "sparsec", "torch.compile(sparsec)")


def example(readme: str) -> str:
    """The first Python block."""
    found = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    if found is None:
        raise SystemExit("the README has no Python block")
    return found[1]


def output_of(code: str) -> str:
    """What the example prints here and now."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return f"```text\n{done.stdout.rstrip()}\n```"


def described(data: dict[str, Any]) -> str:
    m = data["machine"]
    return f"{m['processor']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}"


def encoder_table(data: dict[str, Any]) -> str:
    """Milliseconds of the whole encoder, with the gain over dense eager in brackets."""
    names = [n for n in ENCODER if n in data["rows"][0]["ms"]]
    lines = [
        f"MiniLM-L6 end to end, fp32, milliseconds and gain over dense eager PyTorch ({described(data)}):",
        "",
        "| batch x tokens | zeros | " + " | ".join(f"`{n}`" if "." in n else n for n in names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row in data["rows"]:
        cells = (f"{row['ms'][n]:.1f}" + (f" ({row['ratio'][n]:.2f}x)" if n != "eager" else "") for n in names)
        lines.append(f"| {row['batch']} x {row['length']} | {row['zeros']:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def linear_table(data: dict[str, Any]) -> str:
    """Gain over the best dense way per layer, batch across."""
    rows = data["rows"]
    batches = sorted({r["batch"] for r in rows})
    keys = list(dict.fromkeys((r["out"], r["in"], r["dtype"], r["zeros"]) for r in rows))
    gain = {(r["out"], r["in"], r["dtype"], r["zeros"], r["batch"]): f"{r['ratio']:.2f}x" for r in rows}
    lines = [
        f"One linear layer, gain over the best of eager, oneDNN and MKL with prepacked weights ({described(data)}):",
        "",
        "| out x in | dtype | zeros | " + " | ".join(f"batch {b}" for b in batches) + " |",
        "|---|---|---|" + "---|" * len(batches),
    ]
    for key in keys:
        cells = " | ".join(gain.get((*key, b), "") for b in batches)
        lines.append(f"| {key[0]} x {key[1]} | {key[2]} | {key[3]:.0%} | {cells} |")
    return "\n".join(lines)


def fill(readme: str, mark: str, text: str) -> str:
    """Replace what stands between the marks."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    if begin not in readme or end not in readme:
        raise SystemExit(f"the README lacks the marks {begin} and {end}")
    head, rest = readme.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="out", help="folder with encoder.json and linear.json")
    parser.add_argument("--readme", default=str(ROOT / "README.md"))
    options = parser.parse_args()
    path, results = Path(options.readme), Path(options.results)
    readme = path.read_text(encoding="utf-8")
    readme = fill(readme, "output", output_of(example(readme)))
    tables = []
    for name, table in (("encoder", encoder_table), ("linear", linear_table)):
        if (results / f"{name}.json").exists():
            tables.append(table(json.loads((results / f"{name}.json").read_text(encoding="utf-8"))))
    if tables:
        readme = fill(readme, "speeds", "\n\n".join(tables))
    path.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
