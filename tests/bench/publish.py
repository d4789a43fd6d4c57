# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of the README and the benchmarks page, their plot, and the table of the campaigns.

    tests/bench/publish.py            writes them
    tests/bench/publish.py --check    fails if they are out of date

All of them come from tests/bench/results. The newest file counts for each benchmark on each kind of machine; names are
DATE[-MACHINE]-BENCHMARK.json. Results of campaigns are called DATE-campaign-NAME.json, whatever the machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "packaging" / "docs" / "benchmarks.md"
PLOT = ROOT / "packaging" / "docs" / "images" / "loading.svg"
README = ROOT / "README.md"
CAMPAIGNS = ROOT / "tests" / "campaigns" / "README.md"
CAMPAIGNS_BEGIN, CAMPAIGNS_END = "<!-- results: made by tests/bench/publish.py -->", "<!-- end of results -->"
BEGIN, END = "<!-- figures: made by tests/bench/publish.py -->", "<!-- end of figures -->"
KEY_BEGIN, KEY_END = "<!-- key figures: made by tests/bench/publish.py -->", "<!-- end of key figures -->"

# The rows of the tables, in order: benchmark, row, description, meaning of the limit.
VLLM_ROWS = [
    ("vllm", "resident_rebind_first_token", "vLLM: swap between two 16.4 GB models on the GPU, to the first token",
     "our limit"),
    ("vllm", "first_token", "the first token alone: the same engine, asked without a swap", ""),
    ("vllm", "resident_wake_first_token", "the same swap, from a parked engine", "our limit"),
    ("vllm", "host_wake_first_token", "the same swap, with the weights in host memory", "our limit"),
    ("vllm", "stored_swap_first_token", "the same swap, with the weights on the disk", "our limit"),
    ("vllm", "new_architecture_first_token", "a new engine for an architecture that was compiled before", "our limit"),
    ("vllm", "first_swap_first_token", "the very first engine: weights read and loaded, all kernels compiled", ""),
    ("vllm", "parked_device_bytes", "GPU memory of a parked engine: its context and graphs", ""),
    ("vllm", "vllm_first_token", "vLLM alone: the first token, without a swap", ""),
    ("vllm", "vllm_cold_first_token", "vLLM alone: a cold start, to the first token", ""),
    ("vllm", "vllm_sleep1_wake_first_token", "vLLM alone: woken from its sleep mode, to the first token", ""),
    ("vllm", "vllm_sleep2_reload", "vLLM alone: woken and reloaded in place, with the file in memory", ""),
]  # fmt: skip
H200_ROWS = [
    *VLLM_ROWS,
    ("vllm", "vllm_serve_first_token", "vLLM's own server, asked by the same client: the first token", ""),
    ("sweep", "ram_file_to_device", "file in memory to GPU, not verified", "one plain copy of pinned memory"),
    ("sweep", "ram_file_to_device.verified_1MiB", "the same, with every block verified, in pieces of 1 MiB",
     "one plain copy of pinned memory"),
    ("http", "http_rebind_first_token", "a request by HTTP for another 16.4 GB model on the GPU, to its first token",
     "our limit"),
    ("http", "http_first_token", "the same for the model that serves", ""),
    ("http", "vllm_serve_first_token", "the same of `vllm serve` alone", ""),
    ("http", "gateway_overhead_ms", "what the gateway adds to a token's way, of 64 streams at once (median)",
     "our limit"),
    ("http", "gateway_overhead_p99_ms", "the same, of 99 of 100 tokens", "our limit"),
    ("http", "gateway_idle_bytes", "memory of the gateway with 1,000 idle clients", "our limit"),
]  # fmt: skip
H100_ROWS = [
    *VLLM_ROWS,
    ("robin", "round_robin_first_token", "vLLM: a thousand swaps round ten 0.7 GB fine-tunes, to the first token", ""),
    ("memory", "resident_lease", "lease of a model on the GPU, from the D-Bus call to tensors", "our limit"),
    ("memory", "resident_map", "mapping its memory alone", "our limit"),
    ("memory", "host_to_device", "host tier to GPU", "one plain copy of pinned memory"),
    (
        "peers",
        "peer.flashd.host",
        "host tier to GPU, from the D-Bus call to tensors",
        "one plain copy of pinned memory",
    ),
    ("stream", "nvme_to_device", "disk to GPU", "the best raw O_DIRECT read"),
    ("stream", "nvme_to_device.verified", "the same, with every block verified", "the best raw O_DIRECT read"),
    ("race", "peer.flashd.cold", "disk to GPU, from the D-Bus call to tensors, twelve rounds", "a raw O_DIRECT read"),
    ("race", "peer.runai-model-streamer.cold", "the same, by the fastest other loader", "a raw O_DIRECT read"),
    ("stream", "ram_file_to_device", "file in memory to GPU", "one plain copy of pinned memory"),
    ("stream", "nvme_to_host", "disk to host tier", "the best raw O_DIRECT read"),
    ("stream", "cpu_s_per_gb.device", "CPU time of a load from disk to GPU", ""),
    ("stream", "staging_bytes", "pinned memory shared by all loads to the GPU", "our limit"),
    ("adapters", "copy_and_apply.all_linear", "an adapter of all layers, added to a copy of its 16.4 GB base",
     "the merged checkpoint from pinned memory"),
]  # fmt: skip
CPU_ROWS = [
    ("stream", "nvme_to_host", "disk to ready memory", "the best raw O_DIRECT read"),
    ("stream", "nvme_to_host.verified", "the same, with every block verified", "the best raw O_DIRECT read"),
    ("stream", "nvme_to_host.fresh_memory", "the same, into fresh memory", "the best raw O_DIRECT read"),
    ("stream", "cpu_s_per_gb", "CPU time of a load into ready memory", "our limit"),
    ("stream", "peer.safetensors.cold", "the same by the safetensors library, cold", "the best raw O_DIRECT read"),
    ("convert", "convert.cold", "conversion, cold", "cp and fsync"),
    ("convert", "convert.warm", "conversion, with the source in the page cache", "cp and fsync"),
    (
        "finetunes",
        "load.differs_20",
        "loading a fine-tune that differs in a fifth of its layers, with its base in memory",
        "alone",
    ),
    ("finetunes", "differs.differs_20", "bytes read for that fine-tune", "all of it"),
    ("finetunes", "stored.differs_20", "its space on btrfs", "all of it"),
    (
        "finetunes",
        "load.adapter_attention",
        "loading a merged adapter of the attention layers, with its base in memory",
        "alone",
    ),
    (
        "finetunes",
        "load.adapter_all_linear",
        "loading a merged adapter of all layers, with its base in memory",
        "alone",
    ),
    (
        "finetunes",
        "apply.adapter_all_linear",
        "the same adapter applied to a copy while loading, which flashd does not do",
        "",
    ),
    ("finetunes", "merge.adapter_all_linear", "merging it into a model, once", "converting a source of that size"),
    ("daemon", "ready.1000_models", "start of the daemon until it is ready, with 1,000 models", "our limit"),
    ("daemon", "idle.1000_models", "memory of the idle daemon, with 1,000 models", "our limit"),
    ("daemon", "listing_in_python.1000_models", "listing 1,000 models from Python", "our limit"),
    ("tray", "tray.icon", "start of the panel icon until it is shown, with 100 models", "our limit"),
    ("tray", "tray.memory", "memory of the panel icon (PSS), with 100 models", "our limit"),
]
# The rows of the README: benchmark, row, description; beside it another row, or the row's own limit, and what that is.
KEY_ROWS = [
    ("vllm", "resident_rebind_first_token", "swap between two 16.4 GB models on the GPU, to the first token",
     "vllm_sleep2_reload", "vLLM's sleep mode, reloading the weights"),
    ("robin", "round_robin_first_token", "a thousand swaps round ten 0.7 GB fine-tunes, each to the first token",
     "first_token", "the first token without a swap"),
    ("vllm", "host_wake_first_token", "swap to a 16.4 GB model in host memory, to the first token",
     "stored_swap_first_token", "with its weights on the disk"),
    ("race", "peer.flashd.cold", "disk to tensors on the GPU", "limit", "a raw O_DIRECT read"),
]  # fmt: skip
LOADERS = ["flashd", "safetensors", "fastsafetensors", "runai-model-streamer", "instanttensor"]


