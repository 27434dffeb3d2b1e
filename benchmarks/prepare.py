"""Preparing chat rows against `datasets.map` + Transformers' apply_chat_template on this machine, in one run.

    python -m benchmarks.prepare             # writes benchmarks/results/prepare.{csv,json}

Both sides read the same JSONL, render with the same ChatML template, tokenise with the same tokenizer in two processes,
mark which tokens the assistant wrote, and write everything to disk: Stoker's `prepare` into its cache, `datasets.map`
(`return_assistant_tokens_mask`) into its own: in batches of 1,000, and at the smallest and largest size also row by
row, as TRL's SFTTrainer calls it. Each job is a process of its own; jobs take turns (ours, theirs, ours, ...), and the
ratio of speeds is the median of those of neighbours, because the clock of a shared machine drifts; processor seconds of
all processes are counted too, which other work on the machine moves less. Memory is what the job's processes hold for
themselves (unique set size, summed, sampled five times a second) until the result is there. Seconds count from the call
to the result, the start of the worker processes included. Before a figure is printed, token ids and masks of both sides
must be equal.
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SIDES = ("stoker", "datasets.map")
BY_ROW = "by row"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--repeats", type=int, default=3, help="pairs at the smallest size; the others run once")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.job:
        side, rows, folder, processes = chosen.job
        print(json.dumps(run(side, Path(rows), Path(folder), int(processes))))
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(folder / "tokenizer")
        for number, count in enumerate(sorted(chosen.rows)):
            rows = make_rows(folder / f"rows-{count}.jsonl", count)
            for _ in range(chosen.repeats if number == 0 else 1):
                results += [measured(side, rows, count, folder, chosen.processes) for side in SIDES]
                check_same(results[-2:])
            if number in (0, len(chosen.rows) - 1):
                results.append(measured(BY_ROW, rows, count, folder, chosen.processes))
                check_same(results[-2:])
            rows.unlink()
            report(results, chosen.processes)  # after each size: the last one takes as long as all before it


# How often the words of a language come: the n-th most frequent about 1 / n as often as the first (Zipf, 1935).
NUM_WORDS = 30_000
ZIPF = list(itertools.accumulate(1 / rank for rank in range(1, NUM_WORDS + 1)))


def words(generator: random.Random, count: int) -> list[str]:
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    weights = [12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2, 2, 1, 1, 2, 1, 1, 1, 1, 1]
    return ["".join(generator.choices(letters, weights, k=generator.randint(2, 10))) for _ in range(count)]


def text(generator: random.Random, vocabulary: list[str], median_words: float) -> str:
    count = max(1, min(1500, round(median_words * generator.lognormvariate(0, 0.8))))
    chosen = generator.choices(vocabulary, cum_weights=ZIPF, k=count)
    for index in range(0, count, 12):
        chosen[index] = chosen[index].capitalize()
        chosen[index - 1] += generator.choice([".", ".", "?", ",", ".\n"])
    return " ".join(chosen)


def make_tokenizer(folder: Path) -> None:
    """Trains a byte-level BPE tokenizer of 16,000 tokens on text like the rows', and saves it with the template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    generator = random.Random(0)
    vocabulary = words(generator, NUM_WORDS)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text(generator, vocabulary, 100) for _ in range(2000)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_rows(path: Path, count: int) -> Path:
    """Writes conversations of one to three questions with answers, some with a system message."""
    generator = random.Random(1)
    vocabulary = words(random.Random(0), NUM_WORDS)
    with path.open("w") as opened:
        for _ in range(count):
            messages = [{"role": "system", "content": "Answer in short."}] if generator.random() < 0.3 else []
            for _ in range(generator.choice([1, 1, 2, 3])):
                messages.append({"role": "user", "content": text(generator, vocabulary, 15)})
                messages.append({"role": "assistant", "content": text(generator, vocabulary, 50)})
            opened.write(json.dumps({"messages": messages}) + "\n")
    return path


def measured(side: str, rows: Path, count: int, folder: Path, processes: int) -> dict[str, Any]:
    """Runs one side in a process of its own and watches its memory."""
    import psutil

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "benchmarks.prepare", "--job", side, str(rows), scratch, str(processes)]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "HF_DATASETS_CACHE": scratch,
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as job:
            watched, peak = psutil.Process(job.pid), 0
            while job.poll() is None:
                # Afterwards the job reads its result through mapped pages, which are no part of preparing it.
                if not (Path(scratch) / "prepared").exists():
                    peak = max(peak, held_bytes(watched))
                time.sleep(0.2)
            assert job.stdout is not None
            output = job.stdout.read()
    if job.returncode:
        raise SystemExit(f"{side} failed")
    result = {"side": side, "rows": count, **json.loads(output.splitlines()[-1]), "peak_mib": round(peak / 2**20, 1)}
    print(
        f"{side:<14}{count:>9,} rows {result['seconds']:8.1f} s {count / result['seconds']:9,.0f} rows/s "
        f"{result['processor_seconds']:8.1f} processor s "
        f"{result['peak_mib']:8,.0f} MiB",
        flush=True,
    )
    return result


