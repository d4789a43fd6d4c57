# SPDX-License-Identifier: Apache-2.0
"""Makes the README's tables and its plot from the files in tests/bench/results.

    tests/bench/publish.py            writes them
    tests/bench/publish.py --check    fails if they are not what the files say

Of each benchmark on each kind of machine the newest file counts: names are DATE[-MACHINE]-BENCHMARK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PLOT = RESULTS / "loading.svg"
README = ROOT / "README.md"
BEGIN, END = "<!-- figures: made by tests/bench/publish.py -->", "<!-- end of figures -->"

# What the rows mean, in the order of the tables: benchmark, row, what, beside what.
VLLM_ROWS = [
    ("vllm", "resident_rebind_first_token", "vLLM, 16.4 GB model: swap between two on the GPU, to the first token",
     "our limit"),
    ("vllm", "first_token", "of that, the first token: the same engine asked without a swap", ""),
    ("vllm", "resident_wake_first_token", "the same, of an engine that was parked", "our limit"),
    ("vllm", "host_wake_first_token", "the same, its weights in host memory", "our limit"),
    ("vllm", "stored_swap_first_token", "the same, its weights on the disk", "our limit"),
    ("vllm", "new_architecture_first_token", "a new engine, of an architecture compiled before", "our limit"),
    ("vllm", "first_swap_first_token", "the very first: read, loaded, all kernels compiled", ""),
    ("vllm", "parked_device_bytes", "what a parked engine has of the GPU: its context and graphs", ""),
    ("vllm", "vllm_first_token", "vLLM by itself, a first token without any swap", ""),
    ("vllm", "vllm_cold_first_token", "vLLM by itself, the very first", ""),
    ("vllm", "vllm_sleep1_wake_first_token", "vLLM by itself, woken from its sleep mode", ""),
    ("vllm", "vllm_sleep2_reload", "vLLM by itself, woken and loaded anew in place, the file in memory", ""),
]  # fmt: skip
H200_ROWS = [
    *VLLM_ROWS,
    ("sweep", "ram_file_to_device", "file in memory to GPU, not verified", "one plain copy of pinned memory"),
    ("sweep", "ram_file_to_device.verified_1MiB", "the same, every block verified, in pieces of 1 MiB",
     "one plain copy of pinned memory"),
]  # fmt: skip
H100_ROWS = [
    *VLLM_ROWS,
    ("robin", "round_robin_first_token", "ten fine-tunes of 0.7 GB on one engine, each in turn, a thousand swaps", ""),
    ("memory", "resident_lease", "lease of a model on the GPU: D-Bus call to tensors", "our limit"),
    ("memory", "resident_map", "of that, mapping its memory", "our limit"),
    ("memory", "host_to_device", "host tier to GPU", "one plain copy of pinned memory"),
    (
        "peers",
        "peer.flashd.host",
        "host tier to GPU, from the D-Bus call to tensors",
        "one plain copy of pinned memory",
    ),
    ("stream", "nvme_to_device", "disk to GPU", "the best raw O_DIRECT read"),
    ("stream", "nvme_to_device.verified", "the same, every block verified", "the best raw O_DIRECT read"),
    ("race", "peer.flashd.cold", "disk to GPU, twelve rounds, from the D-Bus call to tensors", "a raw O_DIRECT read"),
    ("race", "peer.runai-model-streamer.cold", "the same, by the quickest peer", "a raw O_DIRECT read"),
    ("stream", "ram_file_to_device", "file in memory to GPU", "one plain copy of pinned memory"),
    ("stream", "nvme_to_host", "disk to host tier", "the best raw O_DIRECT read"),
    ("stream", "cpu_s_per_gb.device", "processor time of a load from disk to GPU", ""),
    ("stream", "staging_bytes", "pinned memory that all loads to the GPU share", "our limit"),
    ("adapters", "copy_and_apply.all_linear", "an adapter for all layers added to a copy of its base, 16.4 GB",
     "the merged checkpoint from pinned memory"),
]  # fmt: skip
CPU_ROWS = [
    ("stream", "nvme_to_host", "disk to ready memory", "the best raw O_DIRECT read"),
    ("stream", "nvme_to_host.verified", "the same, every block verified", "the best raw O_DIRECT read"),
    ("stream", "nvme_to_host.fresh_memory", "the same, into fresh memory", "the best raw O_DIRECT read"),
    ("stream", "cpu_s_per_gb", "processor time of a load into ready memory", "our limit"),
    ("stream", "peer.safetensors.cold", "safetensors library, cold", "the best raw O_DIRECT read"),
    ("convert", "convert.cold", "conversion, cold", "cp and fsync"),
    ("convert", "convert.warm", "conversion, source in the page cache", "cp and fsync"),
    ("finetunes", "load.differs_20", "a fine-tune of which a fifth of the layers differs, its base in memory", "alone"),
    ("finetunes", "differs.differs_20", "what is read of that fine-tune", "all of it"),
    ("finetunes", "stored.differs_20", "what it takes on btrfs", "all of it"),
    ("finetunes", "load.adapter_attention", "an adapter for attention, merged, its base in memory", "alone"),
    ("finetunes", "load.adapter_all_linear", "an adapter for all layers, merged, its base in memory", "alone"),
    ("finetunes", "apply.adapter_all_linear", "the same applied to a copy at load, which flashd does not do", ""),
    ("finetunes", "merge.adapter_all_linear", "making its model, once", "as large a source converted"),
    ("daemon", "ready.1000_models", "daemon ready, with 1,000 models", "our limit"),
    ("daemon", "idle.1000_models", "daemon's memory, idle, with 1,000 models", "our limit"),
    ("daemon", "listing_in_python.1000_models", "listing 1,000 models from Python", "our limit"),
    ("tray", "tray.icon", "the tray's icon is in the panel, with 100 models", "our limit"),
    ("tray", "tray.memory", "the tray's share of memory (Pss), with 100 models", "our limit"),
]
LOADERS = ["flashd", "safetensors", "fastsafetensors", "runai-model-streamer", "instanttensor"]


def newest(machine: str) -> dict[str, dict[str, Any]]:
    """Reports by benchmark, of machines whose results carry this mark in their name (none for those without a GPU)."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        mark = path.stem.split("-")[3:-1]
        if "-".join(mark) == machine:
            report = json.loads(path.read_text())
            found[report["benchmark"]] = report
    return found