def newest(machine: str) -> dict[str, dict[str, Any]]:
    """Reports by benchmark, of machines whose results carry this mark in their name (none for those without a GPU)."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        _, _, _, marked = path.stem.split("-", 3)
        report = json.loads(path.read_text())
        if marked == "-".join(filter(None, (machine, report["benchmark"]))):
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
    lines = ["| what | figure | limit | ratio |", "| --- | --- | --- | --- |"]
    for benchmark, name, what, beside in wanted:
        rows = {row["name"]: row for row in reports[benchmark]["rows"]}
        row = rows[name]
        limit = f"{beside}: {figure(row['limit'], row['unit'])}" if row["limit"] else ""
        ratio = f"{row['ratio']:.2f}" if row["ratio"] and beside != "our limit" else ""
        lines.append(f"| {what} | {figure(row['value'], row['unit'])} | {limit} | {ratio} |")
    return lines


def key_figures() -> str:
    """The table of the README: each figure beside another one that gives it a scale."""
    reports = newest("h100")
    lines = ["| what | flashd | for comparison |", "| --- | --- | --- |"]
    for benchmark, name, what, scale, scale_is in KEY_ROWS:
        rows = {row["name"]: row for row in reports[benchmark]["rows"]}
        row = rows[name]
        beside = figure(row["limit"] if scale == "limit" else rows[scale]["value"], row["unit"])
        lines.append(f"| {what} | {figure(row['value'], row['unit'])} | {scale_is}: {beside} |")
    return "\n".join(lines)


def described(reports: dict[str, dict[str, Any]]) -> list[str]:
    """The machine each benchmark ran on, when, and by which command."""
    by_device: dict[str, list[dict[str, Any]]] = {}
    for _, report in sorted(reports.items()):
        by_device.setdefault(report["device"], []).append(report)
    lines = []
    for device, those in by_device.items():
        lines += ["", f"On {device}:", "", *(f"- {report['date'][:10]}: `{report['command']}`" for report in those)]
    return lines


def figures() -> str:
    lines = ["![One checkpoint, five loaders, from a file to tensors on the GPU](images/loading.svg)"]
    for machine, mark, rows in (
        ("an H100", "h100", H100_ROWS),
        ("an H200", "h200", H200_ROWS),
        ("no GPU", "", CPU_ROWS),
    ):
        reports = newest(mark)
        lines += ["", f"### With {machine}", *described(reports), "", *table(reports, rows)]
    return "\n".join(lines)


def plot() -> str:
    """Bars of the speed at which each loader brought one checkpoint to the GPU, cold and from the page cache."""
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


def campaigns() -> str:
    """The counts of each campaign's last complete run."""
    lines = ["| command | what it tried | findings | seconds | machine, date |", "| --- | --- | --- | --- | --- |"]
    for _, report in sorted(newest("campaign").items()):
        counts = {row["name"]: row["value"] for row in report["rows"]}
        findings = counts.pop("findings")
        tried = ", ".join(f"{value:,} {what}" for what, value in counts.items())
        machine = f"{report['device']}, {report['date'][:10]}"
        lines.append(f"| `{report['command']}` | {tried} | {findings} | {report['seconds']:,.0f} | {machine} |")
    return "\n".join(lines)


def replaced(page: Path, begin: str, end: str, middle: str) -> str:
    """The page with new text between two marks."""
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{middle}\n\n{end}{after}"


def main() -> None:
    pages = {
        README: replaced(README, KEY_BEGIN, KEY_END, key_figures()),
        PAGE: replaced(PAGE, BEGIN, END, figures()),
        CAMPAIGNS: replaced(CAMPAIGNS, CAMPAIGNS_BEGIN, CAMPAIGNS_END, campaigns()),
        PLOT: plot(),
    }
    for page, wanted in pages.items():
        if "--check" not in sys.argv[1:]:
            page.write_text(wanted)
        elif page.read_text() != wanted:
            sys.exit(f"{page} is out of date: run tests/bench/publish.py")


if __name__ == "__main__":
    main()