def held_bytes(process: Any) -> int:
    import psutil

    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for one in family:
        try:
            total += one.memory_full_info().uss
        except psutil.Error:  # it has just ended
            continue
    return total


def run(side: str, rows: Path, scratch: Path, processes: int) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(rows.parent / "tokenizer")
    before = processor_seconds()
    if side == "stoker":
        seconds, documents = run_ours(tokenizer, rows, scratch, processes)
    else:
        seconds, documents = run_theirs(tokenizer, rows, scratch, processes, batched=side != BY_ROW)
    work = processor_seconds() - before
    (scratch / "prepared").touch()
    digest, tokens, trained = hashlib.sha256(), 0, 0
    for ids, mask in documents:
        digest.update(ids.tobytes())
        digest.update(mask.tobytes())
        tokens, trained = tokens + len(ids), trained + int(mask.sum())
    facts = {"seconds": round(seconds, 2), "processor_seconds": round(work, 2)}
    return facts | {"tokens": tokens, "trained_tokens": trained, "sha256": digest.hexdigest()}


def processor_seconds() -> float:
    """Seconds of all cores that this process and its finished children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run_ours(tokenizer: Any, rows: Path, scratch: Path, processes: int) -> tuple[float, Any]:
    from stoker.data.prepare import SourceOptions, prepare

    started = time.perf_counter()
    prepared = prepare(
        [SourceOptions(path=str(rows))],
        tokenizer=tokenizer,
        sequence_length=32_768,
        cache_folder=scratch,
        num_workers=processes,
    )
    seconds = time.perf_counter() - started
    return seconds, (prepared.document(index) for index in range(len(prepared)))


def run_theirs(tokenizer: Any, rows: Path, scratch: Path, processes: int, *, batched: bool) -> tuple[float, Any]:
    import datasets
    import numpy as np

    def tokenised(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made = tokenizer.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": made["input_ids"], "assistant_masks": made["assistant_masks"]}

    started = time.perf_counter()
    dataset = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(scratch))
    dataset = dataset.map(tokenised, batched=batched, num_proc=processes, remove_columns=dataset.column_names)
    seconds = time.perf_counter() - started
    return seconds, (
        (np.array(row["input_ids"], dtype=np.uint32), np.array(row["assistant_masks"], dtype=bool)) for row in dataset
    )


def check_same(pair: list[dict[str, Any]]) -> None:
    ours, theirs = pair
    if ours["sha256"] != theirs["sha256"]:
        raise SystemExit(f"token ids or masks differ: {ours} {theirs}")


def report(results: list[dict[str, Any]], processes: int) -> None:
    """Writes every run and, by size, speeds, peaks and the median ratio of neighbours."""
    from importlib.metadata import version

    summary = []
    for count in sorted({result["rows"] for result in results}):
        ours, theirs = ([r for r in results if r["rows"] == count and r["side"] == side] for side in SIDES)
        pairs = list(zip(ours, theirs, strict=True))
        ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
        work = [b["processor_seconds"] / a["processor_seconds"] for a, b in pairs]
        line: dict[str, Any] = {"rows": count, "tokens": ours[0]["tokens"]}
        for name, runs in zip(("stoker", "datasets_map"), (ours, theirs), strict=True):
            line[f"{name}_rows_per_second"] = round(count / statistics.median(r["seconds"] for r in runs), 1)
            line[f"{name}_peak_mib"] = round(max(r["peak_mib"] for r in runs), 1)
        line |= {"times_faster": round(statistics.median(ratios), 3), "pairs": len(ratios)}
        line["times_less_processor_time"] = round(statistics.median(work), 3)
        by_row = [r["seconds"] for r in results if r["rows"] == count and r["side"] == BY_ROW]
        line["times_faster_than_by_row"] = round(by_row[0] / ours[-1]["seconds"], 3) if by_row else ""
        if by_row:
            print(f"{count:,} rows: {line['times_faster_than_by_row']:.2f} times as fast as row by row")
        summary.append(line)
        print(
            f"{count:,} rows: {line['times_faster']:.2f} times as fast (median of {len(ratios)}), "
            f"{line['times_less_processor_time']:.2f} times less processor time; peak "
            f"{line['stoker_peak_mib']:,.0f} MiB beside {line['datasets_map_peak_mib']:,.0f} MiB"
        )
    versions = {name: version(name) for name in ("stoker", "transformers", "tokenizers", "datasets")}
    RESULTS.mkdir(exist_ok=True)
    facts = {"processes": processes, "versions": versions, "summary": summary, "runs": results}
    (RESULTS / "prepare.json").write_text(json.dumps(facts, indent=1) + "\n")
    with (RESULTS / "prepare.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, fieldnames=list(summary[0]))
        writer.writeheader()
        writer.writerows(summary)


if __name__ == "__main__":
    main()
