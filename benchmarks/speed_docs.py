"""Records of the speed benchmark, and the pages of docs that are made of the newest."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import speed_report
from evidence_report import table
from speed import PLAIN

HERE = Path(__file__).parent
RECORDS, DOCS = HERE / "records", HERE.parent / "docs"
PICTURES = ("speed_mlp_2.png", "speed_target.png")
BEGIN, END = "<!-- from the newest record -->\n", "<!-- to here -->\n"


def keep(folder, commands):
    """Makes a record of today of a folder with `speed.csv`; returns it.

    Args:
        folder: where the benchmark has written.
        commands: lines that did.
    """
    record = RECORDS / datetime.date.today().isoformat()
    record.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "speed.csv", record / "speed.csv")
    about = {"date": record.name, "machine": machine(), "commands": commands}
    (record / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    return record


def machine():
    """What it ran on."""
    about = Path("/proc/cpuinfo")
    model = re.search("model name\t: (.*)", about.read_text()) if about.exists() else None
    packages = ("tf_blockmomentum", "tensorflow", "keras", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    )
    return {
        "processor": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **versions,
        "commit": commit.stdout.strip() or "unknown",
    }


def newest():
    """The newest record's folder."""
    return max(RECORDS.iterdir())


def pages(record, docs):
    """Writes `speed_record/index.md` and its pictures into a folder, and the summary's table into
    the `speed.md` that is there."""
    about = json.loads((record / "about.json").read_text())
    machine = about["machine"]
    rows = speed_report.read(record)
    folder = docs / "speed_record"
    folder.mkdir(exist_ok=True)
    head = (
        "# Speed: the newest record\n\nThis page has every figure of the newest record "
        f"({about['date']}, `benchmarks/records`): {machine['cores']} cores of "
        f"{machine['processor']}, TensorFlow {machine['tensorflow']}, Keras "
        f"{machine['keras']}, plain SGD inside; "
        "[speed.md](../speed.md) says what we make of it. *Boundary / all_reduce*: what a block "
        "takes longer than its steps, over one all-reduce of a tensor of as many bytes.\n\n"
        "```sh\n" + "".join(f"{command}\n" for command in about["commands"]) + "```\n\n"
    )
    if about.get("note"):
        head += about["note"] + "\n\n"
    text = speed_report.text_of(rows, folder)
    pictures = "".join(f"![{p}]({p})\n\n" for p in PICTURES if (folder / p).exists())
    (folder / "index.md").write_text(head + pictures + "\n\n".join(text) + "\n")
    page = docs / "speed.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + summary(rows) + END + after)


def summary(rows):
    """The MLP on two workers: shares by form, a column for each link, with the limits."""
    places = [p for p in speed_report.places_of(rows) if (p.model, p.workers) == ("mlp", 2)]
    cells: dict = {}
    for place in places:
        for row in place.contenders:
            if row.method in (PLAIN, "no communication"):
                continue
            share, limit = place.share(row), place.limit(row)
            key = (row.label, row.k)
            if share:
                said = f"{share:.2f}" + (f" (limit {limit:.2f})" if limit else "")
                cells.setdefault(key, {})[place.link] = said
    links = [place.link for place in places]
    ordered = sorted(cells.items(), key=lambda item: (item[0][1], item[0][0]))
    return table(
        ["", "K", *links],
        [[label, k, *(by.get(link, "") for link in links)] for (label, k), by in ordered],
    ) + "\n"  # fmt: skip