def figure(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 1e6:.0f} MB"
    if unit == "s" and value < 0.5:
        return f"{value * 1e3:.0f} ms"
    if unit == "ms" and value >= 1000:
        value, unit = value / 1e3, "s"
    digits = 3 if value < 0.1 else 2 if value < 10 else 1
    return f"{value:.{digits}f} {unit}"


def table(reports: dict[str, dict[str, Any]], wanted: list[tuple[str, str, str, str]]) -> list[str]:
    lines = ["| what | figure | beside | ratio |", "| --- | --- | --- | --- |"]
    for benchmark, name, what, beside in wanted:
        rows = {row["name"]: row for row in reports[benchmark]["rows"]}
        row = rows[name]
        limit = f"{beside}: {figure(row['limit'], row['unit'])}" if row["limit"] else ""
        ratio = f"{row['ratio']:.2f}" if row["ratio"] and beside != "our limit" else ""
        lines.append(f"| {what} | {figure(row['value'], row['unit'])} | {limit} | {ratio} |")
    return lines


def described(reports: dict[str, dict[str, Any]]) -> str:
    """Which machine each benchmark ran on, and when."""
    by_device: dict[str, list[dict[str, Any]]] = {}
    for _, report in sorted(reports.items()):
        by_device.setdefault(report["device"], []).append(report)
    return "\n\n".join(_ran_on(device, those) for device, those in by_device.items())


def _ran_on(device: str, reports: list[dict[str, Any]]) -> str:
    commands = ", ".join(f"`{report['command']}`" for report in reports)
    dates = sorted({report["date"][:10] for report in reports})
    return f"{device}; {', '.join(dates)}; {commands}."


def figures() -> str:
    h200, h100, cpu = newest("h200"), newest("h100"), newest("")
    return "\n".join(
        [
            "![One checkpoint, five loaders, from a file to tensors on the GPU](tests/bench/results/loading.svg)", "",
            described(h100), "", *table(h100, H100_ROWS), "", described(h200), "", *table(h200, H200_ROWS), "",
            described(cpu), "", *table(cpu, CPU_ROWS),
        ]
    )  # fmt: skip


def plot() -> str:
    """Bars: how fast each loader brought one checkpoint to the GPU, cold and with the file in the page cache."""
    report = newest("h100")["peers"]
    rows = {row["name"]: row for row in report["rows"]}
    width, left, bar, gap, top = 860, 190, 16, 14, 64
    count = len(rows["peer.flashd.cold"]["runs"])
    height = top + len(LOADERS) * (2 * bar + gap) + 52
    panels = [("cold", "from the disk", 0), ("warm", "file in the page cache", 1)]
    span = (width - left - 90) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="24" font-size="15" font-weight="bold">One checkpoint to tensors on the GPU, GB/s</text>',
        f'<text x="12" y="{height - 28}" fill="#666">{escape(report["device"])}, {report["date"][:10]}</text>',
        f'<text x="12" y="{height - 10}" fill="#666">medians of {count} interleaved runs; '
        "the line is the limit measured among them: the raw read, and one copy of pinned memory</text>",
    ]
    for how, title, column in panels:
        x = left + column * (span + 60)
        limit = rows[f"peer.flashd.{how}"]["limit"]
        most = max(limit, *(rows[f"peer.{name}.{how}"]["value"] for name in LOADERS))
        parts.append(f'<text x="{x:.0f}" y="46" fill="#444">{title}</text>')
        for index, name in enumerate(LOADERS):
            y = top + index * (2 * bar + gap)
            value = rows[f"peer.{name}.{how}"]["value"]
            length = value / most * (span - 40)
            colour = "#2f7d4f" if name == "flashd" else "#9aa7b4"
            if column == 0:
                parts.append(f'<text x="{left - 10}" y="{y + 20}" text-anchor="end">{name}</text>')
            parts.append(f'<rect x="{x:.0f}" y="{y}" width="{length:.1f}" height="{2 * bar - 4}" fill="{colour}"/>')
            parts.append(f'<text x="{x + length + 5:.0f}" y="{y + 20}">{value:.2f}</text>')
        at = x + limit / most * (span - 40)
        bottom = top + len(LOADERS) * (2 * bar + gap) - gap
        parts.append(f'<line x1="{at:.1f}" y1="{top - 6}" x2="{at:.1f}" y2="{bottom}" stroke="#b3372f"/>')
        anchor = f'x="{at:.0f}" y="{top - 10}" text-anchor="middle"'
        parts.append(f'<text {anchor} fill="#b3372f" font-size="11">{limit:.2f}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{figures()}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if wanted != text or PLOT.read_text() != plot():
            sys.exit("README.md and its plot are not what tests/bench/results says: run tests/bench/publish.py")
        return
    README.write_text(wanted)
    PLOT.write_text(plot())


if __name__ == "__main__":
    main()
